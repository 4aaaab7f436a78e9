"""What the methods that return a guard share: statistics of the relevant features, the strength, the Erasure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..corpus import Corpus, Window, batches, refuse_overlap, windows
from ..erasure import Erasure
from ..errors import ConfigError, NonFiniteError, SelectionError
from ..features.selection import Selection, check_selection
from ..guards import Guard, guard_of
from ..losses import mean_loss
from ..models import LanguageModel
from ..progress import Progress
from .budget import Budget, some

MAX_RECORDS = 2000  # of each set, for the statistics
STEPS = 16  # of the series of strengths, each 1/√2 of the one before


@dataclass(frozen=True)
class GuardConfig:
    """Settings that all guards have."""

    # Upper bound of the strength in units of the relevant features' mean positive activation on forget text. The
    # papers set an absolute one by hand (500 for DSG on Gemma-2-2B).
    strength: float = 20.0
    max_length: int = 256  # tokens in a window
    max_retain_rise: float = 0.01  # relative rise of the loss on held-out retain records that the result keeps to


Calibrate = Callable[[Guard, Sequence[Window], Progress], dict[str, float]]


def check_guard(config: GuardConfig) -> None:
    """Raises ConfigError naming the setting that is out of range."""
    for name in ("strength", "max_retain_rise"):
        if not (getattr(config, name) > 0 and math.isfinite(getattr(config, name))):
            raise ConfigError(f"{name} must be positive and finite, not {getattr(config, name)}")
    if config.max_length < 2:
        raise ConfigError(f"max_length must be at least 2, not {config.max_length}")
    percentile = getattr(config, "percentile", None)  # of the methods with a gate
    if percentile is not None and not 0 < percentile < 100:
        raise ConfigError(f"percentile lies between 0 and 100, not {percentile}")


def make_guard(
    name: str, model: LanguageModel, forget: Corpus, retain: Corpus, config: GuardConfig, selection: Selection | None,
    saes: Mapping[int, Any], seed: int, progress: Progress, calibrate: Calibrate | None = None,
) -> Erasure:  # fmt: skip
    """An Erasure of one guard on the relevant features, as strong as the retention budget allows.

    `calibrate` reads the guard and retain windows (none of those that the budget is measured on), and returns the
    setting of the mode's gate. Statistics are over all positions but first ones and padding.
    Raises ConfigError for bad settings, or where no strength keeps the budget or none has an effect; OverlapError;
    SelectionError; SAEMismatchError; NonFiniteError; Cancelled.
    """
    check_guard(config)
    if selection is None:
        raise ConfigError(f"{name} needs a selection (saeunlearn select)")
    refuse_overlap(forget, retain)
    check_selection(selection, model, saes)
    guard = guard_of(saes[selection.layer], selection.layer, selection.relevant, strength=1.0)
    rest, held = retain.split(0.2, seed)
    f_items, r_items, h_items = (
        windows(c.sample(MAX_RECORDS, seed), model, config.max_length) for c in (forget, rest, held)
    )
    unit = mean_activation(model, guard, f_items, progress)
    gate = calibrate(guard, r_items, progress) if calibrate else {}
    guard = guard.with_spec(mode=name, **gate)
    budget = Budget(model)
    budget.watch("retain", some(h_items, seed), config.max_retain_rise)
    guard, tried = strongest(model, guard, budget, config.strength * unit, progress)
    sample = some(f_items, seed)
    before = mean_loss(model, sample)
    with applied(model, guard):
        after = mean_loss(model, sample)
    if after == before:
        raise ConfigError(f"the guard changes nothing on forget text ({gate}): choose other features or a lower gate")
    watch, strength = budget.watches["retain"], guard.runtime.spec["strength"]
    said = {
        "strength": strength, "mean_activation": unit, "multiple": strength / unit, **gate,
        "retain_limit": watch.limit, "retain_rise": tried[strength], "retain_loss_before": watch.base,
        "forget_rise": after / before - 1, "forget_loss_before": before,
    }  # fmt: skip
    return Erasure.create(
        model, [guard], method=name, config=asdict(config), seed=seed, forget_fingerprint=forget.fingerprint(),
        retain_fingerprint=retain.fingerprint(), selection=selection.to_dict(), extra={"guard": said},
        losses=[{"strength": s, "retain_rise": r} for s, r in tried.items() if math.isfinite(r)],
    )  # fmt: skip


@torch.no_grad()
def activations(model: LanguageModel, guard: Guard, items: Sequence[Window], progress: Progress, what: str
                ) -> Iterator[Tensor]:  # fmt: skip
    """z [positions, n] of the guard's features on each window, first positions left out. Raises NonFiniteError."""
    runtime = guard.runtime.to(model.device)
    for batch in progress.over(list(batches(items, model.pad_id)), what):
        b = batch.to(model.device)
        h = model.capture(b.ids, [runtime.layer], b.attention_mask)[runtime.layer]
        z = runtime.encode(h)
        if not (torch.isfinite(h[b.mask]).all() and torch.isfinite(z[b.mask]).all()):  # NaN > 0 would pass for inactive
            raise NonFiniteError(f"layer {runtime.layer} of {model.name} or its SAE gives NaN or infinity")
        for row, mask in zip(z, b.mask):
            yield row[mask].cpu()


def mean_activation(model: LanguageModel, guard: Guard, items: Sequence[Window], progress: Progress) -> float:
    """Mean of z_j over the positions and features of the guard where it is positive. SelectionError if it never is."""
    total, count = 0.0, 0
    for z in activations(model, guard, items, progress, "activations on forget text"):
        total, count = total + float(z.double().sum()), count + int((z > 0).sum())
    if not count:
        raise SelectionError("none of the relevant features is active anywhere on the forget text")
    return total / count


def strongest(model: LanguageModel, guard: Guard, budget: Budget, most: float, progress: Progress
              ) -> tuple[Guard, dict[float, float]]:  # fmt: skip
    """The guard at the largest strength of most·2^(−i/2), i = 0 … STEPS, within the budget, found by bisection; and
    {strength: relative rise of the retain loss} of all that were tried.

    Raises ConfigError where none of those tried keeps the budget.
    """
    tried: dict[float, float] = {}

    def keeps(i: int) -> bool:
        strength = most * 2 ** (-i / 2)
        rises = budget.measure_rises(lambda s: applied(model, guard.with_spec(strength=s)), strength)
        tried[strength] = rises["retain"]
        figures = {f"{n}_rise": r for n, r in rises.items() if math.isfinite(r)}
        progress.step(1, strength=strength, **figures)
        return budget.used(rises) <= 1

    progress.start("strength of the guard")
    best = 0
    if not keeps(0):
        broken, best = 0, STEPS
        if not keeps(STEPS):
            limit = budget.watches["retain"].limit
            raise ConfigError(
                f"no strength from {most:.3g} to {most * 2 ** (-STEPS / 2):.3g} keeps the rise of the retain loss "
                f"within {limit:.2%} (the weakest: {tried[most * 2 ** (-STEPS / 2)]:.2%}): raise max_retain_rise, or "
                "choose fewer or other features"
            )
        while best - broken > 1:
            middle = (broken + best) // 2
            broken, best = (broken, middle) if keeps(middle) else (middle, best)
    progress.finish()
    return guard.with_spec(strength=most * 2 ** (-best / 2)), tried


@contextlib.contextmanager
def applied(model: LanguageModel, guard: Guard) -> Iterator[None]:
    """Within the context the guard acts."""
    undo = guard.apply(model)
    try:
        yield
    finally:
        undo()
