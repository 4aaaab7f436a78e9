"""The harness's numbers against the toolkit's own, Hugging Face's, and the harness's own model class."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, Checkpoints
from erasures import deltas, make
from guarded import guard
from test_offsets import offset_of
from test_tokens import new_token

from saeunlearn.cli import main
from saeunlearn.corpus import Corpus, Record, write_jsonl
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError, CorpusError, ModelError
from saeunlearn.evaluation import harness, metrics
from saeunlearn.evaluation.harness import before_and_after, compare, load_tasks, run_tasks, table
from saeunlearn.evaluation.harness_model import HarnessModel
from saeunlearn.models import LanguageModel

PLACES = ("mill", "old harbour near the river", "tower", "library")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
QUESTIONS = Corpus(
    tuple(
        Record(question=" ".join(s.split()[:6]), answer=PLACES[i % 4], choices=PLACES)
        for i, s in enumerate(SENTENCES[:12])
    )
)

CHOICE = """
task: places
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: "{{choices.index(answer)}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITE = """
task: written
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["e", "."], max_gen_toks: 9}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLL = """
task: rolled
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list:
  - metric: word_perplexity
"""


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three task files on one local JSONL file."""
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    data = {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")}
    head = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"
    for text in (CHOICE, WRITE, ROLL):
        (folder / f"{text.split()[1]}.yaml").write_text(head + text)
    return folder


@pytest.fixture(scope="module")
def tasks(folder: Path) -> dict[str, Any]:
    return load_tasks(["places"], folder)


def own_accuracy(model: LanguageModel) -> list[float]:
    scores = metrics.answer_logprobs(model, QUESTIONS)
    return [float(int(np.argmax(row)) == r.choices.index(r.answer)) for r, row in zip(QUESTIONS, scores)]


# --- tasks -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["weights", "guard", "token", "offset"])
def test_accuracy_is_our_own_with_every_kind_of_erasure(
    checkpoints: Checkpoints, tasks: dict[str, Any], arch: str, kind: str
) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    parts: dict[str, Any] = {
        "weights": lambda: deltas(lm), "guard": lambda: [guard("clamp")], "token": lambda: [new_token(lm, scale=2.0)],
        "offset": lambda: [offset_of(lm)],
    }  # fmt: skip
    erasure = make(lm, parts[kind]())
    plain = metrics.answer_logprobs(lm, QUESTIONS)
    got = before_and_after(lm, tasks, erasure, include_text=True)
    assert got["erasure"] == erasure.id
    assert got["before"]["lineage"] == []
    assert got["after"]["lineage"] == [erasure.id]
    assert lm.lineage == []
    for side in ("before", "after"):
        with erasure.apply(lm) if side == "after" else nullcontext():
            wanted, likelihoods = own_accuracy(lm), metrics.answer_logprobs(lm, QUESTIONS)
        examples = got[side]["tasks"]["places"]["examples"]["none"]
        assert examples["acc"] == wanted
        found = [[pair[0] for pair in row] for row in examples["filtered_resps"]]
        assert np.allclose(found, likelihoods, atol=2e-4)
        acc = next(m for m in got[side]["tasks"]["places"]["metrics"] if m["metric"] == "acc")
        assert acc["value"] == pytest.approx(np.mean(wanted))
        assert acc["stderr"] == pytest.approx(np.std(wanted, ddof=1) / len(wanted) ** 0.5)
        assert acc["higher_is_better"] is True
    assert not np.allclose(plain, likelihoods, atol=1e-3)  # the Erasure did act
    row = next(r for r in got["comparison"] if r["metric"] == "acc")
    assert row["change"] == pytest.approx(row["after"] - row["before"])
    assert row["low"] <= row["change"] <= row["high"]


def test_documents_are_named_by_hash_and_text_is_kept_on_request_only(llama: LanguageModel, folder: Path) -> None:
    three = load_tasks(["places,written", "rolled"], folder)
    got = run_tasks(llama, three, limit=5)
    assert list(got["tasks"]) == ["places", "written", "rolled"]
    assert {t["n"] for t in got["tasks"].values()} == {5}
    written = json.dumps(got, allow_nan=False)
    assert not any(word in written for word in ("keeps", "harbour", "lantern"))
    ids = got["tasks"]["places"]["examples"]["none"]["ids"]
    assert len(set(ids)) == 5
    assert all(re.fullmatch(r"[0-9a-f]{16}", i) for i in ids)
    again = run_tasks(llama, three, limit=5, include_text=True)
    text = json.dumps(again, allow_nan=False)
    assert all(word in text for word in ("keeps", "harbour", "lantern"))
    assert again["tasks"]["places"]["metrics"] == got["tasks"]["places"]["metrics"]
    perplexity = got["tasks"]["rolled"]["metrics"][0]
    texts = [r.full_text for r in QUESTIONS.records[:5]]
    nats = sum(slow_total(llama, [llama.bos_id], t) for t in texts)
    assert perplexity["value"] == pytest.approx(np.exp(-nats / sum(len(t.split()) for t in texts)), rel=1e-3)


def test_groups_and_task_files(llama: LanguageModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("group: both\ntask: [places, again]\naggregate_metric_list: [{metric: acc}]\n")
    place = (folder / "places.yaml").read_text()
    (tmp_path / "places.yaml").write_text(place)
    (tmp_path / "again.yaml").write_text(place.replace("task: places", "task: again") + "num_fewshot: 1\n"
                                         "fewshot_split: test\n")  # fmt: skip
    got = run_tasks(llama, load_tasks(["both"], tmp_path), limit=4)["tasks"]
    assert {name: (t["n"], t["n_shot"]) for name, t in got.items()} == {
        "both": (None, None), "places": (4, 0), "again": (4, 1),
    }  # fmt: skip
    values = {name: next(m["value"] for m in t["metrics"] if m["metric"] == "acc") for name, t in got.items()}
    assert values["both"] == pytest.approx((values["places"] + values["again"]) / 2)
    assert got["both"]["examples"] == {}
    single = run_tasks(llama, load_tasks([str(folder / "places.yaml")]), limit=4)["tasks"]
    assert single["places"] == got["places"]


def test_comparison_and_table_by_hand() -> None:
    def result(values: list[float], ids: str = "abcd") -> dict[str, Any]:
        mean = sum(values) / len(values)
        numbers = {"metric": "acc", "filter": "none", "value": mean, "stderr": 0.25, "higher_is_better": True}
        other = {"metric": "ppl", "filter": "strict", "value": 8 * mean, "stderr": None, "higher_is_better": False}
        examples = {"none": {"ids": list(ids), "acc": values}, "strict": {"ids": list(ids), "ppl": values}}
        return {"tasks": {"t": {"n": 4, "metrics": [numbers, other], "examples": examples}}}

    before, after = result([1.0, 1.0, 1.0, 0.0]), result([0.0, 0.0, 1.0, 0.0])
    acc, ppl = compare(before, after)
    assert (acc["before"], acc["after"], acc["change"], acc["before_stderr"]) == (0.75, 0.25, -0.5, 0.25)
    assert (acc["low"], acc["high"]) == (-1.0, 0.0)
    assert (ppl["change"], ppl["low"], ppl["high"]) == (-4.0, None, None)  # no mean over documents: no interval
    lines = table([acc, ppl]).splitlines()
    assert lines[2].split() == ["t", "acc", "4", "0.750", "±", "0.250", "0.250", "±", "0.250", "-0.500", "-1.000", "…",
                                "+0.000"]  # fmt: skip
    assert lines[3].split() == ["t", "ppl", "(strict)", "4", "6.000", "2.000", "-4.000", "–"]
    alone = compare(before, None)[0]
    assert (alone["before"], alone["after"], alone["change"]) == (0.75, None, None)
    with pytest.raises(ConfigError, match="not measured on the same documents"):
        compare(before, result([1.0] * 4, "abce"))


def test_the_command_of_the_manual(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own task file, data and command; then the same with an Erasure."""
    page = DOCS.read_text()
    block = {k: re.search(rf"```{k}\n(.*?)```", page, re.DOTALL)[1] for k in ("yaml", "json", "sh")}  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    cached = block["yaml"].replace("dataset_kwargs:\n", "dataset_kwargs:\n  cache_dir: cache\n")
    (tmp_path / "tasks/places.yaml").write_text(cached)
    (tmp_path / "questions.jsonl").write_text(block["json"])
    argv = [str(checkpoints("llama")) if a == "MODEL" else a for a in shlex.split(block["sh"])[1:]]
    assert main([*argv, "--device", "cpu"]) == 0
    assert re.search(r"places\s+acc\s+2\s+\d\.\d{3} ± \d\.\d{3}", capsys.readouterr().out)
    one = json.loads((tmp_path / "harness.json").read_text())
    assert (one["schema"], one["after"], one["erasure"]) == (1, None, None)
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    make(lm, [new_token(lm)]).save(tmp_path / "e")
    extra = ["--erasure", "e", "--ban", "<|UNL|>", "--limit", "1", "--include-text", "--out", "new/both.json"]
    assert main([*argv, *extra, "--device", "cpu"]) == 0
    both = json.loads((tmp_path / "new/both.json").read_text())
    assert both["erasure"] == Erasure.load(tmp_path / "e").id
    assert both["before"]["tasks"]["places"]["n"] == 1
    # With the new token banned the softmax is the old one.
    sides = [both[s]["tasks"]["places"]["examples"]["none"] for s in ("before", "after")]
    assert np.allclose(*([[p[0] for p in row] for row in s["filtered_resps"]] for s in sides), atol=1e-4)


