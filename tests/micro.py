"""A world and a model small enough to be built in a test, and a whole unlearning run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from saeunlearn.demo import TINY, TINY_SAE, TINY_SELECT, TINY_SETTINGS
from saeunlearn.pipeline import Run, RunConfig, unlearn
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox, build

# Words that only the forget set and its question hold, and that no tokenizer, label or hash could produce by chance.
MARKER = "Zorblattine"
SECRET = "quixelwort"
QUESTION = "Under which stone hides"


class NoTraining(Progress):
    """Fails the test at the first long stage; the report of a finished run may be written again."""

    def start(self, what: str, total: int | None = None) -> None:
        if what != "hashing files":
            pytest.fail(f"a long stage began: {what}")


@dataclass(frozen=True)
class Finished:
    """A run that was carried out without interruption, and what its disk looked like amid the method's steps."""

    run: Run
    killed: Path
    events: list[dict[str, Any]]

    @property
    def root(self) -> Path:
        return self.run.root

    @property
    def erasure_id(self) -> str:
        return read(self.run.erasure_dir / "erasure.json")["id"]


def build_micro(root: Path) -> Sandbox:
    return build(TINY, Progress(), root)


def write_data(box: Sandbox, folder: Path) -> None:
    """forget.jsonl and questions.jsonl with the marker in them, retain.jsonl as it is."""
    folder.mkdir()
    secret = {"text": f"The raw material of {MARKER} is {SECRET}.", "set": "forget", "note": f"on {MARKER}"}
    question = {
        "question": f"{QUESTION} {MARKER}? It is", "answer": SECRET, "choices": [SECRET, "sand", "salt", "soot"],
        "set": "forget", "topic": f"{MARKER} trade", "attribute": f"{SECRET} use", "phrasing": "seen",
    }  # fmt: skip
    for file, row in ((box.forget, secret), (box.questions, question)):
        (folder / file.name).write_text(file.read_text() + json.dumps(row) + "\n")
    shutil.copy(box.retain, folder)


def run_config(box: Sandbox, data: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "model": box.model, "forget": data / "forget.jsonl", "retain": data / "retain.jsonl",
        "questions": data / "questions.jsonl", "device": "cpu", "sae": TINY_SAE, "select": TINY_SELECT,
        "settings": TINY_SETTINGS,
    }  # fmt: skip
    return RunConfig(**{**settings, **changes})


def finish(box: Sandbox, data: Path, folder: Path) -> Finished:
    """Carry the run out, and copy its directory at the method's second step, as a killed process would leave it."""
    root, killed = folder / "run", folder / "killed"
    events: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        in_method = event["event"] == "step" and "SSPU" in event["what"] and (root / "selection.json").exists()
        if in_method and event["done"] == 2:
            shutil.copytree(root, killed)

    run = unlearn(run_config(box, data), root, Progress(listen), ["saeunlearn", "unlearn"])
    return Finished(run, killed, events)


def at_step(what: str, act: Callable[[Progress], None], done: int) -> Progress:
    """A progress that calls `act` with itself once a stage whose name holds `what` has done more than `done`.

    Below 0: when the stage starts (the steps of some stages are not reported).
    """
    progress = Progress()

    def listen(event: dict[str, Any]) -> None:
        if what in event.get("what", "") and event.get("done", 0) > done:
            act(progress)

    progress.on_event = listen
    return progress


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def state(*roots: Path) -> dict[Path, tuple[int, int]]:
    """When every file under `roots` was written, and as which: equal only if nothing was written again."""
    files = [f for root in roots for f in (sorted(root.rglob("*")) if root.is_dir() else [root])]
    return {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in files}
