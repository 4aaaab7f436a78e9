"""Labels of points in a figure, placed so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def place_labels(fig: Figure, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the labels of a frontier's points, each at the free place nearest to its point."""
    from matplotlib.transforms import Bbox

    ax = fig.axes[0]
    fig.draw_without_rendering()  # the layout, and so the places in pixels, is known only after a drawing
    fig.set_layout_engine("none")
    unit = fig.dpi / 72

    def box(p: Mapping[str, Any], dx: float, dy: float) -> Any:
        """Pixels covered by a point: its marker, and dx, dy pixels around its error bars."""
        ends = [
            (p["x"] - half(p.get("x_err"), 0), p["y"] - half(p.get("y_err"), 0)),
            (p["x"] + half(p.get("x_err"), 1), p["y"] + half(p.get("y_err"), 1)),
        ]
        (x0, y0), (x1, y1) = ax.transData.transform(ends)
        x, y = ax.transData.transform((p["x"], p["y"]))
        return [Bbox([[x0, y - dy], [x1, y + dy]]), Bbox([[x - dx, y0], [x + dx, y1]])]

    taken = [b for p in points for b in box(p, 4 * unit, 4 * unit)]
    sides = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    offsets = [(sx * 5 * far, sy * 5 * far) for far in (1, 2, 3, 4, 6) for sx, sy in sides]
    for p in points:
        if not p.get("label"):
            continue
        tries = []
        for dx, dy in offsets:
            text = ax.annotate(
                p["label"],
                (p["x"], p["y"]),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="bottom" if dy > 0 else "top",
                fontsize=7.5,
            )
            where = text.get_window_extent()
            inside = ax.bbox.containsx(where.x0) and ax.bbox.containsx(where.x1)
            tries.append((where.count_overlaps(taken) + (not inside), text, where))
        best = min(tries, key=lambda t: t[0])
        for t in tries:
            if t is not best:
                t[1].remove()
        taken.append(best[2])


def half(error: Any, side: int) -> float:
    if error is None:
        return 0.0
    return float(error[side]) if isinstance(error, Sequence) else float(error)


def half_widths(mean: float, low: float, high: float) -> tuple[float, float]:
    """How far an interval reaches below and above its point: a percentile interval can lie to one side of the mean."""
    return max(0.0, mean - low), max(0.0, high - mean)
