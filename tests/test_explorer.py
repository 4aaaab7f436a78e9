"""The explorer's pieces, without a browser: escaping, drawings, the overview, the run in a thread, refusals."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rundirs import fill, visible
from saeunlearn_explorer import jobs, pieces
from saeunlearn_explorer.frontier import frontier, points
from saeunlearn_explorer.jobs import Jobs, LiveProgress
from saeunlearn_explorer.pieces import chip, histogram, note, number, table, tokens, whiskers
from saeunlearn_explorer.state import Explorer, document, safely, whole
from saeunlearn_explorer.views import compare, steer
from saeunlearn_explorer.views.erase import configured
from saeunlearn_explorer.views.overview import overview, pictures

from saeunlearn import figures
from saeunlearn.errors import ConfigError, RunError
from saeunlearn.pipeline import RunConfig
from saeunlearn.progress import Progress

EVIL = '<img src=x onerror=alert(1)>"&{{value}}${1+1}'


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


def test_everything_is_escaped() -> None:
    parts = [note(EVIL), table([EVIL], [[EVIL]], label=EVIL), tokens([EVIL], [1.0]), chip(EVIL, 1.0),
             pieces.cards([(EVIL, EVIL, EVIL, "forget")]), pieces.pairs([(EVIL, EVIL)]), pieces.fold(EVIL, EVIL),
             histogram([0, 1], [3], EVIL), pieces.bar(0.5, EVIL),
             compare.answers([{"text": EVIL, "probability": 0.5}], [{"text": EVIL, "probability": 0.2}], False),
             compare.lens([{"layer": 0, "tokens": [[{"token": EVIL, "probability": 0.5}]]}], [EVIL])]  # fmt: skip
    for part in parts:
        assert "<img" not in part
        assert "&lt;img" in part
        assert '"&' not in part.replace('"&lt;', "")  # no attribute is left by a quotation mark of the text


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (float("nan"), "–"), (0, "0"), (12345, "12,345"), (0.00042, "0.00042"), (1.5, "1.500"),
     (-0.02, "-0.02")],
)  # fmt: skip
def test_numbers_for_reading(value: Any, said: str) -> None:
    assert number(value) == said


def test_tokens_are_shaded_by_their_share_of_the_largest() -> None:
    shares = re.findall(r"--s:([\d.]+)", tokens(["a", "b", "c", "d"], [2.0, -1.0, None, 0.0]))
    assert shares == ["1.00", "0.50", "0.00", "0.00"]
    marked = tokens(["a", "b"], [2.0, -1.0], at=1)
    assert marked.count('class="t"') == 1
    assert 'class="t down at"' in marked  # colour is never the only sign


def test_whiskers_put_values_in_order() -> None:
    drawn = whiskers({"before": 1.0, "after": 0.25, "before_low": 0.9, "before_high": 1.0, "after_low": 0.2,
                      "after_high": 0.3, "chance": 0.25}, 0.0, 1.0, "forget")  # fmt: skip
    at = {k: float(re.search(p, drawn).group(1)) for k, p in  # type: ignore[union-attr]
          (("before", r'cx="([\d.]+)"'), ("after", r'd="M([\d.]+)'), ("chance", r'"chance" x1="([\d.]+)'))}  # fmt: skip
    assert at["before"] == pytest.approx(pieces.WIDE - 6)
    assert at["after"] == at["chance"] == pytest.approx(6 + 0.25 * (pieces.WIDE - 12), abs=0.06)


def test_overview_shows_the_numbers_of_the_run(run_dir: Path) -> None:
    said = visible(str(overview(Explorer(run_dir))))
    rows = json.loads((run_dir / "evaluation.json").read_text())["comparison"]
    for row in rows:
        assert row["group"] in said
        if row["metric"] != "nll":
            assert f"{row['after']:.1%}" in said
            assert f"{row['after_low']:.1%} … {row['after_high']:.1%}" in said
    assert "not attacked" in said
    assert "layer 1, 2 relevant features" in said
    assert "f" * 16 in said  # the forget set by its fingerprint
    assert "f" * 64 not in said


def test_attacks_are_shown_with_their_intervals(run_dir: Path) -> None:
    manifest = json.loads((run_dir / "erasure" / "erasure.json").read_text())
    (run_dir / "erasure" / "erasure.json").write_text(json.dumps({**manifest, "id": "0" * 64}))
    best = {"settings": {}, "accuracy": 0.8, "low": 0.7, "high": 0.9, "recovered": 0.73, "recovered_low": 0.61,
            "recovered_high": 0.85, "oracle_accuracy": 0.31}  # fmt: skip
    content = {"erasure_id": "0" * 64, "metric": "accuracy", "levels": {}, "questions": {"n": 40},
               "attacks": [{"name": "relearn-lora", "kind": "weights", "best": best, "tried": [{}]}],
               "headline": {"attack": "relearn-lora", "recovered": 0.73, "low": 0.61, "high": 0.85}}  # fmt: skip
    (run_dir / "attacks.json").write_text(json.dumps(content))
    said = visible(str(overview(Explorer(run_dir))))
    for part in ("73.0%", "61.0% … 85.0%", "relearn-lora", "80.0%", "31.0%"):
        assert part in said
    assert "another Erasure" not in said
    (run_dir / "attacks.json").write_text(json.dumps({**content, "erasure_id": "1" * 64}))
    said = visible(str(overview(Explorer(run_dir))))
    assert "made on another Erasure" in said
    assert "Recovered by the worst attack" not in said


def test_overview_of_a_run_that_failed_says_so(run_dir: Path) -> None:
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**info, "status": "failed"}))
    (run_dir / "evaluation.json").unlink()
    said = visible(str(overview(Explorer(run_dir))))
    assert "status: failed" in said
    assert "Missing: evaluation.json: not there" in said


def test_frontier_has_the_original_and_every_comparable_run(run_dir: Path, tmp_path: Path) -> None:
    doc = document(run_dir)
    other = {**doc, "headlines": [{**h, "metric": "cloze"} for h in doc["headlines"]]}
    found = points({"this run": doc, "other metric": other, "nothing": {**doc, "headlines": []}})
    assert [p["name"] for p in found] == ["original", "this run"]
    forget, retain = (next(h for h in doc["headlines"] if h["forget"] == side) for side in (True, False))
    assert found[1]["x"][0] == retain["after"]
    assert found[1]["y"][0] == forget["after"]
    assert found[0]["y"][0] == forget["before"]


def test_pictures_are_those_of_the_library(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def keep(name: str) -> None:
        real = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *args, **kw: (drawn.update({name: (args, kw)}), real(*args, **kw))[1])

    keep("frontier")
    keep("layer_table")
    made = str(pictures(Explorer(run_dir)))
    assert made.count('<img class="picture"') == 2
    (given,), axes = drawn["frontier"]
    doc = document(run_dir)
    retain = next(h for h in doc["headlines"] if not h["forget"])
    assert [p["series"] for p in given] == ["original", "run (this run)"]
    assert given[1]["x"] == retain["after"]
    assert given[1]["x_err"] == (retain["after"] - retain["after_low"], retain["after_high"] - retain["after"])
    assert "right is better" in axes["retain"]
    assert "down is better" in axes["forget"]
    assert drawn["layer_table"][0][0] == json.loads((run_dir / "selection.json").read_text())["layers"]
    (run_dir / "selection.json").unlink()
    assert "chose no layer" in str(pictures(Explorer(run_dir)))


def test_of_losses_the_frontier_says_the_other_way(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doc = document(run_dir)
    losses = {**doc, "headlines": [{**h, "metric": "NLL", "before": 1.0, "after": 2.0} for h in doc["headlines"]]}
    said: dict[str, Any] = {}
    monkeypatch.setattr(figures, "frontier", lambda _points, **kw: (said.update(kw), figures.layer_table([]))[1])
    frontier({"run": losses})
    assert "left is better" in said["retain"]
    assert "up is better" in said["forget"]


def test_a_run_that_is_gone_or_replaced_is_said(run_dir: Path, tmp_path: Path) -> None:
    app = Explorer(run_dir)
    filled = safely(lambda: str(overview(app)), 1)
    assert filled()[0] == ""
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**info, "key": "another"}))
    assert "another run by now" in filled()[0]
    (run_dir / "run.json").unlink()
    assert "holds no run" in filled()[0]
    assert 'role="alert"' in filled()[0]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"config": 3}'])
def test_no_run_directory_is_refused(tmp_path: Path, content: str) -> None:
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=re.escape(str(tmp_path))):
        Explorer(tmp_path)


def test_choice_of_features() -> None:
    assert steer.choice(("3", "scale", 0, "", "clamp", 4, " 7 ", "clamp", 2.5)) == {
        3: {"scale": 0.0},
        7: {"clamp": 2.5},
    }
    with pytest.raises(ConfigError, match="choose a feature"):
        steer.choice(("", "scale", 0))
    with pytest.raises(ConfigError, match="twice"):
        steer.choice(("3", "scale", 0, "3", "clamp", 1))
    with pytest.raises(ConfigError, match="whole number"):
        steer.choice(("three", "scale", 0))


@pytest.mark.parametrize("value", ["", None, "x", "1.5", float("inf"), float("nan"), [], {}])
def test_whole_numbers_only(value: Any) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        whole(value, "it")


def test_the_form_becomes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = RunConfig(model="m", forget="f.jsonl", retain="r.jsonl", questions="q.jsonl", select={"k": 4}, seed=3)
    run, home = tmp_path / "run", tmp_path / "home"
    (run / "saes").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"key": own.key(), "config": asdict(own)}))
    (run / "selection.json").write_text("{}")
    (run / "saes" / "saes.json").write_text("{}")
    monkeypatch.setenv("SAEUNLEARN_HOME", str(home))
    app = Explorer(run)
    same = configured(app, [None, None, None], "rmu", "", "", "0.05", 7, "lr=0.1\n\n weights=all ", True)
    assert same == replace(own, method="rmu", settings={"lr": 0.1, "weights": "all", "max_retain_rise": 0.05},
                           seed=7, saes=str(run / "saes"), selection=str(run / "selection.json"),
                           include_text=True)  # fmt: skip
    chosen = configured(app, [None, None, None], "rmu", "2", "8", "", 0, "", False)
    assert (chosen.select, chosen.selection) == ({"k": 8, "layer": 2}, None)  # other features: select anew
    upload = tmp_path / "mine.jsonl"
    upload.write_text('{"text": "a secret"}')
    other = configured(app, [str(upload), None, None], "rmu", "", "", "", 0, "", False)
    assert Path(other.forget).parents[1] == home / "uploads"
    assert Path(other.forget).read_text() == upload.read_text()
    assert (other.retain, other.questions, other.selection) == ("r.jsonl", None, None)
    for wrong, said in (({"layer": "two"}, "whole number"), ({"rise": "much"}, "must be a number"),
                        ({"lines": "lr"}, "NAME=VALUE"), ({"seed": None}, "seed")):  # fmt: skip
        given: dict[str, Any] = {"layer": "", "k": "", "rise": "", "seed": 0, "lines": "", "keep": False, **wrong}
        with pytest.raises(ConfigError, match=said):
            configured(app, [None, None, None], "rmu", **given)
    with pytest.raises(RunError, match="upload one of"):
        configured(app, [str(tmp_path / "x.exe"), None, None], "rmu", "", "", "", 0, "", False)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../up", ".hidden", "x" * 80, "original", "sspu"])
def test_names_that_cannot_be(run_dir: Path, name: str) -> None:
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**info, "config": {"method": "sspu"}}))
    with pytest.raises(ConfigError, match="name"):
        Explorer(run_dir).free_name(name)
    assert Explorer(run_dir).free_name("mine-2") == "mine-2"


# --- the run in a thread -----------------------------------------------------------------------------------


def wait(job: jobs.Job) -> None:
    end = time.monotonic() + 10
    while job.status == "running" and time.monotonic() < end:
        time.sleep(0.01)


def test_one_run_at_a_time_and_only_its_owner_cancels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def endless(config: Any, root: Path, progress: Progress) -> None:
        progress.start("steps", 1000)
        while True:
            progress.step(loss=1.0)
            time.sleep(0.005)

    monkeypatch.setattr("saeunlearn.pipeline.unlearn", endless)
    all_jobs, config = Jobs(), Any
    first = all_jobs.start(config, tmp_path, "first")
    with pytest.raises(RunError, match="one at a time"):
        all_jobs.start(config, tmp_path, "second")
    with pytest.raises(RunError, match="no run of yours"):
        all_jobs.cancel("somebody else's")
    assert first.status == "running"
    all_jobs.cancel(first.id)
    wait(first)
    assert first.status == "cancelled"
    assert first.progress.figures == {"loss": 1.0}
    assert 0 < first.progress.done < 1000
    assert all_jobs.running() is None


def test_a_run_that_fails_says_why_and_makes_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    ran = threading.Event()

    def fails(config: Any, root: Path, progress: Progress) -> None:
        raise config

    monkeypatch.setattr("saeunlearn.pipeline.unlearn", fails)
    all_jobs = Jobs()
    for error, traced in ((ConfigError("no such setting"), False), (ZeroDivisionError("a mistake"), True)):
        job = all_jobs.start(error, tmp_path, "x", lambda job: ran.set())  # type: ignore[arg-type]
        wait(job)
        assert job.status == "failed"
        assert str(error) in job.error
        assert ("Traceback" in capsys.readouterr().err) == traced
    assert not ran.is_set()


def test_live_progress_knows_the_pace() -> None:
    p = LiveProgress()
    p.start("steps", 4)
    assert p.seconds_left() is None
    p.since -= 3.0
    p.step()
    assert p.share() == 0.25
    assert p.seconds_left() == pytest.approx(9.0, abs=0.5)
    for i in range(20):
        p.note(str(i))
    assert p.notes[-1] == "19"
    assert len(p.notes) == jobs.NOTES
