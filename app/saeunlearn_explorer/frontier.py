"""The frontier of a run's Erasures: what is left of the forget set against what is left of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from saeunlearn import figures
from saeunlearn.evaluation.meaning import is_number
from saeunlearn.labels import half_widths

from .pieces import join, note, picture, score, table


def points(documents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A point a document of `removal.gather`, and the original: the worst group on each side, with its interval.

    Only documents whose headlines use the first one's metrics are comparable; the others are left out.
    """
    out: list[dict[str, Any]] = []
    kinds: list[str] = []
    for name, doc in documents.items():
        sides = {h["forget"]: h for h in doc["headlines"]}
        if len(sides) < 2 or (kinds and [sides[True]["metric"], sides[False]["metric"]] != kinds):
            continue
        if not kinds:
            kinds = [sides[True]["metric"], sides[False]["metric"]]
            out.append({"name": "original", **_ends(sides, "before")})
        out.append({"name": name, **_ends(sides, "after")})
    return [{**p, "metrics": kinds} for p in out]


def _ends(sides: Mapping[bool, Mapping[str, Any]], when: str) -> dict[str, Any]:
    return {
        axis: [sides[forget].get(key) for key in (when, f"{when}_low", f"{when}_high")]
        for axis, forget in (("x", False), ("y", True))
    }


def frontier(documents: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The figure with its table."""
    found = points(documents)
    if not found:
        return note("There is no forget and retain score to draw.", "info")
    of_forget, of_retain = found[0]["metrics"]
    drawn = [{"label": p["name"], "series": p["name"], **_drawn("x", p["x"]), **_drawn("y", p["y"])}
             for p in found if is_number(p["x"][0]) and is_number(p["y"][0])]  # fmt: skip
    fig = figures.frontier(
        drawn,
        retain=f"retain: {of_retain}, the group that lost most ({_better(of_retain, 'right')})",
        forget=f"forget: {of_forget}, the best remembered group ({_better(of_forget, 'down')})",
    )
    rows = [(p["name"], _told(p["x"], of_retain), _told(p["y"], of_forget)) for p in found]
    legend = table(["", "retain: lost most", "forget: best remembered"], rows, right=[1, 2], label="frontier")
    return join([picture(fig, "Forget against retain score; the table below has the numbers"), legend])


def _drawn(axis: str, ends: list[Any]) -> dict[str, Any]:
    """A value and its interval as `figures.frontier` takes them."""
    value, low, high = ends
    known = is_number(low) and is_number(high)
    return {axis: value, f"{axis}_err": half_widths(value, low, high) if known else None}


def _told(ends: list[Any], metric: str) -> str:
    value, low, high = ends
    return score(value, metric) + (f" ({score(low, metric)} … {score(high, metric)})" if is_number(low) else "")


def _better(metric: str, where: str) -> str:
    """A loss is better where a share correct is worse."""
    turned = {"right": "left", "down": "up"}
    return f"{turned[where] if metric.lower().startswith('nll') else where} is better"
