"""Published claims beside what was measured: a verdict that follows from numbers, one a claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..errors import ConfigError

CONFIRMED, NOT_CONFIRMED, UNSURE, NOT_TESTABLE = "confirmed", "not confirmed", "unsure", "not testable here"


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, and what stands for it here.

    `values`: what was measured, one a run, or None where nothing here can say anything, and then `measured` says why.
    The claim holds in a run whose value is at least `at_least` and at most `at_most`.
    """

    system: str
    says: str
    measured: str
    values: Sequence[float] | None = None
    at_least: float | None = None
    at_most: float | None = None

    def holds(self) -> list[bool]:
        """In each run. Raises ConfigError where nothing was measured, or there is no bound to measure against."""
        if not self.values or (self.at_least is None and self.at_most is None):
            raise ConfigError(f"{self.system}, {self.says!r}: a verdict needs values and a bound")
        low, high = (x if x is not None else s * float("inf") for x, s in ((self.at_least, -1), (self.at_most, 1)))
        return [low <= v <= high for v in self.values]


def less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How much smaller `a` is than `b`, run by run (as many as both have)."""
    return [y - x for x, y in zip(a, b)]


def verdict(claim: Claim) -> str:
    """CONFIRMED where the claim holds in every run, NOT_CONFIRMED where in none, else UNSURE; NOT_TESTABLE without
    values. It is about this model and data at this scale, never about the paper's."""
    if claim.values is None:
        return NOT_TESTABLE
    held = claim.holds()
    return CONFIRMED if all(held) else UNSURE if any(held) else NOT_CONFIRMED


def judge(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """[{"system", "says", "measured", "n": runs, "mean", "low", "high": least and greatest, "bound", "verdict"}]; the
    numbers are None where nothing was measured."""
    rows = []
    for c in claims:
        bounds = [f"{sign} {x:.3g}" for sign, x in (("≥", c.at_least), ("≤", c.at_most)) if x is not None]
        numbers = (mean(c.values), min(c.values), max(c.values)) if c.values else (None, None, None)
        rows.append({"system": c.system, "says": c.says, "measured": c.measured, "n": len(c.values or ()),
                     **dict(zip(("mean", "low", "high"), numbers)), "bound": " and ".join(bounds),
                     "verdict": verdict(c)})  # fmt: skip
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `judge` as a Markdown table."""
    lines = ["| system | published | measured here | mean (least … greatest), runs | holds where | verdict |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        found = "–" if r["mean"] is None else f"{r['mean']:.3g} ({r['low']:.3g} … {r['high']:.3g}), {r['n']}"
        cells = (r["system"], r["says"], r["measured"], found, r["bound"] or "–", f"**{r['verdict']}**")
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)
