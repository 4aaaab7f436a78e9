"""A point of the frontier: how much one run of a method forgets, and how much it retains, question by question."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..corpus import Corpus
from ..erasure import Erasure, Part, WeightDelta
from ..errors import Cancelled, ConfigError, RunError, SaeunlearnError
from ..features.selection import Selection
from ..guards import Guard
from ..methods import get_method
from ..models import LanguageModel
from ..offsets import Offset
from ..progress import Progress
from .evaluate import group_of, is_forget
from .metrics import multiple_choice

STRENGTHS = (1.0, 0.75, 0.5, 0.25)  # of a finished edit, tried in this order
LIMITS = (0.99, 0.95)  # retention that the frontier is reported at
PENALTY = 10.0  # tuning: points of forgetting that a point of retention below the last of LIMITS costs


@dataclass
class Case:
    """What methods are compared on. `saes` and `selection` are called only where a method needs them."""

    name: str
    model: LanguageModel
    forget: Corpus
    retain: Corpus
    questions: Corpus
    saes: Callable[[], Mapping[int, Any]]
    selection: Callable[[int], Selection]  # of a seed
    oracle: LanguageModel | None = None


@dataclass(frozen=True)
class Sheet:
    """The questions of a case: id and group of each, whether the original answers it (1 or 0), and the floor: what is
    right without the knowledge, the oracle's answer (1 or 0) or else 1 / number of choices."""

    ids: list[str]
    groups: list[str]
    before: list[float]
    floor: list[float]
    floor_is: str  # "oracle" or "chance"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sheet_of(
    model: LanguageModel, questions: Corpus, oracle: LanguageModel | None = None, progress: Progress | None = None
) -> Sheet:
    """Measure the original, and the oracle where there is one.

    Raises CorpusError for a question without choices; ConfigError where nothing could be seen: no forget or no other
    questions, or an original that knows a forget group no better than the floor.
    """
    groups = [group_of(q) for q in questions]
    if not any(map(is_forget, groups)) or all(map(is_forget, groups)):
        raise ConfigError(
            f"{questions.name}: a comparison needs questions whose field `set` says forget, and others that say "
            f"what they are (near, far, …); found: {', '.join(sorted(set(groups)))}"
        )
    before = multiple_choice(model, questions, progress).values
    if oracle is None:
        floor = [1 / len(q.choices) for q in questions]
    else:
        floor = multiple_choice(oracle, questions, progress).values
    sheet = Sheet([q.id[:16] for q in questions], groups, before, floor, "oracle" if oracle is not None else "chance")
    for group, at in _members(sheet, forget=True).items():
        known, least = (float(np.mean(np.asarray(v)[at])) for v in (before, floor))
        if not known > least:
            raise ConfigError(
                f"{questions.name}: {model.name} answers {known:.3f} of {group}, no more than the floor "
                f"({sheet.floor_is}: {least:.3f}): there is nothing to forget"
            )
    if not all(float(np.mean(np.asarray(before)[at])) > 0 for at in _members(sheet, forget=False).values()):
        raise ConfigError(f"{questions.name}: {model.name} answers nothing right that is to be kept")
    return sheet


