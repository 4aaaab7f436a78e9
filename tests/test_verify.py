"""Verification: an honest run passes, and whatever is changed in it is noticed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from micro import Finished, read

from saeunlearn import figures
from saeunlearn.cli import main
from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError, CorpusError, RunError
from saeunlearn.evaluation import again
from saeunlearn.evaluation.evaluate import compare, summarise_text
from saeunlearn.evaluation.metrics import Values
from saeunlearn.evaluation.removal import DERIVED, own_files
from saeunlearn.evaluation.report import write_report
from saeunlearn.pipeline import text_sets
from saeunlearn.progress import Progress
from saeunlearn.verify import changed_files, report_checks, verify

pytestmark = pytest.mark.slow  # all on a whole run


@pytest.fixture
def run(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(figures, "png_data_uri", lambda _fig: "data:image/png;base64,")  # drawing takes seconds
    return Path(shutil.copytree(finished.root, tmp_path / "run"))


def failed(checks: list[again.Check]) -> dict[str, str]:
    return {c["what"]: c["detail"] for c in checks if c["status"] == "fail"}


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    content = read(file)
    change(content)
    file.write_text(json.dumps(content))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all numbers in a JSON value."""
    if isinstance(value, dict | list):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(v, (*path, k))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def alter(value: Any, path: tuple[Any, ...]) -> None:
    for k in path[:-1]:
        value = value[k]
    value[path[-1]] += 0.25


def name_of(path: tuple[Any, ...]) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path).lstrip(".")


def data(run: Path) -> tuple[Corpus, dict[str, Corpus]]:
    config = read(run / "run.json")["config"]
    forget, retain = Corpus.load(config["forget"]), Corpus.load(config["retain"])
    return Corpus.load(config["questions"]), text_sets(forget, retain, {}, config["seed"])


# --- honest runs -------------------------------------------------------------------------------------------


def test_an_honest_run_passes_every_check(finished: Finished) -> None:
    checks = verify(finished.root, device="cpu", sample=12)
    assert {c["status"] for c in checks} == {"pass"}, checks
    said = {c["what"]: c["detail"] for c in checks}
    assert {f"{m} {when}, anew" for m in ("multiple choice", "cloze", "nll") for when in ("before", "after")} <= set(
        said
    )
    assert said["nll after, anew"].startswith("12 of ")
    assert said["files: sha256"] == f"{len(own_files(finished.root)) + len(DERIVED) - 1} files"


def test_data_that_moved(run: Path, tmp_path: Path) -> None:
    config = read(run / "run.json")["config"]
    gone = {n: str(tmp_path / "gone" / Path(config[n]).name) for n in ("model", "forget", "questions")}

    def move(content: Any) -> None:
        content["config"] |= gone
        content["key"] = hashlib.sha256(json.dumps(content["config"], sort_keys=True).encode()).hexdigest()

    rewrite(run / "run.json", move)
    write_report(run, include_text=False)
    checks = verify(run, device="cpu", sample=4)
    assert failed(checks) == {}
    open_ = {c["what"]: c["detail"] for c in checks if c["status"] == "not checkable"}
    for name in gone:
        assert gone[name] in open_[f"{name}: fingerprint"]
    assert "model" in open_["scores measured anew"]
    assert "chance and subgroups" in open_["evaluation.json: before, rest"]

    some = verify(run, {"model": config["model"]}, device="cpu", sample=4)
    assert failed(some) == {}
    assert {"multiple choice after, anew", "cloze after, anew"} <= {
        c["what"] for c in some if c["status"] == "not checkable"
    }
    everything = verify(run, {n: config[n] for n in gone}, device="cpu", sample=4)
    assert {c["status"] for c in everything} == {"pass"}


def test_other_inputs_are_not_taken_for_the_runs_own(run: Path) -> None:
    retain = read(run / "run.json")["config"]["retain"]
    bad = failed(verify(run, {"forget": retain}, device="cpu", sample=0))
    assert set(bad) == {"forget: fingerprint"}
    with pytest.raises(CorpusError):
        verify(run, {"forget": "./no.jsonl"}, device="cpu", sample=0)
    with pytest.raises(ConfigError, match="extra"):
        verify(run, texts={"extra": retain}, device="cpu", sample=0)
    with pytest.raises(ConfigError, match="sample"):
        verify(run, device="cpu", sample=-1)
    with pytest.raises(RunError, match=r"no run\.json"):
        verify(run / "erasure")


# --- tampering with files ----------------------------------------------------------------------------------


