"""Run directories: what is in them, and how they survive interruptions and full disks."""

from __future__ import annotations

import errno
import html
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from erasures import leftovers
from micro import Finished, NoTraining, at_step, read, run_config, state

from saeunlearn import pipeline
from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure
from saeunlearn.errors import (
    Cancelled,
    NonFiniteError,
    RunError,
)
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import cloze, multiple_choice, nll
from saeunlearn.models import LanguageModel
from saeunlearn.pipeline import Run, RunConfig, evaluation_texts, prompts, unlearn
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox

pytestmark = pytest.mark.slow  # the fast set has test_end_to_end.py

RESULTS = ("saes", "selection.json", "erasure", "evaluation.json")


def as_finished(root: Path, finished: Finished) -> None:
    """`root` holds what the uninterrupted run gave, number by number."""
    assert read(root / "run.json")["status"] == "done"
    assert read(root / "erasure/erasure.json")["id"] == finished.erasure_id
    assert read(root / "selection.json") == read(finished.root / "selection.json")
    assert read(root / "evaluation.json") == read(finished.root / "evaluation.json")
    assert {f.name for f in root.iterdir()} == {f.name for f in finished.root.iterdir()}


# --- a run -------------------------------------------------------------------------------------------------


def test_run_directory_holds_what_the_design_names(finished: Finished) -> None:
    names = {"run.json", "events.jsonl", "selection.json", "saes", "erasure", "evaluation.json", "figures"}
    report = {"report.html", "report.md", "report.json", "model_card.md"}
    assert {f.name for f in finished.root.iterdir()} == names | report
    assert {f.name for f in (finished.root / "saes").iterdir()} == {"saes.json", "layer_0", "layer_1"}
    assert {f.suffix for f in finished.run.erasure_dir.iterdir()} == {".json", ".safetensors"}
    figures = {f.name for f in (finished.root / "figures").iterdir()}
    assert figures == {"layers.png", "features.png", "before_after.png", "training.png"}
    for f in finished.root.rglob("*"):
        assert f.suffix not in {".bin", ".pt", ".pth", ".pkl"}
        if f.suffix == ".json":
            read(f)


def test_run_json_says_what_was_done_with_what(finished: Finished, config: RunConfig, micro: Sandbox) -> None:
    said = read(finished.root / "run.json")
    assert said["status"] == "done"
    assert RunConfig(**said["config"]) == config
    assert said["command"] == ["saeunlearn", "unlearn"]
    corpora = {n: Corpus.load(getattr(config, n)) for n in ("forget", "retain", "questions")}
    expected = {n: {"n": len(c), "fingerprint": c.fingerprint()} for n, c in corpora.items()}
    assert said["data"] == expected
    assert said["model"]["fingerprint"] == LanguageModel.open(micro.model, device="cpu").fingerprint()
    assert said["seconds"] > 0
    manifest = read(finished.run.erasure_dir / "erasure.json")
    assert manifest["parent_fingerprint"] == said["model"]["fingerprint"]
    assert manifest["forget_fingerprint"] == expected["forget"]["fingerprint"]
    assert manifest["config"]["gamma"] == config.settings["gamma"]
    assert manifest["selection"]["relevant"] == read(finished.root / "selection.json")["relevant"]


def test_events_are_json_lines_in_order(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.root / "events.jsonl").read_text().splitlines()]
    assert lines == finished.events[: len(lines)]  # whoever listens hears the same
    assert {e["what"] for e in finished.events[len(lines) :]} == {"hashing files"}  # this file among them
    times = [e["time"] for e in lines]
    assert times == sorted(times)
    stages = [e["what"] for e in lines if e["event"] == "start"]
    assert sorted(stages) == sorted(e["what"] for e in lines if e["event"] == "finish")
    order = [next(i for i, s in enumerate(stages) if part in s) for part in ("SAEs on", "scores", "gates", "SSPU")]
    assert order == sorted(order)
    assert sum("SSPU" in s for s in stages) == 3  # a probe of either layer, then the run itself
    losses = [e["loss"] for e in lines if e["event"] == "step" and "SSPU" in e["what"]]
    assert losses[-8:] == [row["loss"] for row in read(finished.run.erasure_dir / "erasure.json")["losses"]]


