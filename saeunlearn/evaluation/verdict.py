"""Forgotten means like the oracle, both ways: neither above what the retrained model scores, nor far below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .evaluate import is_forget, wilson

MARGIN = 0.05  # a difference in accuracy that counts as none
JUDGED = ("multiple_choice", "cloze")  # likelihood and generation, told apart


def verdict(
    original: Sequence[float],
    unlearned: Sequence[float],
    oracle: Sequence[float],
    *,
    forget: bool = True,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """The verdict on one group of questions, scored 0 or 1 by three models, in the same order.

    Forget groups: "like the oracle" where the accuracy is within `margin` of the oracle's, "still there" above,
    "suppressed" below; "no test" where it is not below and the original itself is no more than `margin` above the
    oracle. Other groups: "kept", or "damaged" where it is more than `margin` below the oracle's.

    The difference decides. Its 95 % interval, paired over questions, says how sure that is: `certain` only where the
    whole interval lies on the verdict's side of the margin; otherwise more questions are needed.

    Returns {"verdict", "certain", "n", "original", "unlearned", "oracle" (accuracies), "difference" (unlearned −
    oracle), "low", "high", "margin", "forgotten": (original − unlearned) / (original − oracle), None without a gap}.
    Raises ConfigError for sequences of different lengths, empty, or not of 0 and 1.
    """
    n = len(oracle)
    if not n or len(original) != n or len(unlearned) != n:
        raise ConfigError(f"{len(original)}, {len(unlearned)} and {n} scores: all models need the same questions")
    if any(v not in (0, 1) for row in (original, unlearned, oracle) for v in row):
        raise ConfigError("a verdict needs right (1) or wrong (0) for every question")
    first, now, never = (sum(row) / n for row in (original, unlearned, oracle))
    difference = now - never
    low, high = paired_interval(unlearned, oracle)
    slack = 1e-9  # .35 − .30 is a little more than .05 in binary
    above, below = difference > margin + slack, difference < -margin - slack
    if below:
        said, certain = ("suppressed" if forget else "damaged"), high < -margin
    elif forget and first - never <= margin + slack:
        said, certain = "no test", False
    elif above and forget:
        said, certain = "still there", low > margin
    else:
        said = "like the oracle" if forget else "kept"
        certain = low >= -margin and (high <= margin or not forget)
    gap = first - never
    return {
        "verdict": said, "certain": certain, "n": n, "original": first, "unlearned": now, "oracle": never,
        "difference": difference, "low": low, "high": high, "margin": margin,
        "forgotten": (first - now) / gap if forget and gap > 0 else None,
    }  # fmt: skip


def verdicts(original: Mapping[str, Any], unlearned: Mapping[str, Any], oracle: Mapping[str, Any]) -> list[dict]:
    """`verdict` for every group of three results of `evaluate`, each row with its "group" and "metric".

    Raises ConfigError where they were not measured on the same records.
    """
    rows = []
    for group in original["groups"]:
        for metric in JUDGED:
            found = [d["groups"].get(group, {}).get(metric) for d in (original, unlearned, oracle)]
            if found[0] is None:
                continue
            if any(m is None or m["ids"] != found[0]["ids"] for m in found):
                raise ConfigError(f"{group} {metric}: the three models were not measured on the same records")
            scores = [m["values"] for m in found]
            rows.append({"group": group, "metric": metric, **verdict(*scores, forget=is_forget(group))})
    return rows


def judged(row: Mapping[str, Any]) -> str:
    """The verdict of a row in words, with how sure it is."""
    unsure = not row["certain"] and row["verdict"] != "no test"
    return str(row["verdict"]) + (f"; too few questions to be sure (n = {row['n']})" if unsure else "")


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % interval of mean(first) − mean(second), both 0 or 1 on the same questions (Newcombe 1998, method 10).

    Made of the two Wilson intervals and the correlation of the pairs, so it has a width also where no pair differs.
    """
    n = len(first)
    both = sum(a and b for a, b in zip(first, second))
    x, y = sum(first), sum(second)
    neither = n - x - y + both
    product, cross = both * neither, (x - both) * (y - both)
    excess = product - cross
    if excess > 0:
        excess = max(0.0, excess - n / 2)  # the paper's continuity correction
    spread = x * (n - x) * y * (n - y)
    phi = excess / math.sqrt(spread) if spread else 0.0
    p, q = x / n, y / n
    (p_low, p_high), (q_low, q_high) = wilson(x, n), wilson(y, n)

    def width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q - width(p - p_low, q_high - q), p - q + width(p_high - p, q - q_low)
