"""The recovered share of an attack, and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Recovery:
    """0: no more than what never knew; 1: as much as the original. All None where the two do not differ."""

    share: float | None
    low: float | None
    high: float | None


def recovered(
    after: Sequence[float],
    original: Sequence[float],
    reference: Sequence[float] | None,
    chance: Sequence[float] | None,
    weights: Sequence[float],
    seed: int = 0,
) -> Recovery:
    """(after − r) / (original − r) of means over the same records, and its 95 % paired bootstrap interval.

    r: the mean of `reference` (the oracle after the same attack), never below that of `chance`, so that guessing earns
    nothing; clipped below at 0. Resamples in which original and r do not differ are left out. Larger values must be
    better for the attacker: give losses with a minus sign. At least one of `reference` and `chance` is needed.
    """
    columns = [np.asarray(after, float), np.asarray(original, float)]
    columns += [np.asarray(c, float) for c in (reference, chance) if c is not None]
    w = np.asarray(weights, float)
    stacked = np.stack(columns) * w

    def share(index: np.ndarray) -> np.ndarray:
        """Of resamples [resample, record]."""
        means = stacked[:, index].sum(-1) / w[index].sum(-1)
        r = means[2:].max(0)
        room = means[1] - r
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(room > 1e-9, np.maximum(0.0, (means[0] - r) / room), np.nan)

    n = len(w)
    (point,) = share(np.arange(n)[None])
    if np.isnan(point):
        return Recovery(None, None, None)
    rng = np.random.default_rng(seed)
    step = max(1, 1_000_000 // n)  # bounds the memory of the index table
    draws = [share(rng.integers(0, n, (min(step, _RESAMPLES - at), n))) for at in range(0, _RESAMPLES, step)]
    low, high = np.nanpercentile(np.concatenate(draws), [2.5, 97.5])
    return Recovery(float(point), float(low), float(high))