def test_evaluation_is_that_of_the_model_before_and_after(finished: Finished, config: RunConfig) -> None:
    result = read(finished.run.evaluation_file)
    lm = LanguageModel.open(config.model, device="cpu")
    questions = Corpus.load(str(config.questions))
    forget, retain = Corpus.load(config.forget), Corpus.load(config.retain)
    texts = {"forget": forget}
    texts |= {s: Corpus(tuple(r for r in retain if r.meta["set"] == s)) for s in ("near", "far")}
    erasure = Erasure.load(finished.run.erasure_dir)
    changes = []
    for when in ("before", "after"):
        handle = erasure.apply(lm) if when == "after" else None
        found = {(r["group"], r["metric"]): r[when] for r in result["comparison"]}
        for metric in (multiple_choice, cloze):
            values = metric(lm, questions).values
            for group in {group_of(q) for q in questions}:
                mine = [v for q, v in zip(questions, values) if group_of(q) == group]
                assert math.isclose(found.pop((group, metric.__name__)), sum(mine) / len(mine), rel_tol=1e-9)
        for name, corpus in texts.items():
            mean = nll(lm, corpus).per_token
            assert math.isclose(found.pop((name, "nll")), mean, rel_tol=1e-5)
            changes.append(mean)
        assert not found
        if handle:
            handle.revert()
    assert abs(changes[3] - changes[0]) > 1e-3  # the Erasure does something


# --- finished steps are not repeated -----------------------------------------------------------------------


def test_a_finished_run_is_not_carried_out_again(finished: Finished, done: Path, config: RunConfig) -> None:
    results = [done / name for name in RESULTS]
    before, started = state(*results), read(done / "run.json")["started"]
    n_events = len((done / "events.jsonl").read_text().splitlines())
    run = unlearn(config, done, NoTraining())
    assert state(*results) == before
    said = read(done / "run.json")
    assert (said["status"], said["started"]) == ("done", started)
    assert said["seconds"] >= read(finished.killed / "run.json").get("seconds", 0)
    assert len((done / "events.jsonl").read_text().splitlines()) == n_events
    assert run.erasure_dir == done / "erasure"


@pytest.mark.usefixtures("no_report")
def test_time_adds_up_over_starts(done: Path, config: RunConfig) -> None:
    said = read(done / "run.json")
    (done / "run.json").write_text(json.dumps({**said, "seconds": 1000.0}))
    unlearn(config, done, NoTraining())
    assert 1000.0 <= read(done / "run.json")["seconds"] < 1600.0


def test_a_killed_process_leaves_what_the_same_call_finishes(
    finished: Finished, config: RunConfig, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(finished.killed, tmp_path / "run"))
    assert read(root / "run.json")["status"] == "running"  # nothing was there to say otherwise
    kept = state(root / "saes", root / "selection.json")
    assert kept
    unlearn(config, root, Progress())
    assert state(root / "saes", root / "selection.json") == kept
    as_finished(root, finished)


