"""Comparisons: whole ones, with processes that share the work or are killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparisons
import numpy as np
import pytest
from comparisons import PLAN, result_of, take_part
from micro import at_step, state

from saeunlearn import figures
from saeunlearn.errors import ConfigError, RunError
from saeunlearn.evaluation import frontier
from saeunlearn.evaluation.points import (
    LIMITS,
    PENALTY,
    point,
)
from saeunlearn.evaluation.tuning import JOURNAL, mend
from saeunlearn.locks import FileLock
from saeunlearn.methods import METHODS

# --- whole comparisons -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cheap_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "POLL", 0.05)
    for name in ("wreck", "other"):
        monkeypatch.setitem(METHODS, name, f"comparisons:{name.capitalize()}")


@pytest.fixture(scope="module")
def whole(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison carried out without interruption."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    with pytest.MonkeyPatch.context() as m:
        for name in ("wreck", "other"):
            m.setitem(METHODS, name, f"comparisons:{name.capitalize()}")
        take_part(checkpoints("llama"), out)
    return out


def trials_of(out: Path) -> dict[str, dict[str, Any]]:
    return {f.stem: json.loads(f.read_text()) for f in sorted((out / "trials").glob("*.json"))}


def test_every_method_has_the_same_number_of_trials_and_runs(whole: Path) -> None:
    result = json.loads((whole / "results.json").read_text())
    assert Counter(k.split("-")[0] for k in trials_of(whole)) == {"wreck": 4, "other": 4}
    assert {m: r["tuning"]["trials"] for m, r in result["methods"].items()} == {"wreck": 4, "other": 4}
    assert [(r["method"], r["case"], r["seed"]) for r in result["runs"]] == [
        (m, c, s) for m in ("wreck", "other") for c, s in (("b", 0), ("c", 1), ("b", 2))
    ]
    assert trials_of(whole)["wreck-000"]["settings"] == {"strength": 0.3, "where": 1}  # the defaults
    assert all(a["seed"] == 3 for t in trials_of(whole).values() for a in t["attempts"])  # no scoring seed
    assert result["plan"]["trials"] == 4
    assert result["versions"]["optuna"]


def test_the_best_trial_is_scored_and_failures_count_as_not_forgotten(whole: Path) -> None:
    result = json.loads((whole / "results.json").read_text())
    seen = 0
    for method, found in result["methods"].items():
        tried = [t for k, t in trials_of(whole).items() if k.startswith(method)]
        seen += (failed := sum(t["attempts"][0]["error"] is not None for t in tried))
        assert found["tuning"]["failed"] == failed
        points = [t["attempts"][0] for t in tried]
        values = [-9 if p["error"] else p["curve"][0]["forgetting"] - PENALTY * max(
            0, 0.95 - p["curve"][0]["retention"]) for p in points]  # fmt: skip
        assert found["chosen"]["trial"] == int(np.argmax(values))
        assert values[found["chosen"]["trial"]] >= values[0]
        for t, p in zip(tried, points):
            assert (t["settings"]["strength"] > comparisons.BREAKS) == (p["error"] is not None)
            if p["error"]:
                assert p["error"].startswith("NonFiniteError: the loss is nan")
                assert (p["curve"][0]["forgetting"], p["curve"][0]["retention"]) == (0, 1)
    assert seen, "no draw was strong enough to fail: choose another BREAKS"


def test_the_scores_of_a_run_are_those_of_its_answers(whole: Path) -> None:
    result = json.loads((whole / "results.json").read_text())
    for method, found in result["methods"].items():
        runs = [r for r in result["runs"] if r["method"] == method]
        for i, row in enumerate(runs):
            attempt = json.loads((whole / "scores" / f"{method}-{i}.json").read_text())["attempts"][0]
            sheet = frontier.read_sheet(whole / "cases" / row["case"] / "questions.json")
            assert len(sheet.ids) == 40
            assert all(len(i) == 16 for i in sheet.ids)
            assert row["forgetting"] == point(sheet, attempt["curve"][0]["values"])["forgetting"]
            assert all(p["retention"] < 0.99 for p in attempt["curve"][:-1])  # weaker only while the limit is broken
            for limit in LIMITS:
                kept = [p["forgetting"] for p in attempt["curve"] if p["retention"] >= limit]
                assert row[f"forgetting_at_{limit:g}"] == max(kept, default=0.0)
        scores = [r["forgetting"] for r in runs]
        said = found["scoring"]["forgetting"]
        assert (said["mean"], said["sd"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
        assert said["low"] <= said["mean"] <= said["high"]
        assert found["scoring"]["forgetting_at_0.99"]["mean"] <= found["scoring"]["forgetting_at_0.95"]["mean"]


def test_tables_and_figures(whole: Path) -> None:
    result = json.loads((whole / "results.json").read_text())
    lines = (whole / "table.md").read_text().splitlines()
    assert [x.split("|")[1].strip() for x in (lines[0], *sorted(lines[2:]))] == ["method", "other", "wreck"]
    tex = (whole / "table.tex").read_text()
    said = result["methods"]["wreck"]["scoring"]["retention"]
    for text in (tex, "\n".join(lines)):
        assert f"{said['mean']:.3f} [{said['low']:.3f}, {said['high']:.3f}]" in text
    assert [tex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert all(x.count(" & ") == 8 for x in tex.splitlines() if x.endswith(r"\\"))
    rows = list(csv.DictReader((whole / "points.csv").open()))
    assert Counter(r["phase"] for r in rows if r["strength"] == "1.0") == {"tune": 8, "score": 6}
    assert {"forget/seen", "near/seen"} <= set(rows[0])
    assert all((whole / f"{n}.png").stat().st_size > 5_000 for n in ("frontier", "constraints"))


def test_bars_stand_for_methods_and_limits() -> None:
    row = {"mean": 0.5, "low": 0.4, "high": 0.55, "runs": [0.45, 0.55]}
    fig = figures.bars_at_limits([{"method": m, "limit": x, **row} for m in ("b", "a") for x in LIMITS])
    ax = fig.axes[0]
    assert [p.get_width() for p in ax.patches] == [0.5] * 4
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["retention ≥ 0.99", "retention ≥ 0.95"]
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[0.4, 0.55], [0.45, 0.55]]
    assert [t.get_text() for t in figures.bars_at_limits([]).texts] == ["nothing was compared"]


@pytest.mark.slow
def test_what_is_finished_is_not_repeated(whole: Path, checkpoints: Any) -> None:
    before = state(whole / "trials", whole / "scores", whole / JOURNAL)
    again = take_part(checkpoints("llama"), whole, progress=at_step("wreck", lambda _: pytest.fail("ran again"), -1))
    assert state(whole / "trials", whole / "scores", whole / JOURNAL) == before
    assert again["runs"] == json.loads((whole / "results.json").read_text())["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 6, 10])
def test_an_interrupted_comparison_goes_on_and_ends_alike(
    whole: Path, checkpoints: Any, tmp_path: Path, stage: int
) -> None:
    count = [0]

    def interrupt(_: Any) -> None:
        count[0] += 1
        if count[0] == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_part(checkpoints("llama"), tmp_path / "out", progress=at_step("", interrupt, 0))
    take_part(checkpoints("llama"), tmp_path / "out")
    assert result_of(tmp_path / "out") == result_of(whole)


@pytest.mark.slow
def test_a_trial_that_was_finished_but_not_told_is_not_run_again(
    whole: Path, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(frontier.Trials, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            take_part(checkpoints("llama"), tmp_path / "out")
    first = tmp_path / "out" / "trials" / "wreck-000.json"
    before = state(first)
    take_part(checkpoints("llama"), tmp_path / "out")
    assert state(first) == before
    assert result_of(tmp_path / "out") == result_of(whole)


def test_a_folder_of_something_else_is_refused(whole: Path, checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="other settings or data"):
        take_part(checkpoints("llama"), whole, replace(PLAN, trials=5))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="no comparison"):
        take_part(checkpoints("llama"), tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    ({"trials": 0}, "0 trials"), ({"seeds": (0,)}, "at least as many seeds"), ({"seeds": (1, 1)}, "seeds"),
    ({"methods": ()}, "methods"), ({"score": ("a", "c")}, "scored where they were tuned"),
    ({"methods": ("wreck", "delta")}, "delta has no search space"), ({"methods": ("nonesuch",)}, "unknown method"),
    ({"settings": {"wreck": {"where": 9}}}, "outside its range"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_refused_before_work(
    checkpoints: Any, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        take_part(checkpoints("llama"), tmp_path / "out", replace(PLAN, **change))
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_a_torn_journal_is_mended(tmp_path: Path) -> None:
    file = tmp_path / "j"
    file.write_bytes(b'{"a":1}\n{"b":2}\n{"c"')
    mend(file)
    assert file.read_bytes() == b'{"a":1}\n{"b":2}\n'
    mend(file)
    assert file.read_bytes() == b'{"a":1}\n{"b":2}\n'
    mend(tmp_path / "none")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "x"), FileLock(tmp_path / "x")
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    first.release()
    assert second.acquire(wait=False)
    second.release()


# --- several processes -------------------------------------------------------------------------------------


def start(checkpoint: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    here = Path(comparisons.__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[1])])
    env = {**os.environ, "COMPARISON_LOG": str(log), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(here), str(checkpoint), str(out)], env=env)


def runs_in(log: Path) -> list[tuple[int, str]]:
    """(process, what it ran) in order."""
    rows = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
    return [(pid, json.dumps(rest)) for pid, *rest in rows]


@pytest.mark.slow
def test_two_processes_share_and_a_killed_one_is_replaced(whole: Path, checkpoints: Any, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    both = [start(checkpoints("llama"), out, log) for _ in range(2)]
    try:
        until = time.monotonic() + 120
        while len({pid for pid, _ in runs_in(log)}) < 2 or len(runs_in(log)) < 3:
            assert time.monotonic() < until
            assert all(p.poll() is None for p in both)
            time.sleep(0.01)
        victim, other = both
        last = [what for pid, what in runs_in(log) if pid == victim.pid][-1]
        victim.send_signal(signal.SIGKILL)
        victim.wait(10)
        assert other.wait(120) == 0
    finally:
        for p in both:
            p.kill()
    seen = Counter(what for _, what in runs_in(log))
    jobs = len(PLAN.methods) * (PLAN.trials + len(PLAN.seeds))
    assert len(seen) == jobs  # every job once …
    assert set(seen.values()) <= {1, 2}
    assert {what for what, n in seen.items() if n > 1} <= {last}  # … but what the killed one may have been at
    assert result_of(out) == result_of(whole)
