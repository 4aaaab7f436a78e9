"""Figures of attacks.json, in the look of `figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import _LINES, _MARKERS, _SERIES, BLACK, FORGET, GREY, _figure, _finish, _say, series_looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNITS = {"accuracy": "share correct on V", "nll": "loss on V (nats per token)"}


def attacks(document: Mapping[str, Any]) -> Figure:
    """Recovered share of each attack with its interval, and the scores of unlearned model and oracle beside it."""
    rows = [a for a in document["attacks"] if "best" in a]
    if not rows:
        fig = _figure(6.4, 2)
        _say(fig, "no attack was carried out")
        return _finish(fig)
    metric = document["metric"]
    fig = _figure(8.4, 0.3 * len(rows) + 1.7)
    left, right = fig.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        best = row["best"]
        if best["recovered"] is None:
            left.text(0, i, " not measurable", va="center", color=GREY, fontsize=8)
        else:
            left.plot([best["recovered_low"], best["recovered_high"]], [i, i], color=FORGET, linewidth=1.6)
            left.plot([best["recovered"]], [i], "D", color=FORGET, markersize=5)
        if (oracle := best.get(f"oracle_{metric}")) is not None:
            left.plot([best["oracle_recovered"] or 0.0], [i], "o", color=GREY, markersize=5, zorder=1)
            right.plot([oracle], [i + 0.15], "o", color=GREY, markersize=5)
        right.plot([best["low"], best["high"]], [i - 0.15] * 2, color=FORGET, linewidth=1.6)
        right.plot([best[metric]], [i - 0.15], "D", color=FORGET, markersize=5)
    left.set_yticks(range(len(rows)), [r["name"] for r in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    highest = max([1.0, *(r["best"]["recovered_high"] or 0.0 for r in rows)])
    left.set(xlim=(-0.04, 1.04 * highest), xlabel="recovered share (1: the original)", title="Recovered by the attack")
    right.set(xlabel=_UNITS[metric], title="Score after the attack")
    right.axvline(document["levels"]["original"][metric], color=BLACK, linewidth=0.9, label="original")
    if document["chance"] is not None:
        right.axvline(document["chance"], color=BLACK, linewidth=0.9, linestyle=":", label="chance")
        right.set_xlim(-0.03, 1.03)
    right.plot([], [], "D", color=FORGET, label="unlearned model")
    if document["oracle"]:
        right.plot([], [], "o", color=GREY, label="oracle")
    for ax in (left, right):
        ax.grid(axis="x", color="#E5E5E5", linewidth=0.7)
        ax.set_axisbelow(True)
    fig.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return _finish(fig)


def relearning(document: Mapping[str, Any]) -> Figure:
    """Score on V along the steps of each fine-tuning; grey, with the same marker: the oracle's."""
    rows = [a for a in document["attacks"] if a["kind"] == "relearning" and "best" in a]
    metric, levels = document["metric"], document["levels"]
    fig = _figure(3.1 * max(1, len(rows)) + 0.4, 4.2)
    if not rows:
        _say(fig, "no relearning was carried out")
        return _finish(fig)
    for at, row in enumerate(rows):
        ax = fig.add_subplot(1, len(rows), at + 1)
        for n, tried in enumerate(row["tried"]):
            s = tried["settings"]
            style: dict[str, Any] = {
                "marker": _MARKERS[n % 8],
                "linestyle": _LINES[n % 4],
                "markersize": 3.5,
                "linewidth": 1.2,
            }
            for name, colour in (("oracle_curve", GREY), ("curve", _SERIES[n % 8])):
                points = tried.get(name) or []
                label = f"{s['lr']:g}, {s['samples']} records" if name == "curve" else None
                ax.plot([p["step"] for p in points], [p[metric] for p in points], color=colour, label=label, **style)
        ax.axhline(levels["original"][metric], color=BLACK, linewidth=0.9)
        if document["chance"] is not None:
            ax.axhline(document["chance"], color=BLACK, linewidth=0.9, linestyle=":")
            ax.set_ylim(-0.03, 1.03)
        ax.set(title=row["name"], xlabel="step", ylabel=_UNITS[metric] if at == 0 else "")
        ax.legend(title="learning rate", title_fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2))
    return _finish(fig)


def kept_against_relearned(points: Sequence[Mapping[str, Any]], oracle: float, chance: float) -> Figure:
    """Points {"name", "kept", "relearned", "edited"}: what is kept of the worst retain group against the score on
    other forget facts after the best relearning, with a line down to the score before it. Below, right: the aim.
    """
    names = list(dict.fromkeys(p["name"] for p in points))
    fig = _figure(5.6, 3.4 + 0.17 * math.ceil((len(names) + 2) / 3))  # the legend stands below
    ax = fig.subplots()
    for i, name in enumerate(names):
        own = [p for p in points if p["name"] == name]
        colour, marker = series_looks(i)
        for p in own:
            ax.plot([p["kept"]] * 2, [p["edited"], p["relearned"]], color=colour, linewidth=0.9)
        ax.plot([p["kept"] for p in own], [p["relearned"] for p in own], marker, color=colour, label=name)
    ax.axhline(oracle, color=GREY, linewidth=1.2, linestyle="--", label="oracle, relearned")
    ax.axhline(chance, color=BLACK, linewidth=0.9, linestyle=":", label="chance")
    ax.set(xlabel="kept of the worst near or far group (share of the original)", ylim=(0, 1.03))
    ax.set(ylabel="share correct on other forget facts", title="After relearning; the lines begin before it")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _finish(fig)


def over_compute(points: Sequence[Mapping[str, Any]], oracle: float, chance: float) -> Figure:
    """Points {"name", "compute", "kept", "relearned"}: what is relearned, and what is kept of the worst retain group,
    over the compute as a share of the oracle's training. Names that differ in a number at their end share a line.
    """
    fig = _figure(8.4, 3.8)
    axes = fig.subplots(1, 2)
    families: dict[str, list[Mapping[str, Any]]] = {}
    for p in points:
        families.setdefault(p["name"].rstrip("0123456789").rstrip("-"), []).append(p)
    for i, (name, own) in enumerate(families.items()):
        own.sort(key=lambda p: p["compute"])
        colour, marker = series_looks(i)
        for ax, key in zip(axes, ("relearned", "kept")):
            ax.plot([p["compute"] for p in own], [p[key] for p in own], marker, linestyle="-", linewidth=0.9,
                    color=colour, label=name)  # fmt: skip
    for ax, level in zip(axes, (oracle, 1.0)):
        ax.plot([1.0], [level], "*", markersize=11, color=GREY, label="oracle")
        ax.axvline(0.2, color=GREY, linewidth=0.9, linestyle="--")
        ax.set(xlim=(0, max(1.0, *(p["compute"] for p in points)) * 1.06), ylim=(0, 1.03))
        ax.set(xlabel="compute (share of the oracle's training)")
    axes[0].axhline(chance, color=BLACK, linewidth=0.9, linestyle=":", label="chance")
    axes[0].set(title="After the best relearning", ylabel="share correct on other forget facts")
    axes[1].set(title="Kept of the worst near or far group", ylabel="share of the original")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return _finish(fig)