def test_a_changed_byte_in_any_file_is_caught(run: Path) -> None:
    doc = read(run / "report.json")
    assert changed_files(run, doc["files"], doc["pages"], Progress()) == []
    names = [*doc["files"], *doc["pages"]]
    assert set(names) == {f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file()} - {"report.json"}
    for name in names:
        raw = (run / name).read_bytes()
        (run / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert changed_files(run, doc["files"], doc["pages"], Progress()) == [f"{n} is changed" for n in names]
    assert "run.json" not in failed(report_checks(run, Progress()))  # and no traceback
    (run / names[0]).unlink()
    assert f"{names[0]} is gone" in changed_files(run, doc["files"], doc["pages"], Progress())


def test_a_file_that_the_report_does_not_know_is_caught(run: Path) -> None:
    (run / "erasure/more.txt").write_text("x")
    assert "erasure/more.txt is not in the report" in failed(report_checks(run, Progress()))["files: sha256"]
    (run / "erasure/more.txt").unlink()
    (run / "report.json").write_text("{")
    assert "damaged" in failed(report_checks(run, Progress()))["report.json"]


def test_a_changed_number_in_the_report_is_caught(run: Path) -> None:
    doc = read(run / "report.json")
    places = [p for p in leaves(doc)]
    assert len(places) > 150
    for place in random.Random(0).sample(places, 8):
        changed = copy.deepcopy(doc)
        alter(changed, place)
        (run / "report.json").write_text(json.dumps(changed))
        assert f"{name_of(place)} differs" in failed(report_checks(run, Progress()))["report.json: numbers"]
    for place in (("saeunlearn",), ("command",), ("not_claimed", 0), ("done", "method")):
        changed = copy.deepcopy(doc)
        inner: Any = changed
        for k in place[:-1]:
            inner = inner[k]
        inner[place[-1]] = "other"
        (run / "report.json").write_text(json.dumps(changed))
        assert name_of(place) in failed(report_checks(run, Progress()))["report.json: numbers"]


def test_every_number_of_the_evaluation_follows_from_the_values(run: Path) -> None:
    questions, sets = data(run)
    evaluation = read(run / "evaluation.json")
    known = again.evaluation_checks(evaluation, questions, sets, 0, False)
    assert failed(known) == {}
    result = evaluation["after"]
    aggregates = [p for p in leaves(result) if not {"values", "tokens"} & set(p)]
    assert len(aggregates) > 100
    changed = copy.deepcopy(result)
    for place in aggregates:
        alter(changed, place)
    problems, _ = again._derived(changed, questions, sets, False)
    for place in aggregates:
        where = place[1:] if place[0] == "groups" else place
        assert name_of(where) in problems
    places = [p for p in leaves(evaluation["comparison"])]
    for place in places:
        alter(evaluation["comparison"], place)
    again_ = compare(evaluation["before"], evaluation["after"], 0)
    assert {name_of(p) for p in places} <= set(again.differences(evaluation["comparison"], again_))
    # Without the data, what follows from the values alone is still checked.
    alter(evaluation["before"], ("groups", "near/seen", "cloze", "mean"))
    bad = failed(again.evaluation_checks(evaluation, None, {}, 0, False))
    assert "near/seen.cloze.mean" in bad["evaluation.json: before"]
    assert "comparison" in bad["evaluation.json: comparison"]


@pytest.mark.parametrize("broken", [{}, {"before": 3}, {"before": {"groups": {"x": {"cloze": {}}}, "texts": {}}}])
def test_a_broken_evaluation_fails_without_a_traceback(run: Path, broken: dict[str, Any]) -> None:
    (run / "evaluation.json").write_text(json.dumps(broken))
    bad = failed(verify(run, device="cpu", sample=2))
    assert {"files: sha256", "evaluation.json: before", "evaluation.json: comparison"} <= set(bad)


# --- tampering with everything that can be made to agree ---------------------------------------------------


def test_values_that_the_model_does_not_give_are_caught(run: Path) -> None:
    """Value, aggregates, comparison and report all rewritten: only measuring anew tells."""

    def forge(content: Any) -> None:
        text = content["after"]["texts"]["forget"]
        text["values"][3] += 2.0
        again_ = summarise_text("forget", text["ids"], Values("nll", text["values"], [], text["tokens"]))
        content["after"]["texts"]["forget"] = {**text, **again_}
        content["comparison"] = compare(content["before"], content["after"], 0)

    rewrite(run / "evaluation.json", forge)
    write_report(run, include_text=False)
    bad = failed(verify(run, device="cpu", sample=10_000))
    assert set(bad) == {"nll after, anew"}
    assert read(run / "evaluation.json")["after"]["texts"]["forget"]["ids"][3] in bad["nll after, anew"]


def test_answers_that_the_model_does_not_give_are_caught(run: Path) -> None:
    def forge(content: Any) -> None:
        m = content["after"]["groups"]["forget/seen"]["multiple_choice"]
        m["values"] = [0] * m["n"]

    assert sum(read(run / "evaluation.json")["after"]["groups"]["forget/seen"]["multiple_choice"]["values"])
    rewrite(run / "evaluation.json", forge)
    bad = failed(verify(run, device="cpu", sample=10_000))
    assert {"multiple choice after, anew", "evaluation.json: after", "files: sha256"} <= set(bad)
    assert "multiple choice before, anew" not in bad


def test_another_erasure_is_caught(run: Path) -> None:
    payload = next((run / "erasure").glob("part-*.safetensors"))
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    write_report(run, include_text=False)
    bad = failed(verify(run, device="cpu", sample=2))
    assert "sha256" in bad["erasure: payloads and id"]
    payload.write_bytes(whole)
    erasure = Erasure.load(run / "erasure")
    weaker = [replace(p, right=0.2 * p.right) for p in erasure.parts]  # type: ignore[type-var]
    Erasure(weaker, erasure.manifest).save(run / "erasure")
    write_report(run, include_text=False)
    bad = failed(verify(run, device="cpu", sample=4))
    assert "nll after, anew" in bad
    assert "nll before, anew" not in bad


# --- the verb ----------------------------------------------------------------------------------------------


def test_the_verb_prints_the_checks_and_its_status_tells(run: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["verify", str(run), "--device", "cpu", "--sample", "2", "--out", str(tmp_path / "checks.json")]
    assert main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    checks = read(tmp_path / "checks.json")["checks"]
    assert out[-1] == f"{len(checks)} pass"
    for line, c in zip(out, checks, strict=False):
        assert line.split("  ")[0].strip() == c["status"]
        assert c["what"] in line
    (run / "events.jsonl").write_text("")
    assert main(argv) == 1
    said = capsys.readouterr()
    assert "1 fail" in said.out
    assert "events.jsonl is changed" in said.out
    assert said.err.startswith("saeunlearn: VerificationError: ")
    assert main(["verify", str(tmp_path)]) == 1
