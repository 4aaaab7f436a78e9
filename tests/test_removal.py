"""The removal report as data: what it holds, what it leaves out, and the model card that travels with a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from erasures import make
from rundirs import SECRET, fill

from saeunlearn import figures
from saeunlearn.erasure import Erasure, unmerge
from saeunlearn.evaluation.claims import not_claimed
from saeunlearn.evaluation.removal import gather, read_attacks
from saeunlearn.evaluation.report import write_report

ID = "9" * 64


def attacks(**changes: Any) -> dict[str, Any]:
    settings = {"lr": 1e-3, "prompt": f"Say {SECRET}", "word": SECRET}
    best = {"settings": settings, "accuracy": 0.625, "low": 0.5, "high": 0.75, "recovered": 0.4375,
            "recovered_low": 0.25, "recovered_high": 0.5, "oracle_accuracy": 0.375,
            "oracle_recovered": 0.125}  # fmt: skip
    score = {"accuracy": 0.25, "low": 0.125, "high": 0.5}
    return {
        "schema": 1, "model": "tiny", "erasure_id": ID, "seed": 3, "budget": "small", "metric": "accuracy",
        "questions": {"n": 8, "fingerprint": "c" * 64},
        "levels": {"original": {**score, "accuracy": 1.0}, "unlearned": score, "oracle": score},
        "attacks": [{"name": "relearn", "kind": "training", "budget": {"steps": 50, "text": SECRET}, "best": best,
                     "tried": [{"settings": {"prompt": SECRET}, "accuracy": 0.5, "curve": [[1, 0.5]]}] * 3,
                     "ids": ["a" * 16], "values": [1.0], "extra": {"said": SECRET}}],
        "headline": {"attack": "relearn", "recovered": 0.4375, "low": 0.25, "high": 0.5, "oracle": 0.125},
        **changes,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figures, "png_data_uri", lambda _fig: "data:image/png;base64,")  # drawing takes seconds
    fill(tmp_path)
    manifest = tmp_path / "erasure/erasure.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "id": ID, "parts": [{"kind": "weight_delta"}]}))
    return tmp_path


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    start, matter, body = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter), body


def test_report_json_holds_what_the_files_say_and_their_hashes(run_dir: Path) -> None:
    write_report(run_dir, include_text=False)
    doc = json.loads((run_dir / "report.json").read_text())
    assert doc["asked"]["data"][0] == {"name": "forget", "n": 48, "fingerprint": "f" * 64}
    assert doc["done"]["features"]["relevant"] == [
        {"feature": 0, "forget": 3.0, "retain": 0.1}, {"feature": 2, "forget": 2.0, "retain": 0.1},
    ]  # fmt: skip
    assert doc["comparison"] == json.loads((run_dir / "evaluation.json").read_text())["comparison"]
    assert doc["done"]["changed"]["count"] == 4096
    there = {f.relative_to(run_dir).as_posix() for f in run_dir.rglob("*") if f.is_file()}
    assert there == set(doc["files"]) | set(doc["pages"]) | {"report.json"}
    for name, sha in (doc["files"] | doc["pages"]).items():
        assert hashlib.sha256((run_dir / name).read_bytes()).hexdigest() == sha
    first = {n: (run_dir / n).read_bytes() for n in ("report.json", "report.md", "model_card.md", "report.html")}
    write_report(run_dir, include_text=False)
    assert {n: (run_dir / n).read_bytes() for n in first} == first


def test_what_lies_in_other_folders_is_not_the_runs(run_dir: Path) -> None:
    (run_dir / "model").mkdir()
    (run_dir / "model/model.safetensors").write_text("x")
    assert not any(name.startswith("model/") for name in gather(run_dir, include_text=False)["files"])


def test_markdown_says_the_same(run_dir: Path) -> None:
    (run_dir / "attacks.json").write_text(json.dumps(attacks()))
    write_report(run_dir, include_text=False)
    lines = (run_dir / "report.md").read_text().splitlines()
    for line in (
        f"| forget | 48 | `{'f' * 64}` |",
        "- method: sspu",
        "| 0 | 3 | 0.1 |",
        "| relearn | training | 3 | 0.625 | 0.4375 | 0.25 … 0.5 | 0.375 |",
    ):
        assert line in lines, line
    (gone,) = [x for x in lines if x.startswith("| forget/seen |")]
    (kept,) = [x for x in lines if x.startswith("| near/seen |")]
    assert "| 0.875 | 0.25 | -0.625 |" in gone
    assert "| 1 | 0.875 | -0.125 |" in kept
    order = [lines.index(f"## {t}") for t in ("What is gone", "What is kept", "How it stood under attack")]
    assert order[0] < lines.index(gone) < order[1] < lines.index(kept) < order[2]


def test_texts_are_in_no_form_of_the_report_unless_asked(run_dir: Path) -> None:
    (run_dir / "attacks.json").write_text(json.dumps(attacks()))
    example = {"id": "a" * 16, "activation": 2.5, "context": f"in {SECRET} city", "token": SECRET}
    (run_dir / "examples.json").write_text(json.dumps({"features": {"2": [example]}}))
    forms = ("report.html", "report.md", "report.json", "model_card.md")
    write_report(run_dir, include_text=False)
    assert [n for n in forms if SECRET.lower() in (run_dir / n).read_text().lower()] == []
    write_report(run_dir, include_text=True)
    told = {n: f"in {SECRET} city" in (run_dir / n).read_text() for n in forms}
    assert told == {"report.html": True, "report.md": True, "report.json": True, "model_card.md": False}
    assert SECRET not in (run_dir / "model_card.md").read_text()  # it is made to be given away


@pytest.mark.parametrize(
    ("model", "name", "base"),
    [("org/small-1.5", "org/small-1.5", "org/small-1.5"), ("small", "small", None), ("/data/org/small", "small", None)],
)
def test_the_model_card_has_the_front_matter_of_the_hub(run_dir: Path, model: str, name: str, base: str | None) -> None:
    from huggingface_hub import ModelCard

    run = json.loads((run_dir / "run.json").read_text())
    run["config"]["model"], run["model"]["name"] = model, name
    (run_dir / "run.json").write_text(json.dumps(run))
    write_report(run_dir, include_text=False)
    card = (run_dir / "model_card.md").read_text()
    matter, body = front_matter(card)
    assert matter.get("base_model") == base
    assert {"saeunlearn", "unlearning", "sspu"} <= set(matter["tags"])
    assert matter["pipeline_tag"] == "text-generation"
    read = ModelCard(card).data  # as the hub reads it
    assert (read.base_model, read.library_name) == (base, "transformers")
    assert "| forget/seen | multiple_choice | 8 | 0.875 | 0.25 |" in body
    assert "Not attacked" in body


# --- attacks -----------------------------------------------------------------------------------------------


def test_attacks_are_read_by_name_and_number() -> None:
    read = read_attacks(attacks(), ID)
    assert read is not None
    assert SECRET not in json.dumps(read)
    (row,) = read["attacks"]
    assert row["settings"] == {"lr": 1e-3}
    assert row["budget"] == {"steps": 50}
    assert (row["tried"], row["accuracy"], row["oracle_recovered"]) == (3, 0.625, 0.125)
    assert read["levels"]["oracle"]["accuracy"] == 0.25
    assert read["this_erasure"]
    assert read_attacks({}, ID) is None


@pytest.mark.parametrize(
    "content",
    [
        {"attacks": None}, {"attacks": [None, 3, {}]}, {"attacks": [{"name": ["x"], "best": None, "tried": 4}]},
        {"levels": [1]}, {"headline": "x", "levels": {"oracle": 3}}, {"questions": 7, "attacks": {"a": 1}},
    ],
)  # fmt: skip
def test_a_strange_attacks_file_does_no_harm(run_dir: Path, content: dict[str, Any]) -> None:
    (run_dir / "attacks.json").write_text(json.dumps({"schema": 1, **content}))
    text = write_report(run_dir, include_text=False).read_text()
    assert "another Erasure" in text or "Not attacked" in text


def test_attacks_on_another_erasure_prove_nothing_here(run_dir: Path) -> None:
    (run_dir / "attacks.json").write_text(json.dumps(attacks(erasure_id="8" * 64)))
    text = write_report(run_dir, include_text=False).read_text()
    assert "not made on this Erasure" in text
    assert "<b>not attacked</b>" in text
    assert "Not attacked." in (run_dir / "model_card.md").read_text()


# --- what is not claimed -----------------------------------------------------------------------------------

ROWS = [{"metric": "nll"}, {"metric": "accuracy"}]
DONE = {"status": "done"}


@pytest.mark.parametrize(
    ("run", "kinds", "rows", "attacked", "selected", "said"),
    [
        (DONE, ["weight_delta"], ROWS, None, True, {"Not attacked": 1, "oracle": 1, "reversed": 1,
                                                    "the weights": 0, "seed": 1, "features": 1, "no questions": 0}),
        (DONE, ["guard"], ROWS, None, False, {"Nothing was removed from the weights": 1, "features": 0}),
        (DONE, ["guard", "weight_delta"], ROWS, None, False, {"A part of this Erasure acts while": 1}),
        (DONE, ["weight_delta"], ROWS[:1], None, False, {"no questions were given": 1, "no texts": 0}),
        (DONE, ["weight_delta"], ROWS[1:], None, False, {"no texts": 1}),
        (DONE, ["weight_delta"], [], None, False, {"it was not measured": 1, "seed": 0}),
        ({"status": "failed"}, [], [], None, False, {"not recorded as done": 1, "reversed": 0}),
        (DONE, ["weight_delta"], ROWS, attacks(), False, {"Not attacked": 0, "larger budget": 1, "no oracle": 0}),
        (DONE, ["weight_delta"], ROWS, attacks(levels={}), False, {"no oracle beside it": 1, "(oracle) was": 1}),
        (DONE, ["weight_delta"], ROWS, attacks(attacks=[]), False, {"it was not attacked": 1}),
        (DONE, ["weight_delta"], ROWS, attacks(), False, {"it was hidden. The method overwrite": 1}),
        ({**DONE, "config": {"method": "overwrite"}}, ["weight_delta"], ROWS, attacks(), False, {"hidden": 0}),
        (DONE, ["weight_delta"], ROWS, attacks(headline={"recovered": 0.25}), False, {"hidden": 0}),
        (DONE, ["weight_delta"], ROWS, attacks(headline=None), False, {"hidden": 0}),
    ],
)  # fmt: skip
def test_claims_depend_on_what_was_measured(
    run: Any, kinds: list[str], rows: Any, attacked: Any, selected: bool, said: dict[str, int]
) -> None:
    claims = not_claimed(run, kinds, rows, read_attacks(attacked or {}, ID), selected, judged=False)
    assert {part: sum(part in c for c in claims) for part in said} == said


def test_a_judged_run_says_what_the_oracle_was_compared_on() -> None:
    claims = not_claimed(DONE, ["weight_delta"], ROWS, read_attacks(attacks(), ID), True, judged=True)
    assert sum("on the questions of the run and under attack" in c for c in claims) == 1


# --- the card travels --------------------------------------------------------------------------------------


def test_the_card_becomes_the_readme_of_a_merged_folder(llama: Any, tmp_path: Path) -> None:
    erasure: Erasure = make(llama)
    card = tmp_path / "model_card.md"
    card.write_text("# first")
    erasure.merge(llama.source, tmp_path / "merged", card=card)
    assert (tmp_path / "merged/README.md").read_text() == "# first"
    unmerge(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back/README.md").exists()  # it would tell of a removal that is undone
    (tmp_path / "merged/README.md").write_text("# mine")
    unmerge(tmp_path / "merged", tmp_path / "kept")
    assert (tmp_path / "kept/README.md").read_text() == "# mine"
    card.write_text("# second")
    erasure.merge(tmp_path / "merged", tmp_path / "twice", card=card, force=True)
    assert (tmp_path / "twice/README.md").read_text() == "# mine"
    erasure.merge(llama.source, tmp_path / "none", card=tmp_path / "no.md")
    assert not (tmp_path / "none/README.md").exists()
