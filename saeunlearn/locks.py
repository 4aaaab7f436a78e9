"""Locks between processes that share a folder. The system drops a lock when its process ends, however it ends, so that
what a killed process held is free at once. (Not for Windows.)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .progress import Progress


class FileLock:
    """A lock on `file`, which stays behind empty. Two instances exclude each other, within one process too."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._held: IO[bytes] | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Whether the lock is held now; with `wait` always, once it is free."""
        import fcntl

        self.file.parent.mkdir(parents=True, exist_ok=True)
        held = self.file.open("ab")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held.close()
            return False
        except BaseException:
            held.close()
            raise
        self._held = held
        return True

    def release(self) -> None:
        """Let go; nothing happens where it is not held."""
        if self._held is not None:
            self._held.close()
            self._held = None


@contextlib.contextmanager
def locked(file: Path, progress: Progress | None = None, what: str = "") -> Iterator[None]:
    """Hold the lock within the context; `progress` says what another process is waited for."""
    lock = FileLock(file)
    if not lock.acquire(wait=False):
        if progress is not None:
            progress.note(f"waiting for another process: {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