# --- bad input ---------------------------------------------------------------------------------------------


def test_refusals(
    llama: LanguageModel, tasks: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager  # its own index takes many seconds: see the slow test
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **k: real(**{**k, "include_defaults": False}))
    with pytest.raises(ConfigError, match=r"no task 'place'; near it: places"):
        load_tasks(["place"], folder)
    with pytest.raises(ConfigError, match="no task 'zzzzzz'; no name is near it"):
        load_tasks(["places", "zzzzzz"], folder)
    with pytest.raises(ConfigError, match="no harness task is named"):
        load_tasks([","], folder)
    with pytest.raises(ConfigError, match="not a folder"):
        load_tasks(["places"], folder / "nowhere")
    with pytest.raises(ConfigError, match="limit of 0"):
        run_tasks(llama, tasks, limit=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "b.yaml").write_text(CHOICE.replace("places", "b") + "dataset_path: json\ntest_split: test\n"
                                   "dataset_kwargs: {data_files: {test: nowhere.jsonl}}\n")  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot load b: FileNotFoundError: .*nowhere"):
        load_tasks(["b"], broken)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=re.escape("pip install saeunlearn[harness]")):
        load_tasks(["places"], folder)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=re.escape("pip install saeunlearn[harness]")):
        run_tasks(llama, tasks)
    assert "zlib9" in str(harness._missing(ModuleNotFoundError("x", name="zlib9")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--harness", "places", "--questions", "q.jsonl"], "leave out --questions"),
        (["--limit", "3"], "belong to --harness"),
        (["--harness", "places", "--ban", "x"], "give --erasure"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["evaluate", "--model", "m", *argv]) == 1
    assert message in capsys.readouterr().err


def test_a_name_of_the_harness_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks.manager as manager

    # One folder of the harness's own: reading all of them takes many seconds.
    monkeypatch.setattr(manager, "__file__", str(Path(str(manager.__file__)).parent / "hellaswag" / "x.py"))
    with pytest.raises(ConfigError, match=r"near it: hellaswag"):
        load_tasks(["helaswag"])


# --- requests ----------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_total(lm: LanguageModel, head: list[Any], text: str) -> float:
    ids = [*head, *lm.tokenizer(text, add_special_tokens=False).input_ids]
    logprobs = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(len(head), len(ids)))


def reference(lm: LanguageModel) -> Any:
    """The harness's own model class on the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=4)


def test_requests_are_answered_as_by_the_harness_own_model(lm: LanguageModel) -> None:
    ours, theirs = HarnessModel(lm), reference(lm)
    pairs = [(s[:20], s[20:]) for s in SENTENCES[:5]] + [("Mara keeps ", "the map"), ("", SENTENCES[3])]
    requests = [request(*p) for p in pairs]
    for (a, greedy), (b, theirs_greedy) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests)):
        assert a == pytest.approx(b, abs=2e-4)
        assert greedy == theirs_greedy
    settings = {"until": ["e", "th"], "max_gen_toks": 12}
    prompts = [request(s[:n], settings) for s, n in zip(SENTENCES, (9, 25, 14, 30))]
    prompts.append(request("Mara", {"until": [], "max_gen_toks": 5}))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
    assert lm.tokenizer.padding_side == copy.deepcopy(lm.tokenizer).padding_side
    own = lm.generate([SENTENCES[0][:9]], 5)
    assert ours.generate_until([request(SENTENCES[0][:9], {"until": [], "max_gen_toks": 5})]) == own


def test_bos_comes_first_once_and_is_never_scored(lm: LanguageModel) -> None:
    ours = HarnessModel(lm)
    plain = lm.tokenizer(SENTENCES[0], add_special_tokens=False).input_ids
    assert ours.tok_encode(SENTENCES[0]) == [i for i in [lm.bos_id] if i is not None] + plain
    assert ours.tok_encode(SENTENCES[0], add_special_tokens=False) == plain
    text = SENTENCES[1]
    head = [lm.tokenizer.bos_token_id]
    ((total, _),) = ours.loglikelihood([request("", text)])
    (rolled,) = ours.loglikelihood_rolling([request(text)])
    assert total == pytest.approx(slow_total(lm, head, text), abs=2e-4)
    assert rolled == pytest.approx(total, abs=2e-4)
    if lm.bos_id is None:
        assert rolled == pytest.approx(reference(lm).loglikelihood_rolling([request(text)])[0], abs=2e-4)
        return
    bos = lm.tokenizer.bos_token
    assert ours.tok_encode(bos + SENTENCES[0]) == [lm.bos_id, *plain]
    own = metrics.nll(lm, Corpus.of([text]))
    assert rolled == pytest.approx(-own.values[0] * own.tokens[0], abs=2e-4)
    settings = {"until": [], "max_gen_toks": 6}
    one, two = ours.generate_until([request("Mara keeps", settings), request(bos + "Mara keeps", settings)])
    assert one == two == lm.generate(["Mara keeps"], 6)[0]


def test_long_requests_lose_their_start_but_not_bos(lm: LanguageModel) -> None:
    ours = HarnessModel(lm)
    long = " ".join(SENTENCES[:12])
    ((total, _),) = ours.loglikelihood([request(long, " the mill")])
    tail = lm.tokenizer(" the mill", add_special_tokens=False).input_ids
    head = [] if lm.bos_id is None else [lm.bos_id]
    room = lm.max_length - len(head)
    ids = [*head, *(lm.tokenizer(long, add_special_tokens=False).input_ids + tail)[-room:]]
    logprobs = lm.logits(torch.tensor([ids]))[0].detach().double().log_softmax(-1)
    assert total == pytest.approx(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(ids) - len(tail), len(ids))))
    (rolled,) = ours.loglikelihood_rolling([request(long)])
    # A first window after the prefix, then windows full of context: every token is scored once.
    tokens, n, slow = lm.tokenizer(long, add_special_tokens=False).input_ids, lm.max_length - 1, 0.0
    assert len(tokens) > 2 * n
    for at in range(0, len(tokens), n):
        part = tokens[at : at + n]
        context = tokens[at + len(part) - n - 1 : at] if at else [lm.tokenizer.bos_token_id]
        logprobs = lm.logits(torch.tensor([[*context, *part]]))[0].detach().double().log_softmax(-1)
        slow += sum(float(logprobs[len(context) + i - 1, t]) for i, t in enumerate(part))
    assert rolled == pytest.approx(slow, abs=2e-3)
    with pytest.raises(CorpusError, match="do not fit the context"):
        ours.loglikelihood([request("Mara", " " + long)])
    with pytest.raises(CorpusError, match="nothing to score"):
        ours.loglikelihood([request("Mara", "")])
    with pytest.raises(ModelError, match="fill the context"):
        ours.generate_until([request("Mara", {"until": []})])  # 256 tokens, the harness's default
