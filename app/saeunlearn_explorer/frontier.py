"""The frontier of a run's Erasures: what is left of the forget set against what is left of the rest, drawn as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from saeunlearn.evaluation.meaning import is_number

from .pieces import join, note, number, score, table

WIDTH, HEIGHT, LEFT, BELOW = 420.0, 250.0, 46.0, 34.0
SHAPES = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>',
    '<rect x="{x:.1f}" y="{y:.1f}" width="11" height="11" transform="translate(-5.5 -5.5)"/>',
    '<path d="M{x:.1f} {y:.1f}m0 -7l7 12h-14z"/>',
    '<path d="M{x:.1f} {y:.1f}m-7 0l7 -7l7 7l-7 7z"/>',
)


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
    """The drawing with its table."""
    found = points(documents)
    if not found:
        return note("There is no forget and retain score to draw.", "info")
    of_forget, of_retain = found[0]["metrics"]
    x, y = (_scale([v for p in found for v in p[axis] if is_number(v)], metric)
            for axis, metric in (("x", of_retain), ("y", of_forget)))  # fmt: skip
    parts = [_axes(x, y, of_retain, of_forget)]
    for i, p in enumerate(found):
        at = {"x": _along(p["x"][0], x, LEFT, WIDTH - 14), "y": _along(p["y"][0], y, HEIGHT - BELOW, 12)}
        kind = f"series s{i % 6}"
        for axis, low, high in (("x", *p["x"][1:]), ("y", *p["y"][1:])):
            if is_number(low) and is_number(high):
                parts.append(_whisker(axis, low, high, at, x, y, kind))
        said = f"{p['name']}: retain {score(p['x'][0], of_retain)}, forget {score(p['y'][0], of_forget)}"
        parts.append(
            Markup('<g class="{}"><title>{}</title>{}</g>').format(kind, said, Markup(SHAPES[i % 4]).format(**at))
        )
    rows = [(Markup('<svg class="key" viewBox="-9 -9 18 18"><g class="series s{}">{}</g></svg> {}').format(
        i % 6, Markup(SHAPES[i % 4]).format(x=0, y=0), p["name"]), _told(p["x"], of_retain), _told(p["y"], of_forget))
        for i, p in enumerate(found)]  # fmt: skip
    said = f"retain ({of_retain}) to the right, forget ({of_forget}) upwards; the table below has the numbers"
    drawing = Markup('<svg class="plot" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, said, join(parts))  # fmt: skip
    legend = table(["", "retain: lost most", "forget: best remembered"], rows, right=[1, 2], label="frontier")
    return join([drawing, legend])


def _told(ends: list[Any], metric: str) -> str:
    value, low, high = ends
    return score(value, metric) + (f" ({score(low, metric)} … {score(high, metric)})" if is_number(low) else "")


def _scale(values: list[float], metric: str) -> tuple[float, float]:
    if not _is_loss(metric):
        return -0.02, 1.02
    room = (max(values) - min(values)) * 0.08 or 1.0
    return min(values) - room, max(values) + room


def _along(value: Any, scale: tuple[float, float], start: float, end: float) -> float:
    share = (value - scale[0]) / (scale[1] - scale[0]) if is_number(value) else 0.0
    return start + (end - start) * share


def _whisker(axis: str, low: float, high: float, at: Mapping[str, float], x: tuple[float, float],
             y: tuple[float, float], kind: str) -> Markup:  # fmt: skip
    if axis == "x":
        ends = [_along(v, x, LEFT, WIDTH - 14) for v in (low, high)]
        return Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
            kind, *ends, y=at["y"]
        )
    ends = [_along(v, y, HEIGHT - BELOW, 12) for v in (low, high)]
    return Markup('<line class="{}" x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(kind, *ends, x=at["x"])


def _axes(x: tuple[float, float], y: tuple[float, float], of_retain: str, of_forget: str) -> Markup:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        there = [v[0] + (v[1] - v[0]) * share for v in (x, y)] if x[0] != -0.02 else [share, share]
        if y[0] != -0.02:
            there[1] = y[0] + (y[1] - y[0]) * share
        px, py = _along(there[0], x, LEFT, WIDTH - 14), _along(there[1], y, HEIGHT - BELOW, 12)
        parts.append(
            Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="12" y2="{1}"/>').format(px, HEIGHT - BELOW)
        )
        parts.append(
            Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(LEFT, WIDTH - 14, py)
        )
        parts.append(Markup('<text x="{:.1f}" y="{}">{}</text>').format(px, HEIGHT - BELOW + 13, number(there[0], 2)))
        parts.append(
            Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 5, py + 3, number(there[1], 2))
        )
    parts.append(Markup('<text x="{:.0f}" y="{}">retain, {} ({} is better)</text>').format(
        (LEFT + WIDTH) / 2, HEIGHT - 4, of_retain, "left" if _is_loss(of_retain) else "right"))  # fmt: skip
    parts.append(
        Markup('<text transform="translate(10 {:.0f}) rotate(-90)">forget, {}</text>').format(
            (HEIGHT - BELOW) / 2, of_forget
        )
    )
    return join(parts)


def _is_loss(metric: str) -> bool:
    return metric.lower().startswith("nll")