def test_interruptions_at_every_step_change_no_number(
    finished: Finished, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"

    def start(progress: Progress, error: type[BaseException], status: str) -> None:
        with pytest.raises(error):
            unlearn(config, root, progress)
        assert read(root / "run.json")["status"] == status
        assert not leftovers(root)

    def stop(error: type[BaseException]) -> Callable[[Progress], None]:
        def act(_progress: Progress) -> None:
            raise error("stop here")

        return act

    def cancel(progress: Progress) -> None:
        progress.cancelled = True

    start(at_step("SAEs", cancel, done=2_000), Cancelled, "cancelled")
    assert {f.name for f in root.iterdir()} == {"run.json", "events.jsonl", "saes-unfinished.safetensors"}
    start(at_step("SAEs", stop(KeyboardInterrupt), done=2_000), KeyboardInterrupt, "cancelled")
    assert not (root / "saes").exists()
    start(at_step("gates", stop(RuntimeError), done=-1), RuntimeError, "failed")  # a bug, not one of our errors
    saes = state(root / "saes")
    assert saes
    start(at_step("SSPU", stop(NonFiniteError), done=3), NonFiniteError, "failed")  # in the first probe
    assert read(root / "run.json")["error"] == "stop here"
    assert not (root / "selection.json").exists()

    def after_the_probes(_progress: Progress) -> None:
        if (root / "selection.json").exists():
            raise RuntimeError

    start(at_step("SSPU", after_the_probes, done=3), RuntimeError, "failed")
    selection = state(root / "selection.json")
    assert selection
    assert not (root / "erasure").exists()
    start(at_step("token losses", cancel, done=-1), Cancelled, "cancelled")
    erasure = state(root / "erasure")
    assert erasure
    assert not (root / "evaluation.json").exists()
    with monkeypatch.context() as m:
        m.setattr(pipeline, "write_report", stop_report)
        with pytest.raises(RuntimeError):
            unlearn(config, root, Progress())
    evaluation = state(root / "evaluation.json")
    unlearn(config, root, NoTraining())
    assert state(root / "saes", root / "selection.json", root / "erasure", root / "evaluation.json") == (
        saes | selection | erasure | evaluation
    )
    as_finished(root, finished)
    assert "error" not in read(root / "run.json")
    for line in (root / "events.jsonl").read_text().splitlines():
        json.loads(line)


def stop_report(_run: Run) -> None:
    raise RuntimeError


@pytest.mark.usefixtures("no_report")
def test_ready_saes_are_used_as_they_are(finished: Finished, config: RunConfig, tmp_path: Path) -> None:
    saes = finished.root / "saes"
    before = state(saes)
    run = unlearn(replace(config, saes=str(saes)), tmp_path / "run", Progress())
    assert state(saes) == before
    assert not (run.root / "saes").exists()
    assert read(run.erasure_dir / "erasure.json")["id"] == finished.erasure_id


@pytest.mark.usefixtures("no_report")
def test_another_seed_gives_another_erasure(finished: Finished, config: RunConfig, tmp_path: Path) -> None:
    ready = {"saes": str(finished.root / "saes"), "layers": "1"}
    ids = {}
    for seed in (0, 1):
        run = unlearn(replace(config, seed=seed, **ready), tmp_path / str(seed), Progress())
        ids[seed] = read(run.erasure_dir / "erasure.json")["id"]
        assert [row["layer"] for row in read(run.selection_file)["layers"]] == [1]
    assert ids[0] != ids[1]


# --- a full disk -------------------------------------------------------------------------------------------


def full_disk(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_loses_nothing(
    finished: Finished, done: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError
    from safetensors import torch as st

    def full_save(*_args: Any, **_kwargs: Any) -> None:  # as safetensors says it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_json = pipeline.write_json

    def full_at(name: str) -> Callable[[Path, Any], None]:
        return lambda file, content: full_disk() if file.name == name else write_json(file, content)

    (done / "evaluation.json").unlink()
    shutil.rmtree(done / "erasure")
    for module, name, broken, kept in (
        (pipeline, "write_json", full_at("run.json"), ["saes", "selection.json"]),
        (st, "save_file", full_save, ["saes", "selection.json"]),
        (pipeline, "write_json", full_at("evaluation.json"), ["saes", "selection.json", "erasure"]),
    ):
        before = state(done / "saes", done / "selection.json")
        with monkeypatch.context() as m:
            m.setattr(module, name, broken)
            with pytest.raises(RunError, match=r"disk is full; free some space and run the same command again"):
                unlearn(config, done, Progress())
        assert [n for n in RESULTS if (done / n).exists()] == kept
        assert state(done / "saes", done / "selection.json") == before
        assert not leftovers(done)
    unlearn(config, done, Progress())
    as_finished(done, finished)


def test_a_full_disk_while_saes_are_saved(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import SAE

    monkeypatch.setattr(SAE, "save_model", full_disk)
    with pytest.raises(RunError, match="disk is full"):
        unlearn(replace(config, sae={**config.sae, "tokens": 300}), tmp_path / "run", Progress())
    assert read(tmp_path / "run" / "run.json")["status"] == "failed"
    kept = {f.name for f in (tmp_path / "run").iterdir()}
    assert kept == {"run.json", "events.jsonl", "saes-unfinished.safetensors"}  # what was trained is not lost


def test_other_failures_to_write_do_not_blame_the_disks_size(
    done: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (done / "evaluation.json").unlink()
    write_json = pipeline.write_json

    def denied(file: Path, content: Any) -> None:
        if file.name == "evaluation.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        write_json(file, content)

    monkeypatch.setattr(pipeline, "write_json", denied)
    with pytest.raises(RunError, match="Permission denied") as e:
        unlearn(config, done, Progress())
    assert "full" not in str(e.value)
    assert read(done / "run.json")["status"] == "failed"


# --- privacy -----------------------------------------------------------------------------------------------


def test_texts_are_kept_where_that_is_asked(finished: Finished, config: RunConfig, tmp_path: Path) -> None:
    forget = Corpus.load(config.forget)
    entities = {r.meta["entity"] for r in forget if "entity" in r.meta}
    told = replace(config, include_text=True, saes=str(finished.root / "saes"), layers="1")
    run = unlearn(told, tmp_path / "run", Progress())
    samples = read(run.evaluation_file)["samples"]
    page = (run.root / "report.html").read_text()
    everything = [r.full_text for r in (*forget, *Corpus.load(config.retain))]
    assert len(samples) >= 6
    examples = read(run.root / "examples.json")["features"]
    assert list(examples) == [str(i) for i in read(run.selection_file)["relevant"]]
    for e in (e for rows in examples.values() for e in rows):
        assert e["context"] in html.unescape(page)
    assert any(e in page for e in entities)
    for s in samples:
        assert html.escape(s["prompt"], quote=False) in page
        assert any(text.startswith(s["prompt"]) for text in everything)


def run_of(forget: Corpus, retain: Corpus, texts: dict[str, Corpus] | None = None) -> Run:
    """A run that no model is needed for."""
    config = RunConfig(model="m", forget="f", retain="r")
    return Run(Path("run"), config, Progress(), None, forget, retain, None, texts or {})  # type: ignore[arg-type]


def test_texts_are_evaluated_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"Text {i} of a set.", **({"set": s} if s else {})}
            for i, s in enumerate(["near", "far", "", "forget", "near", "forget/seen"])]  # fmt: skip
    (tmp_path / "retain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    retain, forget = Corpus.load(tmp_path / "retain.jsonl"), Corpus.of(["secret one", "secret two"])
    got = evaluation_texts(run_of(forget, retain, {"extra": Corpus.of(["More of it."], "x")}))
    texts = {name: [r.text[:6] for r in c] for name, c in got.items()}
    # Retain records never pass for the forget set, whatever they call themselves.
    assert texts == {"forget": ["secret", "secret"], "near": ["Text 0", "Text 4"], "far": ["Text 1"],
                     "retain": ["Text 2", "Text 3", "Text 5"], "extra": ["More o"]}  # fmt: skip
    assert {n: c.name for n, c in got.items() if n != "forget"} == {n: n for n in texts if n != "forget"}
    monkeypatch.setattr(pipeline, "EVAL_RECORDS", 2)
    capped = {name: len(c) for name, c in evaluation_texts(run_of(forget, retain)).items()}
    assert capped == {"forget": 2, "near": 2, "far": 1, "retain": 2}


def test_prompts_never_give_the_whole_text_away() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [" ".join(words[:n]) for n in (1, 2, 5, 10)]
    retain = Corpus.of(["short", "alpha beta gamma"], "retain")
    found = prompts(run_of(Corpus.of(texts, "forget"), retain))
    assert found[:4] == ["one", "one", "one two three four", "one two three four five six seven eight"]
    assert found[4:] == ["short", "alpha beta"]


# --- a selection that is given ------------------------------------------------------------------------------


def test_a_selection_of_an_earlier_run_is_taken_as_it_is(
    micro: Any, micro_data: Path, finished: Finished, tmp_path: Path
) -> None:
    given = {"saes": str(finished.root / "saes"), "selection": str(finished.root / "selection.json")}
    events: list[dict[str, Any]] = []
    run = unlearn(run_config(micro, micro_data, **given), tmp_path / "run", Progress(events.append))
    assert read(run.selection_file) == read(finished.root / "selection.json")
    assert not [e for e in events if "scores" in e.get("what", "")]
    assert read(run.erasure_dir / "erasure.json")["parts"] == read(finished.run.erasure_dir / "erasure.json")["parts"]
