"""Methods compared at an equal tuning budget: trials on tuning cases, then the chosen settings on scoring cases.

Every process that is started with the same plan on the same folder takes jobs (a trial, or a scoring run) until none is
left; what a killed process worked on is free again, and what was finished is not repeated. The result does not depend
on how many processes there were.

Folder: compare.json (plan, versions) · journal.jsonl (Optuna's journal, one study a method) · cases/NAME/ (what was
prepared; questions.json) · trials/METHOD-N.json and scores/METHOD-I.json (whole points, question by question) ·
results.json, points.csv, table.md, table.tex, frontier.png, constraints.png · locks/.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoints import write_json
from ..errors import ConfigError, RunError
from ..locks import FileLock, locked
from ..methods import get_method
from ..progress import Progress
from .points import LIMITS, PENALTY, STRENGTHS, Case, Sheet, attempt, objective, sheet_of
from .spaces import STARTUP, settings_with, space_of, start_of
from .tuning import Trials

SCHEMA = 1
POLL = 2.0  # seconds between looks at what other processes do
OpenCase = Callable[[str], Case]


@dataclass(frozen=True)
class Plan:
    """Everything that the result of a comparison depends on. Cases are known by name; `inputs` says what they are."""

    methods: tuple[str, ...]
    trials: int  # of each method
    seeds: tuple[int, ...]  # one scoring run each
    tune: tuple[str, ...]  # cases of which every trial runs all
    score: tuple[str, ...]  # cases that the scoring runs take in turn
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by method, instead of its defaults
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of the trials and of their draws: the first that no scoring run has."""
        return next(n for n in range(len(self.seeds) + 1) if n not in self.seeds)

    def case_of(self, run: int) -> str:
        return self.score[run % len(self.score)]

    def check(self) -> None:
        """Raises ConfigError for a plan that cannot be carried out, naming what is wrong."""
        for what in ("methods", "seeds", "tune", "score"):
            given: Sequence[Any] = getattr(self, what)
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{what} of a comparison: give each once, and at least one, not {list(given)}")
        if len(self.seeds) < len(self.score):
            raise ConfigError(f"{len(self.score)} scoring cases need at least as many seeds, not {len(self.seeds)}")
        if self.trials < 1:
            raise ConfigError(f"{self.trials} trials: use at least one, which is that of the defaults")
        if both := sorted(set(self.tune) & set(self.score)):
            raise ConfigError(f"{', '.join(both)}: settings must not be scored where they were tuned")


def compare(plan: Plan, open_case: OpenCase, out: str | Path, progress: Progress) -> dict[str, Any]:
    """Take part in the comparison until it is finished, and return results.json. `open_case` opens a case of the plan.

    Raises ConfigError for a plan or a method that cannot work, RunError where `out` holds something else, and what
    opening the cases raises; all methods are checked on the first case before the first trial.
    """
    plan.check()
    starts = {name: start_of(name, plan.settings.get(name, {})) for name in plan.methods}
    out = claim(plan, Path(out))
    cases: dict[str, tuple[Case, Sheet]] = {}

    def case(name: str) -> tuple[Case, Sheet]:
        if name not in cases:
            opened = open_case(name)
            cases[name] = opened, stored_sheet(opened, out / "cases" / name, progress)
        return cases[name]

    first = case(plan.tune[0])[0]
    for name in plan.methods:
        method = get_method(name)
        method.check(first.model, method.Config(**settings_with(name, plan.settings.get(name, {}), starts[name])))
    trials = Trials(out, starts, plan.trials, plan.seed)
    work(plan, trials, case, out, progress)
    from .comparison import write_results

    with locked(out / "locks" / "results", progress, "it writes the results"):
        return write_results(plan, trials, out, progress)


def claim(plan: Plan, out: Path) -> Path:
    """The folder, with compare.json in it. Raises RunError where it holds another comparison, or something else."""
    said = json.loads(json.dumps({"schema": SCHEMA, "plan": asdict(plan), "spaces": spaces(plan)}))
    file = out / "compare.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = not file.exists() and any(f.name != "locks" for f in out.iterdir())
        with locked(out / "locks" / "compare"):
            if file.exists():
                known = json.loads(file.read_text())
                if {k: known.get(k) for k in said} != said:
                    raise RunError(f"{out} holds a comparison with other settings or data: choose another --out")
            elif foreign:
                raise RunError(f"{out} is not empty and no comparison: choose another --out")
            else:
                libraries = ("torch", "transformers", "sae_lens", "peft", "optuna", "scipy", "numpy")
                versions = {n: importlib.metadata.version(n) for n in libraries}
                write_json(file, {**said, "versions": {"saeunlearn": __version__, **versions}})
    except (OSError, ValueError, AttributeError) as e:
        raise RunError(f"cannot use {out} for a comparison: {e}") from e
    for name in ("trials", "scores", "cases"):
        (out / name).mkdir(exist_ok=True)
    return out


