"""Making an Erasure from the page: the pipeline's own run function in a worker thread, one run at a time a server."""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saeunlearn.errors import Cancelled, RunError, SaeunlearnError
from saeunlearn.progress import Progress

if TYPE_CHECKING:
    from saeunlearn.pipeline import RunConfig

NOTES = 6  # lines of the run that are shown


class LiveProgress(Progress):
    """Progress that keeps where it is, for a page that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "starting"
        self.done = 0
        self.total: int | None = None
        self.figures: dict[str, Any] = {}
        self.notes: list[str] = []
        self.since = time.monotonic()

    def start(self, what: str, total: int | None = None) -> None:
        super().start(what, total)
        self.stage, self.done, self.total, self.figures, self.since = what, 0, total, {}, time.monotonic()

    def step(self, n: int = 1, **figures: float) -> None:
        super().step(n, **figures)
        self.done += n
        self.figures |= figures

    def finish(self, **figures: Any) -> None:
        super().finish(**figures)
        self.note(f"{self.stage}: {time.monotonic() - self.since:.1f} s")

    def note(self, message: str) -> None:
        super().note(message)
        self.notes = [*self.notes, message][-NOTES:]

    def share(self) -> float | None:
        return min(1.0, self.done / self.total) if self.total else None

    def seconds_left(self) -> float | None:
        """By the pace of this stage; None before anything is known."""
        if not self.total or not self.done:
            return None
        return (time.monotonic() - self.since) / self.done * max(0, self.total - self.done)


@dataclass
class Job:
    """One run: who holds `id` may cancel it."""

    name: str
    root: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    progress: LiveProgress = field(default_factory=LiveProgress)
    status: Literal["running", "done", "cancelled", "failed"] = "running"
    error: str = ""
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


class Jobs:
    """The runs of this server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def running(self) -> Job | None:
        return next((j for j in self._jobs.values() if j.status == "running"), None)

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def start(self, config: RunConfig, root: Path, name: str, after: Any = None) -> Job:
        """Begin the run in a thread; `after(job)` is called when it is done. Raises RunError while another one runs."""
        with self._lock:
            if self.running():
                raise RunError("another run is going on here, and there is one at a time: try again when it has ended")
            job = Job(name, root)
            self._jobs[job.id] = job
        threading.Thread(target=self._carry_out, args=(job, config, after), daemon=True, name=f"erase-{name}").start()
        return job

    def cancel(self, job_id: str) -> None:
        """Raises RunError for a job that is not the caller's."""
        job = self.get(job_id)
        if job is None:
            raise RunError("there is no run of yours to cancel")
        job.progress.cancelled = True

    def _carry_out(self, job: Job, config: RunConfig, after: Any) -> None:
        from saeunlearn.pipeline import unlearn

        status: Literal["done", "cancelled", "failed"] = "failed"
        try:
            unlearn(config, job.root, job.progress)
            if after is not None:
                after(job)
            status = "done"
        except Cancelled:
            status = "cancelled"
        except SaeunlearnError as e:
            job.error = str(e)
        except Exception as e:  # a thread has nobody above it to tell
            job.error = f"{type(e).__name__}: {e}"
            traceback.print_exc()
        job.seconds = time.monotonic() - job.started
        job.status = status
