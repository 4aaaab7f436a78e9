"""Trials of methods shared by processes: one Optuna study a method in one journal file.

A trial is added to the journal in one line, with its settings and as running, by a process that holds the trial's lock,
and keeps it until the trial is told. The system drops the lock of a process that was killed, so a running trial whose
lock is free has lost its process: the next one that looks takes it over, with the same number and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..locks import FileLock, locked
from .spaces import STARTUP, distributions, propose, quiet

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Trial:
    """A trial that this process has taken; `lock` is to be released after `Trials.tell`."""

    method: str
    number: int
    params: dict[str, Any]
    lock: FileLock


class Trials:
    """The studies of a folder. `starts`: method → the point of trial 0."""

    def __init__(self, root: Path, starts: Mapping[str, Mapping[str, Any]], trials: int, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.root, self.starts, self.trials, self.seed = root, starts, trials, seed
        # Optuna's own lock outlives its process by half a minute.
        lock: Any = FileLock(self._lock(JOURNAL))
        with locked(self._lock(JOURNAL)):
            mend(root / JOURNAL)
        with quiet():
            storage = JournalStorage(JournalFileBackend(str(root / JOURNAL), lock_obj=lock))
            known = {s.study_name for s in storage.get_all_studies()}  # creating one that is there writes a line
            for name in [n for n in starts if n not in known]:
                optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
            self.studies = {name: optuna.load_study(study_name=name, storage=storage) for name in starts}

    def take(self, method: str) -> Trial | None:
        """A trial that nobody works on: one whose process has gone, or the next; None where there is none now."""
        import optuna

        study = self.studies[method]
        with locked(self._lock(f"study-{method}")):
            known = study.get_trials(deepcopy=False)
            for t in known:
                if not t.state.is_finished() and (lock := self._claim(method, t.number)):
                    if not self._state(method, t.number).is_finished():  # told since it was read
                        return Trial(method, t.number, dict(t.params), lock)
                    lock.release()
            number = len(known)
            if number >= self.trials or (number >= STARTUP and not all(t.state.is_finished() for t in known)):
                return None
            lock = self._claim(method, number)
            assert lock is not None, "only who holds the study's lock adds trials"
            params = propose(method, self.starts[method], known, self.seed, number)
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING, params=params, distributions=distributions(method)
                )
            )
            return Trial(method, number, params, lock)

    def tell(self, trial: Trial, value: float | None) -> None:
        """Finish a trial; None: it failed, and is not tried again."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        with quiet():
            self.studies[trial.method].tell(trial.number, value, state=state)

    def done(self, method: str) -> int:
        """How many trials are finished."""
        return sum(t.state.is_finished() for t in self.studies[method].get_trials(deepcopy=False))

    def best(self, method: str) -> int:
        """The number of the trial with the greatest value, the first of equal ones; 0 (the start) where all failed."""
        told = [(t.value, -t.number) for t in self.studies[method].get_trials(deepcopy=False) if t.value is not None]
        return -max(told)[1] if told else 0

    def params(self, method: str, number: int) -> dict[str, Any]:
        return dict(self.studies[method].get_trials(deepcopy=False)[number].params)

    def _state(self, method: str, number: int) -> Any:
        return self.studies[method].get_trials(deepcopy=False)[number].state

    def _claim(self, method: str, number: int) -> FileLock | None:
        lock = FileLock(self._lock(f"trial-{method}-{number}"))
        return lock if lock.acquire(wait=False) else None

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / name


def mend(journal: Path) -> None:
    """Cut off a last line that was not written to its end (a full disk): Optuna would read no further, ever."""
    if journal.exists() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        with journal.open("rb+") as f:
            f.truncate(text.rfind(b"\n") + 1)