def spaces(plan: Plan) -> dict[str, Any]:
    """What compare.json says about the tuning."""
    return {
        "penalty": PENALTY, "retention": LIMITS[-1], "startup": STARTUP, "seed": plan.seed,
        "fields": {m: {n: asdict(f) for n, f in space_of(get_method(m)).items()} for m in plan.methods},
    }  # fmt: skip


def stored_sheet(case: Case, folder: Path, progress: Progress) -> Sheet:
    """questions.json of the case, measured by the first who needs it."""
    file = folder / "questions.json"
    with locked(folder.parents[1] / "locks" / f"questions-{case.name}", progress, f"it measures {case.name}"):
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(
                file, {"schema": SCHEMA, **sheet_of(case.model, case.questions, case.oracle, progress).to_dict()}
            )
        return read_sheet(file)


def read_sheet(file: Path) -> Sheet:
    return Sheet(**{k: v for k, v in json.loads(file.read_text()).items() if k != "schema"})


# --- work --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something that this process has taken: `run` does it and gives the attempts, `lock` is released afterwards."""

    what: str
    lock: FileLock
    run: Callable[[], list[dict[str, Any]]]


def work(plan: Plan, trials: Trials, case: Callable[[str], tuple[Case, Sheet]], out: Path, progress: Progress) -> None:
    """Take jobs until all are finished, by whomever."""
    total = len(plan.methods) * (plan.trials + len(plan.seeds))
    waiting = False
    while (done := finished(plan, trials, out)) < total:
        job = next(jobs(plan, trials, case, out, progress), None)
        if job is None:
            if not waiting:
                progress.note(f"{total - done} of {total} jobs are with other processes: waiting for them")
            waiting = True
            if progress.cancelled:
                progress.step(0)
            time.sleep(POLL)
            continue
        waiting = False
        try:
            progress.note(f"[{done + 1}/{total}] {job.what}")
            rows = job.run()
        finally:
            job.lock.release()
        said = "; ".join(
            f"{r['case']}: " + (r["error"] or f"forgetting {r['curve'][0]['forgetting']:.3f}, retention "
                                f"{r['curve'][0]['retention']:.3f}, {r['seconds']:.0f} s") for r in rows
        )  # fmt: skip
        progress.note(f"  {job.what}: {said}")


def finished(plan: Plan, trials: Trials, out: Path) -> int:
    scored = sum(score_file(out, m, i).exists() for m in plan.methods for i in range(len(plan.seeds)))
    return scored + sum(trials.done(m) for m in plan.methods)


def jobs(plan: Plan, trials: Trials, case: Callable[[str], tuple[Case, Sheet]], out: Path, progress: Progress
         ) -> Iterator[Job]:  # fmt: skip
    """The next job that nobody works on, taken. Trials first; the runs of a method when its trials are finished."""
    for method in plan.methods:
        if trial := trials.take(method):

            def tune(trial: Any = trial, method: str = method) -> list[dict[str, Any]]:
                file = trial_file(out, method, trial.number)
                if not file.exists():  # else it was finished, but not told
                    settings = settings_with(method, plan.settings.get(method, {}), trial.params)
                    rows = [attempt(*case(n), method, settings, plan.seed, (1.0,), progress) for n in plan.tune]
                    keep(file, method, trial.number, settings, rows)
                rows = read_attempts(file)
                trials.tell(trial, value_of(rows))
                return rows

            yield Job(f"{method}, trial {trial.number}", trial.lock, tune)
    for method in plan.methods:
        if trials.done(method) < plan.trials:
            continue
        for run, seed in enumerate(plan.seeds):
            file = score_file(out, method, run)
            lock = FileLock(out / "locks" / f"score-{method}-{run}")
            if file.exists() or not lock.acquire(wait=False):
                continue
            if file.exists():
                lock.release()
                continue

            def score(method: str = method, run: int = run, seed: int = seed, file: Path = file
                      ) -> list[dict[str, Any]]:  # fmt: skip
                number = trials.best(method)
                params = trials.params(method, number)
                settings = settings_with(method, plan.settings.get(method, {}), params)
                rows = [attempt(*case(plan.case_of(run)), method, settings, seed, STRENGTHS, progress)]
                keep(file, method, number, settings, rows)
                return rows

            yield Job(f"{method}, seed {seed} on {plan.case_of(run)}", lock, score)


def value_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The objective of a trial: its mean over the tuning cases; None where the method failed on one."""
    if any(r["error"] for r in rows):
        return None
    points = [r["curve"][0] for r in rows]
    return sum(objective(p["forgetting"], p["retention"]) for p in points) / len(points)


def keep(file: Path, method: str, number: int, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    write_json(file, {"schema": SCHEMA, "method": method, "trial": number, "settings": settings, "attempts": rows})


def read_attempts(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["attempts"]


def trial_file(out: Path, method: str, number: int) -> Path:
    return out / "trials" / f"{method}-{number:03d}.json"


def score_file(out: Path, method: str, run: int) -> Path:
    return out / "scores" / f"{method}-{run}.json"
