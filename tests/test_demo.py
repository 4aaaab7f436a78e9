"""The demo's runs: several at a time are what they are one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from micro import read, state

from saeunlearn import demo
from saeunlearn.errors import ModelError, RunError
from saeunlearn.pipeline import unlearn
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox

pytestmark = pytest.mark.slow


def test_runs_in_processes_are_those_of_one(micro: Sandbox, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    wanted = {tmp_path / f"ga-{s}": demo.config(micro, "ga", s) for s in range(3)}
    assert demo.carry_out(wanted, Progress(seen.append)) == list(wanted)
    assert {e["what"] for e in seen} == {"runs"}
    assert (seen[0]["total"], seen[-1]["done"]) == (3, 3)
    alone = unlearn(demo.config(micro, "ga", 1), tmp_path / "alone").erasure_dir
    assert read(tmp_path / "ga-1/erasure/erasure.json")["id"] == read(alone / "erasure.json")["id"]
    before = state(tmp_path)
    demo.carry_out(wanted)
    assert state(tmp_path) == before
    with pytest.raises(RunError, match="other settings"):
        demo.carry_out({tmp_path / "new": demo.config(micro, "ga"), tmp_path / "ga-0": demo.config(micro, "ga", 7)})
    assert not (tmp_path / "new/run.json").exists()
    missing = {tmp_path / f"no-{s}": demo.config(micro, "ga", s, model=tmp_path / "nowhere") for s in range(2)}
    with pytest.raises(ModelError, match="not a model folder"):
        demo.carry_out(missing)