def measures(sheet: Sheet, values: Sequence[float], weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(forgetting, retention), each [b], under b weightings [b, questions] (None: one, all equal).

    Forgetting: over the forget groups (seen, held out, …) the mean of 1 − (after − floor) / (before − floor), cut to
    0 … 1: below the floor earns nothing more. Retention: after / before, of the worst of the other sets (near, far,
    …), each over all its questions. A weighting that leaves a group nothing to forget counts it as not forgotten.
    """
    w = np.ones((1, len(values))) if weights is None else weights
    before, floor, after = (np.asarray(v, float) for v in (sheet.before, sheet.floor, values))
    gone = []
    for at in _members(sheet, forget=True).values():
        part = w[:, at]
        room, left = part @ (before - floor)[at], part @ (after - floor)[at]
        gone.append(1 - np.clip(np.divide(left, room, out=np.ones_like(left), where=room > 0), 0, 1))
    kept = []
    for at in _members(sheet, forget=False).values():
        part = w[:, at]
        had, has = part @ before[at], part @ after[at]
        kept.append(np.divide(has, had, out=np.ones_like(has), where=had > 0))
    return np.mean(gone, axis=0), np.min(kept, axis=0)


def objective(forgetting: float, retention: float) -> float:
    """What tuning maximises: forgetting − PENALTY · what retention lacks to the last of LIMITS."""
    return forgetting - PENALTY * max(0.0, LIMITS[-1] - retention)


def attempt(case: Case, sheet: Sheet, name: str, settings: Mapping[str, Any], seed: int,
            strengths: Sequence[float], progress: Progress) -> dict[str, Any]:  # fmt: skip
    """Run a method and measure it; weaker `strengths` only until the strictest of LIMITS is kept.

    A method that raises (or a loss that is not finite) has left the model as it was, and is counted so: `error` says
    why, forgetting is 0. Cancelled, RunError and errors of the machine (OSError) are not the method's and pass through.

        {"case", "seed", "error", "seconds", "optimiser_steps", "budget", "curve": [{"strength", "forgetting",
         "retention", "groups": {group: share}, "values": [per question]}]}     # strength 1 first
    """
    method = get_method(name)
    selection = case.selection(seed) if "selection" in method.needs else None
    saes = case.saes() if "saes" in method.needs else {}
    out: dict[str, Any] = {"case": case.name, "seed": seed, "error": None}
    started, curve, erasure = time.monotonic(), [], None
    with counted_steps() as count:
        try:
            erasure = method.unlearn(
                case.model, case.forget, case.retain, config=method.Config(**settings), selection=selection, saes=saes,
                seed=seed, progress=progress,
            )  # fmt: skip
            out["seconds"] = time.monotonic() - started
            for strength in strengths:
                curve.append(point_at(case.model, case.questions, sheet, erasure, strength, progress))
                if curve[-1]["retention"] >= max(LIMITS):
                    break
        except (Cancelled, RunError):
            raise
        except (SaeunlearnError, ArithmeticError, RuntimeError) as e:
            progress.note(f"{name} failed on {case.name} with seed {seed}: {type(e).__name__}: {e}")
            said = f": {e}" if isinstance(e, SaeunlearnError) else ""  # what others say could quote a text
            out |= {"error": f"{type(e).__name__}{said}", "seconds": time.monotonic() - started}
            curve = [{"strength": 1.0, **point(sheet, sheet.before)}]
    extra = {} if erasure is None else erasure.manifest["extra"]
    budget = extra.get("budget") or extra.get("guard")
    return {**out, "optimiser_steps": count[0], "budget": budget, "curve": curve}


def point_at(model: LanguageModel, questions: Corpus, sheet: Sheet, erasure: Erasure, strength: float,
             progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """{"strength", …} as in `attempt`'s curve: the model measured with the Erasure applied at this strength."""
    with at_strength(erasure, strength).apply(model):
        values = multiple_choice(model, questions, progress).values
    return {"strength": strength, **point(sheet, values)}


def point(sheet: Sheet, values: Sequence[float]) -> dict[str, Any]:
    forgetting, retention = (float(x[0]) for x in measures(sheet, values))
    groups = {g: float(np.mean(np.asarray(values)[at])) for g, at in _members(sheet).items()}
    return {"forgetting": forgetting, "retention": retention, "groups": groups, "values": [int(v) for v in values]}


def best_within(curve: Sequence[Mapping[str, Any]], limit: float) -> Mapping[str, Any] | None:
    """The point with the most forgetting among those that retain at least `limit`; None where none does."""
    kept = [p for p in curve if p["retention"] >= limit]
    return max(kept, key=lambda p: p["forgetting"]) if kept else None


def at_strength(erasure: Erasure, scale: float) -> Erasure:
    """The same edit with another strength; a new token stays as it is, without the edit nothing calls it."""
    return erasure if scale == 1 else Erasure([_scaled(p, scale) for p in erasure.parts], erasure.manifest)


def _scaled(part: Part, scale: float) -> Part:
    from ..methods.gradient import scaled

    if isinstance(part, WeightDelta):
        return scaled(part, scale)
    if isinstance(part, Guard):
        return part.with_spec(strength=scale * part.runtime.spec["strength"])
    if isinstance(part, Offset):
        return dataclasses.replace(part, weight=scale * part.weight)
    return part


@contextlib.contextmanager
def counted_steps() -> Iterator[list[int]]:
    """[steps that any torch optimiser made within the context]."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = register_optimizer_step_post_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def _members(sheet: Sheet, forget: bool | None = None) -> dict[str, np.ndarray]:
    """Indices of the questions of each forget group, of each other set, or (None) of each group."""
    labels = [g if forget is not False else g.split("/")[0] for g in sheet.groups]
    names = sorted({n for n in labels if forget is None or is_forget(n) == forget})
    return {n: np.array([i for i, label in enumerate(labels) if label == n]) for n in names}
