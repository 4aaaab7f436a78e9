"""The verbs of the command line on a run and its files: exit status, and what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, ok
from erasures import plain_logits, same_logits
from micro import read, state
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure, fingerprint_folder, read_ledger
from saeunlearn.features.selection import Selection
from saeunlearn.models import LanguageModel
from saeunlearn.sandbox.build import Sandbox

pytestmark = pytest.mark.slow  # the fast set has test_end_to_end.py

# Enough to change the model, and few enough to be quick.
METHOD = [x for item in ("gated=false", "gamma=6.0", "alpha=1", "blocks=2", "steps=8.0", "batch=8", "lr=0.5",
                         "max_length=16", "check_every=4") for x in ("--set", item)]  # fmt: skip
METHOD += ["--max-retain-rise", "0.5", "--form", "hard"]


@dataclass(frozen=True)
class Flow:
    """What a user has after training SAEs, unlearning with them and merging."""

    home: Path
    model: Path
    forget: Path
    retain: Path
    questions: Path
    out: dict[str, str]

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def erasure(self) -> Path:
        return self.run / "erasure"

    @property
    def merged(self) -> Path:
        return self.home / "merged"

    def data(self) -> list[Any]:
        return ["--model", self.model, "--forget", self.forget, "--retain", self.retain]

    def unlearn(self) -> list[Any]:
        return ["unlearn", *self.data(), "--questions", self.questions, "--eval", f"again={self.retain}", "--saes",
                self.home / "saes", "--layers", "1", "--k", "2", *METHOD, "--out", self.run]  # fmt: skip


@pytest.fixture(scope="module")
def flow(micro: Sandbox, micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    forget, retain, questions = (micro_data / f"{n}.jsonl" for n in ("forget", "retain", "questions"))
    flow = Flow(tmp_path_factory.mktemp("cli"), micro.model, forget, retain, questions, {})
    corpora = ["--corpus", forget, "--corpus", retain]
    flow.out["train-saes"] = ok("train-saes", "--model", micro.model, *corpora, "--layers", "0-1", "--k", 8,
                                "--tokens", 40_000, "--out", flow.home / "saes")  # fmt: skip
    flow.out["unlearn"] = ok(*flow.unlearn())
    flow.out["apply"] = ok("apply", flow.erasure, flow.model, flow.merged)
    return flow


# --- the verbs ---------------------------------------------------------------------------------------------


def test_train_saes(flow: Flow) -> None:
    from sae_lens import SAE

    said = flow.out["train-saes"]
    assert "CE recovered" in said
    assert "quality.png" in said
    rows = json.loads((flow.home / "saes" / "quality.json").read_text())["saes"]
    assert [(r["label"], r["layer"]) for r in rows] == [("topk-x8-k8", 0), ("topk-x8-k8", 1)]
    assert (flow.home / "saes" / "quality.png").stat().st_size > 10_000
    assert not list(flow.home.glob(".saes*"))
    for layer in (0, 1):
        sae = SAE.load_from_disk(flow.home / "saes" / f"layer_{layer}")
        assert (sae.cfg.d_in, sae.cfg.k) == (64, 8)
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"


def test_unlearn_says_what_came_out(flow: Flow) -> None:
    out, said = flow.out["unlearn"], read(flow.run / "run.json")
    assert said["status"] == "done"
    assert said["command"] == ["saeunlearn", *map(str, flow.unlearn())]
    assert said["config"]["settings"]["steps"] == 8
    assert "layer 1" in out
    rows = read(flow.run / "evaluation.json")["comparison"]
    assert {r["group"] for r in rows} >= {"forget", "near", "far", "again", "forget/seen", "near/untouched"}
    for r in rows:
        line = next(x for x in out.splitlines() if x.startswith(r["group"] + " ") and r["metric"].split("_")[0] in x)
        assert f"{r['before']:.3f}  {r['after']:.3f}" in re.sub(" {2,}", "  ", line)


def test_the_same_command_does_nothing_twice(flow: Flow) -> None:
    before = state(flow.erasure, flow.run / "selection.json", flow.run / "evaluation.json")
    assert ok(*flow.unlearn()) == flow.out["unlearn"]
    assert state(flow.erasure, flow.run / "selection.json", flow.run / "evaluation.json") == before


def test_select_chooses_as_the_run_does(flow: Flow, tmp_path: Path) -> None:
    which = ["--saes", flow.home / "saes", "--layers", "1", "--k", "2"]
    out = ok("select", *flow.data(), *which, *METHOD, "--out", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"selection.json", "layers.png", "features.png"}
    got = Selection.load(tmp_path / "selection.json")
    assert got == Selection.load(flow.run / "selection.json")
    assert f"K = 2 relevant features of d = 64 (K/d = 0.031) at layer 1: {got.relevant}" in out


def test_select_probes_the_layers(flow: Flow, tmp_path: Path) -> None:
    out = ok("select", *flow.data(), "--saes", flow.home / "saes", "--k", "2", *METHOD, "--out", tmp_path)
    rises = {r["layer"]: r["probe"]["forget_rise"] for r in Selection.load(tmp_path / "selection.json").layers}
    assert set(rises) == {0, 1}
    (line,) = [x for x in out.splitlines() if "chosen" in x]
    assert int(line.split()[0]) == max(rises, key=lambda i: rises[i])
    assert all(f"{r:+.3f} nats" in out for r in rises.values())


def test_evaluate_with_an_erasure_gives_what_the_run_gave(flow: Flow, tmp_path: Path) -> None:
    texts = ["--text", f"again={flow.retain}", "--prompt", "The compound", "--prompt", "The town"]
    out = ok("evaluate", "--model", flow.model, "--erasure", flow.erasure, "--questions", flow.questions, *texts,
             "--out", tmp_path / "new" / "e.json")  # fmt: skip
    result = read(tmp_path / "new" / "e.json")
    expected = {(r["group"], r["metric"]): r for r in read(flow.run / "evaluation.json")["comparison"]}
    assert len(result["comparison"]) > 10
    for r in result["comparison"]:
        assert r == expected[r["group"], r["metric"]]
    assert [s["prompt"] for s in result["samples"]] == ["The compound", "The town"]
    assert "The compound …" in out
    assert "before:" in out
    assert "after:" in out


def test_evaluate_alone_prints_json_without_single_values(flow: Flow, tmp_path: Path) -> None:
    out = ok("evaluate", "--model", flow.model, "--text", f"near={flow.retain}", "--out", tmp_path / "e.json")
    shown, whole = json.loads(out), read(tmp_path / "e.json")
    assert shown["texts"]["near"]["per_token"] == whole["texts"]["near"]["per_token"]
    assert len(whole["texts"]["near"]["values"]) == whole["texts"]["near"]["n"] == len(Corpus.load(flow.retain))
    assert "values" not in out
    assert len(out) < 2_000


def test_evaluate_judges_against_an_oracle(flow: Flow, tmp_path: Path) -> None:
    out = ok("evaluate", "--model", flow.model, "--erasure", flow.erasure, "--questions", flow.questions, "--oracle",
             flow.merged, "--out", tmp_path / "e.json")  # fmt: skip
    result = read(tmp_path / "e.json")
    assert result["oracle"]["model"] == flow.merged.name
    rows = {(r["group"], r["metric"]): r for r in result["verdicts"]}
    assert {m for _, m in rows} == {"multiple_choice", "cloze"}
    for (group, metric), r in rows.items():  # the merged model is the unlearned one
        scores = [result[d]["groups"][group][metric]["mean"] for d in ("before", "after", "oracle")]
        assert [r["original"], r["unlearned"], r["oracle"]] == scores
        assert r["difference"] == 0
        forgot = scores[0] - scores[2] > r["margin"]
        expected = ("like the oracle" if forgot else "no test") if group.startswith("forget") else "kept"
        assert r["verdict"] == expected
        assert any(line.startswith(group) and expected in line for line in out.splitlines())


def test_evaluate_measures_what_is_named(flow: Flow, tmp_path: Path) -> None:
    plain = ["evaluate", "--model", flow.model, "--questions", flow.questions, "--text", f"near={flow.retain}"]
    for name in ("default", "all", "cloze, extraction_strength"):
        ok(*plain, "--metrics", name, "--out", tmp_path / f"{name}.json")
    default, whole, named = (read(tmp_path / f"{n}.json") for n in ("default", "all", "cloze, extraction_strength"))
    assert set(named["groups"]["forget/seen"]) == {"cloze", "extraction_strength"}
    assert named["texts"] == {}
    assert len(whole["groups"]["forget/seen"]) > 6
    assert {g: {m: v for m, v in found.items() if m in ("multiple_choice", "cloze")}
            for g, found in whole["groups"].items()} == default["groups"]  # fmt: skip
    unjudged = ["--oracle", "x", "--erasure", "y", "--metrics", "nll"]
    wrong = {"known: multiple_choice": ["--metrics", "rouge"], "give --erasure": ["--oracle", "x"],
             "multiple_choice or cloze": unjudged}  # fmt: skip
    for message, bad in wrong.items():
        said = call(*plain, *bad)
        assert said.code == 1
        assert "ConfigError" in said.err
        assert message in said.err


def test_apply_writes_a_folder_that_plain_transformers_opens(flow: Flow) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    erasure = Erasure.load(flow.erasure)
    assert erasure.id[:12] in flow.out["apply"]
    assert "as sensitive as the original" in flow.out["apply"]
    lm = LanguageModel.open(flow.model, device="cpu")
    ids = torch.tensor([[1, 9, 27, 81, 5, 12, 40, 7]])
    with torch.no_grad():
        original = lm.logits(ids)
        with erasure.apply(lm):
            applied = lm.logits(ids)
    merged = AutoModelForCausalLM.from_pretrained(flow.merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(flow.merged)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, applied, atol=1e-5, rtol=0)
        assert float((applied - original).abs().max()) > 1e-2
        # The loss on the forget set in evaluation.json is that of this folder, without any of our code.
        total, n = 0.0, 0
        for row in flow.forget.read_text().splitlines():
            text = torch.tensor([tokenizer(json.loads(row)["text"]).input_ids])
            logits = merged(input_ids=text).logits[0, :-1]
            total += float(cross_entropy(logits, text[0, 1:], reduction="sum"))
            n += text.shape[1] - 1
    rows = read(flow.run / "evaluation.json")["comparison"]
    (row,) = [r for r in rows if (r["group"], r["metric"]) == ("forget", "nll")]
    assert row["after"] == pytest.approx(total / n, rel=1e-5)


def test_ledger_tells_the_request_and_its_cost(flow: Flow) -> None:
    out, (entry,) = ok("ledger", flow.merged), read_ledger(flow.merged)
    assert entry["erasure_id"] == read(flow.erasure / "erasure.json")["id"]
    for part in ("1. ", entry["erasure_id"][:12], "originals kept", "sspu seed 0", entry["forget_fingerprint"][:12]):
        assert part in out
    assert f"{fingerprint_folder(flow.model)[:12]} → {fingerprint_folder(flow.merged)[:12]}" in out
    for r in read(flow.run / "evaluation.json")["comparison"]:
        assert f"{r['group']} {r['metric']}: {r['before']:.3f} → {r['after']:.3f}" in out
    assert "no request was carried out" in ok("ledger", flow.model)


def test_the_cost_is_found_from_within_the_run(flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(flow.erasure)
    ok("apply", ".", flow.model, tmp_path / "merged")
    assert read_ledger(tmp_path / "merged")[0]["cost"] == read_ledger(flow.merged)[0]["cost"] != {}


def test_revert_restores_every_bit(flow: Flow, tmp_path: Path) -> None:
    ok("revert", flow.merged, tmp_path / "back")
    original, back = load_file(flow.model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    merged = load_file(flow.merged / "model.safetensors")
    assert original.keys() == back.keys() == merged.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32))
    assert any(not torch.equal(merged[n], t) for n, t in original.items())
    assert read_ledger(tmp_path / "back") == []
    assert call("revert", tmp_path / "back", tmp_path / "further").code == 1


def test_without_originals_there_is_no_way_back(flow: Flow, tmp_path: Path) -> None:
    out = ok("apply", flow.erasure, flow.model, tmp_path / "given", "--no-originals")
    assert "sensitive" not in out
    assert "no way back" in ok("ledger", tmp_path / "given")
    said = call("revert", tmp_path / "given", tmp_path / "back")
    assert said.code == 1
    assert "kept no originals" in said.err
    assert not (tmp_path / "back").exists()
    assert same_logits(plain_logits(tmp_path / "given"), plain_logits(flow.merged))


def test_apply_asks_for_the_model_it_was_made_on(flow: Flow, tmp_path: Path) -> None:
    said = call("apply", flow.erasure, flow.merged, tmp_path / "twice")
    assert said.code == 1
    assert "fingerprint" in said.err
    assert not (tmp_path / "twice").exists()
    ok("apply", flow.erasure, flow.merged, tmp_path / "twice", "--force")
    assert [e["forced"] for e in read_ledger(tmp_path / "twice")] == [False, True]


def test_export_gives_the_same_model_through_peft(flow: Flow, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert "PeftModel" in ok("export", flow.erasure, tmp_path / "adapter", "--base", flow.model)
    base = AutoModelForCausalLM.from_pretrained(flow.model)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[3, 9, 27, 81, 5, 12, 40, 7]])
    with torch.no_grad():
        assert same_logits(adapted(input_ids=ids).logits, plain_logits(flow.merged))
    assert read(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(flow.model)


def test_inspect_names_what_changes(flow: Flow) -> None:
    out, erasure = ok("inspect", flow.erasure), Erasure.load(flow.erasure)
    assert erasure.id[:16] in out
    assert "K = 2 relevant features of d = 64 (K/d = 0.031)" in out
    for part in erasure.parts:
        assert re.search(rf"{re.escape(part.name)}\s+rank 2$", out, re.MULTILINE)
    stored = sum(load_file(flow.model / "model.safetensors")[p.name].numel() for p in erasure.parts)
    assert f"changes {stored} numbers" in out
    assert "gamma=6.0" in out
    assert "as sensitive as the original" in out


def test_report_is_written_again(flow: Flow, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flow.run, tmp_path / "run"))
    page = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert ok("report", run).splitlines()[0] == str(run / "report.html")
    assert (run / "report.html").read_text() == page


def test_soft_form_is_dense_and_not_exported(flow: Flow, tmp_path: Path) -> None:
    soft = ["--form", "soft", "--set", "steps=2"]
    ok(*flow.unlearn()[:-1], tmp_path / "run", *soft)
    out = ok("inspect", tmp_path / "run" / "erasure")
    assert "form=soft" in out
    assert out.count("  dense\n") == len(Erasure.load(tmp_path / "run" / "erasure").parts)
    said = call("export", tmp_path / "run" / "erasure", tmp_path / "adapter", "--base", flow.model)
    assert (said.code, "dense" in said.err) == (1, True)


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "error", "said"),
    [
        ("unlearn --model {model} --forget ./no.jsonl --retain {retain} --out o", "CorpusError", "no.jsonl"),
        ("unlearn --model {model} --forget {retain} --retain {retain} --out o", "OverlapError", "also in the retain"),
        ("unlearn {data} --method wish --out o", "ConfigError", "wish"),
        ("unlearn {data} --set steps --out o", "ConfigError", "NAME=VALUE"),
        ("unlearn {data} --set steps=many --out o", "ConfigError", "whole number"),
        ("unlearn {data} --set stepps=3 --out o", "ConfigError", "stepps"),
        ("unlearn {data} --max-retain-rise nan --out o", "ConfigError", "max_retain_rise"),
        ("unlearn {data} --eval {retain} --out o", "ConfigError", "--eval"),
        ("unlearn {data} --k 64 --out o", "SelectionError", "K = 64"),
        ("unlearn {data} --layer 1 --layers 0 --out o", "ConfigError", "layer 1"),
        ("unlearn {data} --saes ./no --out o", "SAEMismatchError", "no"),
        ("unlearn {data} --device warp --out o", "ModelError", "warp"),
        ("unlearn {data} --threads 0 --out o", "ConfigError", "--threads 0"),
        ("unlearn {data} --out {model}", "RunError", "not a run directory"),
        ("select {data} --saes ./no --out o", "SAEMismatchError", "no"),
        ("select {data} --saes {home}/saes --k 0 --out o", "SelectionError", "K = 0"),
        ("train-saes --model ./no --corpus {retain} --out o", "ModelError", "no"),
        ("train-saes --model {model} --corpus {retain} --k 9999 --out o", "ConfigError", "9999"),
        ("train-saes --model {model} --corpus {retain} --layers 5 --out o", "ModelError", "outside 0"),
        ("train-saes --model {model} --corpus {retain} --out {model}", "RunError", "not empty"),
        ("evaluate --model {model}", "ConfigError", "nothing to measure"),
        ("evaluate --model {model} --text {retain}", "ConfigError", "--text"),
        ("evaluate --model {merged} --text x={retain} --erasure {home}/run/erasure", "ErasureError", "fingerprint"),
        ("evaluate --model {model} --erasure {model} --text x={retain}", "ErasureError", "not an Erasure"),
        ("evaluate --model {home}/run/erasure --text x={retain}", "ErasureError", "not a model"),
        ("apply {model} {model} o", "ErasureError", "not an Erasure"),
        ("apply {home}/run/erasure ./no o", "ModelError", "no"),
        ("apply {home}/run/erasure {model} {home}", "ErasureError", "not empty"),
        ("revert {model} o", "ErasureError", "nothing to undo"),
        ("export ./no o --base {model}", "ErasureError", "not an Erasure"),
        ("inspect ./no", "ErasureError", "not an Erasure"),
        ("report ./no", "RunError", "not a run directory"),
        ("report {model}", "RunError", "nothing to report"),
        ("sandbox build --out {model}", "ErasureError", "not empty"),
        ("evaluate --model {model} --text x={retain} --out {retain}/e.json", "FileExistsError", "retain.jsonl"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, error: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--model {flow.model} --forget {flow.forget} --retain {flow.retain}"
    names = {"model": flow.model, "retain": flow.retain, "home": flow.home, "merged": flow.merged, "data": data}
    before = state(flow.home, flow.model, flow.forget.parent)
    got = call(*shlex.split(argv.format(**names)))
    assert got.code == 1
    assert re.fullmatch(rf"saeunlearn: {error}: .*\n", got.err)
    assert said in got.err
    assert got.out == ""
    assert not list((tmp_path / "o").glob("*"))
    assert state(flow.home, flow.model, flow.forget.parent) == before


def test_a_damaged_evaluation_does_not_end_in_a_traceback(flow: Flow, tmp_path: Path) -> None:
    shutil.copytree(flow.erasure, tmp_path / "erasure")
    (tmp_path / "evaluation.json").write_text("{")
    said = call("apply", tmp_path / "erasure", flow.model, tmp_path / "merged")
    assert said.code == 1
    assert re.fullmatch(r"saeunlearn: RunError: .*evaluation\.json is damaged.*\n", said.err)
    for n, other in enumerate(("[]", "{}")):  # some other tool's file
        (tmp_path / "evaluation.json").write_text(other)
        ok("apply", tmp_path / "erasure", flow.model, tmp_path / f"merged{n}")
