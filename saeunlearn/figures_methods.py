"""Figures of several methods side by side, in the look of `figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import _MARKERS, _SERIES, BLACK, FORGET, GREY, RETAIN, _figure, _finish, _say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PANELS = 5  # beside each other


def scores(rows: Sequence[Mapping[str, Any]], levels: Mapping[str, Mapping[str, float]] | None = None) -> Figure:
    """Scores by method, a panel a measure: a dot a run, a bar from the least to the greatest, a tick at the mean.

    Row: {"method", "measure", "runs": [value of each], "forget": bool}. `levels`: {measure: {name: value}}, drawn as
    lines (original, oracle, chance …).
    """
    methods, measures = (list(dict.fromkeys(r[k] for r in rows)) for k in ("method", "measure"))
    columns = min(PANELS, max(1, len(measures)))
    lines = max(1, math.ceil(len(measures) / columns))
    fig = _figure(1.75 * columns + 1.4, (0.25 * len(methods) + 0.85) * lines + 0.5)
    if not rows:
        _say(fig, "no method was measured")
        return _finish(fig)
    axes = fig.subplots(lines, columns, sharey=True, squeeze=False).flat
    names = list(dict.fromkeys(n for v in (levels or {}).values() for n in v))
    styles: dict[str, Any] = dict(zip(names, ("-", ":", "--", "-.")))
    for ax, measure in zip(axes, measures):
        for r in (r for r in rows if r["measure"] == measure):
            y, colour = methods.index(r["method"]), FORGET if r["forget"] else RETAIN
            ax.plot([min(r["runs"]), max(r["runs"])], [y, y], color=colour, linewidth=1.6)
            ax.plot(r["runs"], [y] * len(r["runs"]), ".", color=colour, markersize=5, alpha=0.7)
            ax.plot([sum(r["runs"]) / len(r["runs"])], [y], "|", color=BLACK, markersize=11)
        for name, value in (levels or {}).get(measure, {}).items():
            ax.axvline(value, color=GREY, linestyle=styles[name], linewidth=1, zorder=0)
        ax.set(title=measure, xlim=(-0.04, 1.04), xlabel="share correct", xticks=[0, 0.5, 1])
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.7)
        ax.set_axisbelow(True)
    for ax in axes[len(measures) :]:
        ax.remove()
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=GREY, linestyle=s, label=n) for n, s in styles.items()]
    handles += [Line2D([], [], color=FORGET, marker=".", label="forget"), Line2D([], [], color=RETAIN, marker=".",
                label="near and far"), Line2D([], [], color=BLACK, marker="|", linestyle="none", markersize=9,
                label="mean of the runs")]  # fmt: skip
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return _finish(fig)


def recovered(documents: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Recovered share by attack, one marker a method, with 95 % intervals over questions; attacks by their worst case.

    `documents`: {method: attacks.json}. Attacks that were not made on all of them are left out.
    """
    tried = [{a["name"] for a in d["attacks"] if "best" in a} for d in documents.values()]
    found = {m: {a["name"]: a["best"] for a in d["attacks"] if "best" in a and a["best"]["recovered"] is not None}
             for m, d in documents.items()}  # fmt: skip
    common = set.intersection(*tried) & {n for v in found.values() for n in v} if tried else set()
    worst = {n: max(v[n]["recovered"] for v in found.values() if n in v) for n in common}
    names = sorted(common, key=lambda n: (n != "none", -worst[n], n))
    fig = _figure(6.8, 0.17 * max(3, len(found)) * max(1, len(names)) + 1.5)
    if not names:
        _say(fig, "no attack was carried out")
        return _finish(fig)
    ax = fig.add_subplot()
    for i, (method, attacks) in enumerate(found.items()):
        shift = 0.8 * ((i + 0.5) / len(found) - 0.5)
        for n, name in enumerate(names):
            if (best := attacks.get(name)) is not None:
                ax.plot([best["recovered_low"], best["recovered_high"]], [n + shift] * 2, color=_SERIES[i % 8],
                        linewidth=1.4)  # fmt: skip
                ax.plot([best["recovered"]], [n + shift], _MARKERS[i % 8], color=_SERIES[i % 8], markersize=5)
        ax.plot([], [], _MARKERS[i % 8], color=_SERIES[i % 8], label=method)
    for n in range(len(names) - 1):
        ax.axhline(n + 0.5, color="#E5E5E5", linewidth=0.8)
    ax.axvline(0, color=BLACK, linewidth=0.9)
    ax.axvline(1, color=BLACK, linewidth=0.9, linestyle="--")
    ax.set_yticks(range(len(names)), ["no attack" if n == "none" else n for n in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set(xlabel="recovered share (0: the oracle after the same attack, 1: the original)")
    ax.set_title("What each attack brings back")
    fig.legend(loc="outside lower center", ncols=min(5, len(found)))
    return _finish(fig)
