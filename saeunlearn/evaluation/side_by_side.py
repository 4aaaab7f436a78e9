"""Finished edits of one model side by side: the frontier over strength, with intervals.

No tuning: `frontier` (the module) compares at an equal tuning budget, this shows what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ..corpus import Corpus
from ..erasure import Erasure
from ..errors import ConfigError
from ..labels import half_widths
from ..models import LanguageModel
from ..progress import Progress
from .points import STRENGTHS, point_at, sheet_of
from .resampling import interval, paired_tests, resample

_CASE = "questions"


def side_by_side(
    model: LanguageModel, questions: Corpus, erasures: Mapping[str, Sequence[Erasure]], *,
    oracle: LanguageModel | None = None, strengths: Sequence[float] = STRENGTHS, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every Erasure at every strength (1: as it was made), and what that says of each method.

        {"floor": "oracle" | "chance", "strengths",
         "methods": {name: [{"strength", "runs": [{"strength", "forgetting", "retention", "groups", "values"}],
                             "forgetting": {"mean", "low", "high"}, "retention": …} by strength]},
         "tests": {"forgetting" | "retention": `resampling.paired_tests` at the first strength}}

    `erasures`: {method: [one a run]}, as many runs of each, paired in order. Forgetting and retention as in
    `points.measures`; 95 % intervals over runs and questions (`resampling`). Raises ConfigError for unequal numbers of
    runs, and what `points.sheet_of` raises.
    """
    counts = {len(e) for e in erasures.values()}
    if len(counts) != 1 or not min(counts) or not strengths:
        raise ConfigError("side by side need the same number of runs of every method, at least one, and a strength")
    sheet = sheet_of(model, questions, oracle, progress)
    points = {(m, s): [point_at(model, questions, sheet, e, s, progress) for e in found]
              for m, found in erasures.items() for s in strengths}  # fmt: skip
    answers = {key: [p["values"] for p in runs] for key, runs in points.items()}
    drawn = resample({_CASE: sheet}, [_CASE] * counts.pop(), answers, seed, progress)

    def summary(key: tuple[str, float], at: int, name: str) -> dict[str, float]:
        low, high = interval(drawn[key][at])
        return {"mean": mean(p[name] for p in points[key]), "low": low, "high": high}

    outcomes = ("forgetting", "retention")
    return {
        "floor": sheet.floor_is, "strengths": list(strengths),
        "methods": {m: [{"strength": s, "runs": points[m, s],
                         **{o: summary((m, s), at, o) for at, o in enumerate(outcomes)}} for s in strengths]
                    for m in erasures},
        "tests": {o: paired_tests({m: drawn[m, strengths[0]][at] for m in erasures})
                  for at, o in enumerate(outcomes)},
    }  # fmt: skip


def frontier_points(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For `figures.frontier`: what is left of the forget knowledge against retention, a point a strength."""
    return [point_of(m, p["forgetting"], p["retention"]) for m, row in document["methods"].items() for p in row]


def point_of(series: str, f: Mapping[str, float], r: Mapping[str, float]) -> dict[str, Any]:
    """A point of `figures.frontier` from {"mean", "low", "high"} of forgetting and of retention."""
    return {"series": series, "label": "", "x": r["mean"], "y": 1 - f["mean"],
            "x_err": half_widths(r["mean"], r["low"], r["high"]),
            "y_err": half_widths(1 - f["mean"], 1 - f["high"], 1 - f["low"])}  # fmt: skip
