"""The report: holds what the JSON says, no text unless asked, nothing from outside, and never crashes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rundirs import SECRET, fill, visible

from saeunlearn import figures
from saeunlearn.errors import RunError
from saeunlearn.evaluation.report import write_report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    fill(tmp_path)
    return tmp_path


def test_the_report_says_what_was_done_and_found(run_dir: Path) -> None:
    page = write_report(run_dir, include_text=False)
    assert page == run_dir / "report.html"
    text = visible(page.read_text())
    for said in (
        "forget 48 " + "f" * 64,
        "questions 16 " + "c" * 64,
        "method sspu",
        "K / d 2 / 32 = 0.062",
        "seed 7",
        "12.500% (4,096)",
        "model.layers.{0,1}.mlp.down_proj.weight",
        "subspace.off_share_dW 0.0123",
        "gamma 2.5",
        "blocks 0, 1",
        "87.5% → 25.0%",  # the forget card
        "not told apart from chance (25%)",
        "100.0% → 87.5%",  # the retain card
        "-62.5",
        "towns × mayor: 87.5% (n = 4)",
        "bbbbbbbbbbbbbbbb 2 2",  # worst retain text: NLL before and after
        "not attacked",
        "as sensitive as the original model",
        "handle.revert()",
        "torch 2.13.0",
    ):
        assert said in text, said
    assert {p.name for p in (run_dir / "figures").iterdir()} == {
        f"{n}.png" for n in ("layers", "features", "before_after", "training")
    }


def test_no_text_unless_asked(run_dir: Path) -> None:
    page = write_report(run_dir, include_text=False).read_text()
    assert SECRET not in page
    assert "--include-text" in page
    assert "1 sample" in page
    assert "/data/my files/a.jsonl" in page  # a path is not a text
    asked = write_report(run_dir, include_text=True).read_text()
    assert f"&lt;b&gt;{SECRET}&lt;/b&gt; City" in asked  # quoted, and escaped
    assert f"<b>{SECRET}" not in asked
    assert f"{SECRET} × capital: 25.0%" in visible(asked)


def test_the_page_is_self_contained(run_dir: Path) -> None:
    page = write_report(run_dir, include_text=True).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert "width=device-width" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "selection.json", "erasure/erasure.json", "evaluation.json"])
@pytest.mark.parametrize("damage", [None, "{oops", "[]"])
def test_a_missing_or_damaged_piece_is_said(
    run_dir: Path, name: str, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "png_data_uri", lambda _fig: "data:image/png;base64,")  # drawing takes seconds
    (run_dir / name).unlink()
    if damage:
        (run_dir / name).write_text(damage)
    text = visible(write_report(run_dir, include_text=False).read_text())
    assert f"{name}: " in text
    kinds = {None: "not there", "{oops": "cannot be read", "[]": "is not a JSON object"}
    assert kinds[damage] in text
    others = {
        "run.json": "The command was not recorded",
        "selection.json": "No layer table was recorded",
        "erasure/erasure.json": "There is no Erasure in this run directory",
        "evaluation.json": "says nothing about what was forgotten or kept",
    }
    assert others[name] in text


def test_a_failed_run_and_missing_questions_are_said(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "png_data_uri", lambda _fig: "data:image/png;base64,")
    (run_dir / "run.json").write_text(json.dumps({"status": "failed", "error": f"at {SECRET}"}))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    evaluation["comparison"] = [r for r in evaluation["comparison"] if r["metric"] == "nll"]
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(run_dir, include_text=False).read_text()
    text = visible(page)
    assert SECRET not in page
    assert "status: failed" in text
    assert "No questions were given" in text
    assert "The run is not recorded as done" in text


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to report"):
        write_report(tmp_path, include_text=False)
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path / "none", include_text=False)
