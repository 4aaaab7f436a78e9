"""Progress of long work: a bar with an ETA on a terminal, events for a run directory, and cancellation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from .errors import Cancelled

T = TypeVar("T")
SAY_EVERY = 15.0  # seconds between lines where there is no terminal to draw a bar on


class Progress:
    """Silent progress; the base of the others and the default of the Python API.

    Set `cancelled` from any thread: the next `step` raises `Cancelled`.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.cancelled = False
        self.on_event = on_event
        self._what = ""
        self._done = 0
        self._total: int | None = None

    def start(self, what: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps (None: unknown)."""
        self._what, self._done, self._total = what, 0, total
        self._emit({"event": "start", "what": what, "total": total})

    def step(self, n: int = 1, **figures: float) -> None:
        """Advance by `n` steps and report `figures`. Raises Cancelled when the user asked to stop."""
        if self.cancelled:
            raise Cancelled(f"cancelled during {self._what!r}; nothing was changed")
        self._done += n
        if figures:
            self._emit({"event": "step", "what": self._what, "done": self._done, **figures})

    def finish(self, **figures: Any) -> None:
        """End the stage."""
        self._emit({"event": "finish", "what": self._what, "done": self._done, **figures})

    def note(self, message: str) -> None:
        """Say one line to the user."""
        self._emit({"event": "note", "message": message})

    def over(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Iterate over `items` as one stage."""
        self.start(what, len(items) if total is None and isinstance(items, Sized) else total)
        for item in items:
            yield item
            self.step()
        self.finish()

    def _emit(self, event: dict[str, Any]) -> None:
        if self.on_event:
            self.on_event({"time": round(time.time(), 3), **event})


class ConsoleProgress(Progress):
    """Progress as tqdm bars on stderr (plain lines of text where stderr is not a terminal)."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        super().__init__(on_event)
        self._bar: Any = None
        self._started = 0.0
        self._said = 0.0

    def start(self, what: str, total: int | None = None) -> None:
        from tqdm import tqdm

        self._close()
        super().start(what, total)
        self._started = self._said = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, dynamic_ncols=True, leave=False, mininterval=0.2)

    def step(self, n: int = 1, **figures: float) -> None:
        super().step(n, **figures)
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
            self._bar.update(n)
        elif (now := time.monotonic()) - self._said >= SAY_EVERY:
            self._said = now
            left = ""
            if self._total and self._done:
                eta = (now - self._started) / self._done * (self._total - self._done)
                left = f"/{self._total}, {max(0.0, eta):.0f} s left"
            print(f"  {self._what}: {self._done}{left}", file=sys.stderr, flush=True)

    def finish(self, **figures: Any) -> None:
        super().finish(**figures)
        self._close()
        seconds = time.monotonic() - self._started
        if seconds >= 2 or figures:
            tail = "".join(f" · {k} {v:.4g}" if isinstance(v, float) else f" · {k} {v}" for k, v in figures.items())
            print(f"  {self._what}: {seconds:.1f} s{tail}", file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        super().note(message)
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
