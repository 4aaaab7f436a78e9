"""What the server holds for all visitors: the run directory, what was opened of it, and the run that is going on.

Everything a visitor chooses lives in that visitor's own page (components and gr.State).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from saeunlearn.documents import read_json
from saeunlearn.errors import ConfigError, RunError, SaeunlearnError

from .jobs import Jobs, LiveProgress
from .pieces import note

MADE, GUARDS = "erasures", "guards"  # folders in the run directory for what is made on the page


class Explorer:
    """A run directory that is being looked at. Raises RunError where there is none."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.jobs = Jobs()
        self.progress = LiveProgress()
        self.info: dict[str, Any] = {}
        self.info = self.alive()
        self._run: Any = None
        self._index: Any = None
        self._error: Exception | None = None
        self._opened = threading.Event()
        self._ready = threading.Event()
        self._adding = threading.Lock()
        self._started = False

    def alive(self) -> dict[str, Any]:
        """The content of run.json. Raises RunError when the run is gone, damaged, or another one by now."""
        file = self.root / "run.json"
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            why = "holds no run any more: start the explorer again on a run directory"
            if not self.info:
                why = "holds no run: name a run directory, or make the demo's with `saeunlearn demo`"
            raise RunError(f"{self.root} {why}") from e
        except (OSError, ValueError) as e:
            raise RunError(f"{file} cannot be read: {e}") from e
        if not isinstance(info, dict) or not isinstance(info.get("config"), dict):
            raise RunError(f"{file} is not that of a run directory")
        if self.info and info.get("key") != self.info.get("key"):
            raise RunError(f"{self.root} holds another run by now: start the explorer again")
        return info

    # --- opening in the background ---------------------------------------------------------------------

    def open(self) -> None:
        """Open the model and build the index in a thread, once; the overview needs neither and comes first."""
        with self._adding:
            if not self._started:
                self._started = True
                threading.Thread(target=self._open, daemon=True, name="open-run").start()

    def _open(self) -> None:
        from saeunlearn.explore.erased import add_erasure
        from saeunlearn.explore.index import run_index
        from saeunlearn.explore.opened import open_run

        try:
            self._run = run = open_run(self.root, erasures=self._made(), progress=self.progress)
            self._opened.set()
            if run.saes:
                self._index = run_index(run, self.progress)
                self._ready.set()
                for name in list(run.erasures):
                    add_erasure(run, self._index, name, self.progress)
        except SaeunlearnError as e:
            self._error = e
        except Exception as e:  # a thread has nobody above it to tell
            traceback.print_exc()
            self._error = RunError(f"{type(e).__name__}: {e}")
        finally:
            self.progress.stage = ""
            self._opened.set()
            self._ready.set()

    def opening(self) -> LiveProgress | None:
        """Where the opening is; None when there is nothing to wait for. Raises what it ended with."""
        if self._error:
            raise self._error
        return self.progress if self.progress.stage else None

    def run(self) -> Any:
        """The OpenedRun, waited for. Raises RunError for a run that is gone, and what opening it raised."""
        self.alive()
        self.open()
        self._opened.wait()
        if self._run is None and self._error:
            raise self._error
        return self._run

    def index(self) -> Any:
        """The Index. Raises RunError while it is being built, and for a run without SAEs."""
        run = self.run()
        if not run.saes:
            raise RunError("this run has no SAEs: its method needs none, so there are no features to look at")
        if not self._ready.is_set():
            raise RunError("the index of features is still being built (see above): this view opens when it is there")
        if self._index is None and self._error:
            raise self._error
        return self._index

    def index_when_ready(self) -> Any:
        """The Index, waited for."""
        self.run()
        self._ready.wait()
        return self.index()

    # --- Erasures made on the page ---------------------------------------------------------------------

    def _made(self) -> dict[str, Path]:
        """Finished Erasures and guards in the run directory, by name."""
        found = {f.parent.parent.name: f.parent for f in sorted((self.root / MADE).glob("*/erasure/erasure.json"))
                 if read_json(f.parent.parent / "run.json").get("status") == "done"}  # fmt: skip
        return found | {f.parent.name: f.parent for f in sorted((self.root / GUARDS).glob("*/erasure.json"))}

    def names(self) -> list[str]:
        """Every Erasure there is: that of the run first. The run need not be open yet."""
        return [self.info["config"]["method"], *self._made()] if self._run is None else list(self._run.erasures)

    def layers(self) -> list[int]:
        """Those with an SAE; before the run is open, those of its selection."""
        if self._run is not None:
            return sorted(self._run.saes)
        return [r["layer"] for r in read_json(self.root / "selection.json").get("layers") or []]

    def layer(self) -> int | None:
        """The one that the run chose, else the first."""
        return read_json(self.root / "selection.json").get("layer", next(iter(self.layers()), None))

    def indexed(self) -> bool:
        return self._index is not None

    def next_name(self, room: str, stem: str) -> str:
        """stem-1, or with the next number that is free in that folder of the run directory."""
        return next(name for n in itertools.count(1) if not (self.root / room / (name := f"{stem}-{n}")).exists())

    def free_name(self, name: str) -> str:
        """The name, where a new Erasure can have it. Raises ConfigError for a taken or odd one."""
        if not re.fullmatch(r"\w[\w.-]{0,59}", name):
            raise ConfigError(f"{name!r} cannot be a name: use letters, digits, - and _")
        if name in ("original", *self.names()) or (self.root / GUARDS / name).exists():
            raise ConfigError(f"there is an Erasure {name} already: choose another name")
        return name

    def add(self, name: str, folder: Path) -> None:
        """Take a saved Erasure in, for all visitors, and measure what it does to the features in the background.

        Raises ErasureError for one of another model.
        """
        from saeunlearn.erasure import Erasure
        from saeunlearn.explore.erased import add_erasure

        run = self.run()
        erasure = Erasure.load(folder)
        with run.lock, erasure.apply(run.model):
            pass
        with self._adding:
            run.erasures = {**run.erasures, name: erasure}

        def measure() -> None:
            try:
                add_erasure(run, self._index, name, LiveProgress())
            except SaeunlearnError as e:
                print(f"saeunlearn explore: {name} was not measured: {e}", flush=True)

        if self._index is not None:
            threading.Thread(target=measure, daemon=True, name=f"measure-{name}").start()

    def documents(self) -> dict[str, dict[str, Any]]:
        """The report documents of this run and of the finished ones made on the page, by name."""
        found = {f"{self.info['config'].get('method', 'run')} (this run)": document(self.root)}
        for file in sorted((self.root / MADE).glob("*/report.json")):
            found[file.parent.name] = document(file.parent)
        return found


def document(root: Path) -> dict[str, Any]:
    """report.json where there is one, else the same document made from the other files. Raises RunError."""
    doc = read_json(root / "report.json")
    if doc.get("schema") and "comparison" in doc:
        return doc
    from saeunlearn.evaluation.removal import gather

    return gather(root, include_text=True)


def safely(fn: Callable[..., Any], outputs: int) -> Callable[..., list[Any]]:
    """`fn` with a first output more: the message of its typed error, else nothing. Its own outputs stay on an error."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> list[Any]:
        try:
            out = fn(*args, **kwargs)
        except (SaeunlearnError, OSError) as e:
            return [str(note(str(e), "error")), *[gr.skip()] * outputs]
        return ["", *(out if outputs != 1 else [out])]

    return wrapped


def whole(value: Any, what: str) -> int:
    """A whole number that a visitor gave. Raises ConfigError for anything else."""
    try:
        if float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"{what} must be a whole number, not {value!r}") from e


def words(value: Any) -> str:
    """A text that a visitor gave, without space around it; an empty field that was never shown is None."""
    return value.strip() if isinstance(value, str) else ""
