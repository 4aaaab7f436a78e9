"""Intervals and paired tests over runs (world and seed) and questions.

One resample draws the runs with replacement (the same for all methods, so that they stay paired), and the questions of
each case with replacement within their groups (the same for all methods and all runs of that case). Strengths, settings
and worlds are not chosen anew. With few runs a bootstrap is too sure: with n of them its variance is that of n by
(n − 1) / n too small (with 5 an interval about a tenth too short).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from ..progress import Progress
from .points import Sheet, measures

K = TypeVar("K", bound=Hashable)
RESAMPLES = 10_000
_CHUNK = 1000  # at a time, which bounds the memory


def resample(sheets: Mapping[str, Sheet], cases: Sequence[str], answers: Mapping[K, Sequence[Sequence[float]]],
             seed: int, progress: Progress | None = None) -> dict[K, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """{name: (forgetting, retention)}, each [RESAMPLES]: means over the runs drawn.

    `cases`: the case of each run; `answers`: per name, for each run, what was answered right of its case's questions.
    """
    rng, b = np.random.default_rng(seed), _CHUNK
    out: dict[K, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in answers}
    for _ in (progress or Progress()).over(range(RESAMPLES // b), "resampling"):
        weights = {case: _weights(sheets[case].groups, b, rng) for case in dict.fromkeys(cases)}
        runs = rng.integers(0, len(cases), (b, len(cases)))
        for name, values in answers.items():
            both = [measures(sheets[c], v, weights[c]) for c, v in zip(cases, values)]
            for kept, column in zip(out[name], zip(*both)):
                table = np.stack(column, axis=1)  # [b, runs]
                kept.append(np.take_along_axis(table, runs, 1).mean(1))
    return {name: (np.concatenate(f), np.concatenate(r)) for name, (f, r) in out.items()}


def _weights(groups: Sequence[str], b: int, rng: np.random.Generator) -> np.ndarray:
    """[b, questions]: how often each question was drawn, as many of each group as there are."""
    labels = np.asarray(groups)
    out = np.empty((b, len(labels)))
    for name in sorted(set(groups)):
        at = np.flatnonzero(labels == name)
        out[:, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=b)
    return out


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def paired_tests(drawn: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Every pair of methods: {"first", "second", "low", "high" (of first − second), "p", "p_holm"}.

    p: two-sided from the paired bootstrap, 2 · the smaller share of resamples in which the sign is the other (ties on
    either side, and one more than were seen, so that it is never 0). Holm's correction over all the pairs given.
    """
    rows: list[dict[str, Any]] = []
    for a, b in combinations(drawn, 2):
        d = drawn[a] - drawn[b]
        less = min(int((d <= 0).sum()), int((d >= 0).sum()))
        low, high = interval(d)
        rows.append({"first": a, "second": b, "low": low, "high": high, "p": min(1.0, 2 * (less + 1) / (len(d) + 1))})
    for row, p in zip(rows, holm([r["p"] for r in rows])):
        row["p_holm"] = p
    return rows


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): the i-th smallest of m times m − i + 1, made monotone, at most 1."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out
