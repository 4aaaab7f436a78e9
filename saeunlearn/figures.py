"""Every figure of the toolkit: takes data, returns a matplotlib Figure (Agg, no pyplot, no global state).

Colours are the Okabe–Ito palette, which people with colour-vision deficiencies can tell apart; series differ
in marker or hatching too.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import half, place_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
FORGET, RETAIN = VERMILION, BLUE  # one meaning each, in every figure
_SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")


def layer_table(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of every layer score, and of every probe result, by layer; the chosen layer is highlighted.

    Row: {"layer": int, "scores": {name: float}, "probe": {name: float} | None, "chosen": bool}. Among the
    probe's names "forget_rise" is in nats per token, other "…_rise" are fractions.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = sorted(rows, key=lambda r: r["layer"])
    panels: dict[tuple[str, str], list[float]] = {}
    for kind in ("scores", "probe"):
        for name in dict.fromkeys(n for r in rows for n, v in (r.get(kind) or {}).items() if _is_number(v)):
            found = [(r.get(kind) or {}).get(name, math.nan) for r in rows]
            panels[kind, name] = [float(v) if _is_number(v) else math.nan for v in found]
    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    fig = _figure(2.7 * columns + 0.4, 2.2 * lines + 0.5)
    every = math.ceil(len(rows) / 12)  # more labels would collide
    for at, ((kind, name), values) in enumerate(panels.items()):
        ax = fig.add_subplot(lines, columns, at + 1)
        for i, (r, v) in enumerate(zip(rows, values)):
            if math.isnan(v):
                ax.plot([i], [0], "x", color=GREY, markersize=4, clip_on=False)
            else:
                colour, hatch = (ORANGE, "//") if r["chosen"] else (SKY, None)
                ax.bar(i, v, color=colour, hatch=hatch, edgecolor="white")
        ax.set_xticks(range(0, len(rows), every), [str(r["layer"]) for r in rows[::every]])
        ax.set_xlim(-0.6, len(rows) - 0.4)
        ax.margins(y=0.12)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_title(("probe: " if kind == "probe" else "") + name.replace("_", " "))
        ax.set(xlabel="layer", ylabel=_probe_unit(name) if kind == "probe" else "score")
    if not panels:
        _say(fig, "no layer was scored")
        return _finish(fig)
    handles: list[Any] = [Patch(facecolor=ORANGE, hatch="//", edgecolor="white", label="chosen layer")]
    if any(math.isnan(v) for values in panels.values() for v in values):
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="none", label="not measured"))
    fig.legend(handles=handles, loc="outside upper right", ncols=2)
    return _finish(fig)


def feature_scores(
    forget_scores: Sequence[float],
    retain_scores: Sequence[float],
    relevant: Sequence[int],
    irrelevant: Sequence[int],
) -> Figure:
    """Mean squared activation of every feature on forget against retain text, both axes logarithmic.

    Scores are indexed by feature; features that never fire on one side are drawn at that axis's edge.
    """
    import numpy as np

    x, y = np.asarray(retain_scores, float), np.asarray(forget_scores, float)
    fig = _figure(5.6, 4.6)
    ax = fig.add_subplot()
    positive = np.concatenate([x[x > 0], y[y > 0]])
    if not len(positive):
        _say(fig, "no feature fires")
        return _finish(fig)
    floor, top = float(positive.min()) / 3, float(positive.max()) * 3
    x, y = np.maximum(x, floor), np.maximum(y, floor)
    role = np.zeros(len(x), dtype=int)
    role[list(irrelevant)], role[list(relevant)] = 1, 2
    live = (x > floor) | (y > floor)
    styles = (
        ("other live", GREY, ".", 12, 0.5),
        ("irrelevant", BLUE, "v", 26, 0.9),
        ("relevant", FORGET, "o", 34, 0.95),
    )
    for i, (name, colour, marker, size, alpha) in enumerate(styles):
        pick = (role == i) & live
        label = f"{name} ({pick.sum():,})"
        ax.scatter(x[pick], y[pick], s=size, c=colour, marker=marker, alpha=alpha, linewidths=0, label=label)
    ax.plot([floor, top], [floor, top], color=BLACK, linewidth=0.8, linestyle="--", label="equal")
    ax.set(xscale="log", yscale="log", xlim=(floor / 1.5, top), ylim=(floor / 1.5, top))
    ax.set_xlabel("retain score: mean squared activation")
    ax.set_ylabel("forget score: mean squared activation")
    ax.set_title("Features: forget against retain activity")
    fig.legend(loc="outside lower center", ncols=4)
    return _finish(fig)


def sae_quality(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Quality of SAEs by layer: one panel a measure, one line a configuration; and how often features fire.

    Row: {"label", "layer", "fvu", "l0", "ce_recovered", "kl", "dead", "density": [share of positions per feature]}.
    """
    import numpy as np

    panels = {
        "fvu": ("Unexplained variance", "share (FVU)"),
        "l0": ("Active features", "features a position (L0)"),
        "ce_recovered": ("Cross-entropy recovered", "share"),
        "kl": ("KL to the original", "nats per token"),
        "dead": ("Features that never fire", "share"),
    }
    labels = list(dict.fromkeys(r["label"] for r in rows))
    fig = _figure(9.2, 5.0)
    if not rows:
        _say(fig, "no SAE was measured")
        return _finish(fig)
    for at, (name, (title, unit)) in enumerate(panels.items()):
        ax = fig.add_subplot(2, 3, at + 1)
        for n, label in enumerate(labels):
            own = sorted((r for r in rows if r["label"] == label), key=lambda r: r["layer"])
            ax.plot([r["layer"] for r in own], [r[name] for r in own], _LINES[n % 4], color=_SERIES[n % 8],
                    marker=_MARKERS[n % 8], markersize=4, label=label)  # fmt: skip
        layers = sorted({r["layer"] for r in rows})
        ax.set_xticks(layers[:: math.ceil(len(layers) / 12)])
        ax.set(title=title, xlabel="layer", ylabel=unit)
        low = 0 if name != "ce_recovered" else 1.05 * min(0.0, *(r[name] for r in rows))
        ax.set_ylim(bottom=low, top=None if name != "ce_recovered" else 1.02)
    ax = fig.add_subplot(2, 3, 6)
    for n, label in enumerate(labels):
        density = np.concatenate([np.asarray(r["density"], float) for r in rows if r["label"] == label])
        if (live := density[density > 0]).size:
            ax.hist(np.log10(live), bins=40, histtype="step", color=_SERIES[n % 8], linestyle=_LINES[n % 4])
    ax.set(title="How often features fire", xlabel="log₁₀ share of positions", ylabel="features, all layers")
    if len(labels) > 1:
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=min(3, len(labels)))
    return _finish(fig)


def training_curves(losses: Sequence[Mapping[str, float]]) -> Figure:
    """Losses by step, and where recorded the change of the stream and what the watched texts cost.

    Item: {"step", "loss", "forget", "retain"} and optionally "p_rel_dh", "p_irr_dh" (parts of ‖Δh‖/‖h‖) and
    "retain_rise", "other_rise" (relative rise of the loss on that text). Keys may be missing at some steps.
    """
    panels: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
        ("Losses", "loss"): [
            ("loss", "total", BLACK, "-"),
            ("forget", "forget", FORGET, "--"),
            ("retain", "retain", RETAIN, "-."),
        ],
        ("Change of the stream where it was pushed", "‖PΔh‖ / ‖h‖"): [
            ("p_rel_dh", "in relevant subspace", FORGET, "-"),
            ("p_irr_dh", "in irrelevant subspace", BLUE, "--"),
        ],
        ("Cost", "rise of the loss (%)"): [
            ("retain_rise", "retain text", RETAIN, "-"),
            ("other_rise", "other words of forget text", BLUE, "--"),
        ],
    }
    shown = {
        k: lines for k, lines in panels.items() if any(_is_number(s.get(key)) for s in losses for key, *_ in lines)
    }
    fig = _figure(3.5 * max(1, len(shown)) + 0.4, 3.1)
    for at, ((title, unit), lines) in enumerate(shown.items()):
        ax = fig.add_subplot(1, len(shown), at + 1)
        everything: list[float] = []
        for key, label, colour, style in lines:
            scale = 100 if key.endswith("_rise") else 1
            points = [(s["step"], s[key] * scale) for s in losses if _is_number(s.get(key))]
            if points:
                steps, values = zip(*points)
                marker = "o" if len(points) < 20 else None
                ax.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3.5)
                everything += values
        if title == "Losses" and 0 < min(everything) < max(everything) / 50:
            ax.set_yscale("log")
            unit = "loss (log scale)"
        elif min(everything) >= 0:
            ax.set_ylim(bottom=0)
        ax.set(title=title, xlabel="step", ylabel=unit)
        if len(ax.lines) > 1 or title == "Cost":
            ax.legend()
    if not shown:
        _say(fig, "no losses were recorded")
    return _finish(fig)


def before_after(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Before and after by group, with 95 % intervals and the chance line: one panel per metric.

    Rows as `saeunlearn.evaluation.evaluate.compare` returns them ("chance" and the interval ends may be
    missing or None).
    """
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    counts = [sum(r["metric"] == m for r in rows) for m in metrics]
    if not rows:
        fig = _figure(6.4, 2)
        _say(fig, "nothing was compared")
        return _finish(fig)
    fig = _figure(6.6, 0.34 * sum(counts) + 1.05 * len(metrics) + 0.4)
    grid = fig.add_gridspec(len(metrics), 1, height_ratios=[c + 0.6 for c in counts])
    for at, metric in enumerate(metrics):
        ax = fig.add_subplot(grid[at])
        part = [r for r in rows if r["metric"] == metric]
        for i, r in enumerate(part):
            ax.plot([r["before"], r["after"]], [i - 0.13, i + 0.13], color=GREY, linewidth=1, zorder=1)
            for when, colour, marker, shift in (("before", GREY, "o", -0.13), ("after", None, "D", 0.13)):
                fill = colour or (FORGET if str(r["group"]).split("/")[0] == "forget" else RETAIN)
                low, high = r.get(f"{when}_low"), r.get(f"{when}_high")
                if low is not None and high is not None:
                    ax.plot([low, high], [i + shift] * 2, color=fill, linewidth=1.6, zorder=2)
                ax.plot([r[when]], [i + shift], marker, color=fill, markersize=6, zorder=3)
        ax.set_yticks(range(len(part)), [f"{r['group']}  (n = {r['n']:,})" for r in part])
        ax.set_ylim(len(part) - 0.5, -0.5)
        chances = sorted({round(r["chance"], 4) for r in part if r.get("chance") is not None})
        for c in chances:
            ax.axvline(c, color=BLACK, linewidth=0.9, linestyle=":", zorder=0)
        if metric == "nll":
            ax.set_xlabel("negative log-likelihood (nats per token; lower: better predicted)")
        else:
            ax.set_xlim(-0.03, 1.03)
            ax.set_xlabel("share correct" + (f"  (dotted: chance {chances[0]:.2f})" if len(chances) == 1 else ""))
        ax.set_title({"nll": "Text", "multiple_choice": "Multiple choice", "cloze": "Cloze"}.get(metric, metric))
        ax.grid(axis="x", color="#E5E5E5", linewidth=0.7)
        ax.set_axisbelow(True)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, marker=m, linestyle="none", label=n)
        for c, m, n in (
            (GREY, "o", "before"),
            (FORGET, "D", "after, forget"),
            (RETAIN, "D", "after, everything else"),
        )
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return _finish(fig)


def frontier(
    points: Sequence[Mapping[str, Any]], retain: str = "retention (score on retain questions; right is better)",
    forget: str = "forget score (down is better)",
) -> Figure:  # fmt: skip
    """Forgetting against retention, one colour and marker per series, joined in order of retention.

    Point: {"label", "x": retention, "y": score on the forget set, "series"} and optionally "x_err", "y_err":
    half-widths, or pairs (below, above). `retain`, `forget`: what the axes say, and which way is better.
    """
    fig = _figure(6.2, 4.4)
    ax = fig.add_subplot()
    for i, series in enumerate(dict.fromkeys(p["series"] for p in points)):
        part = sorted((p for p in points if p["series"] == series), key=lambda p: p["x"])
        colour, marker = series_looks(i)
        errors: Any = {
            f"{axis}err": [[half(p.get(f"{axis}_err"), side) for p in part] for side in (0, 1)] for axis in "xy"
        }
        ax.errorbar([p["x"] for p in part], [p["y"] for p in part], **errors, label=series, color=colour, marker=marker,
                    linestyle=_LINES[i % 4], linewidth=1.3, elinewidth=0.9)  # fmt: skip
    ax.margins(0.1)
    ax.set(xlabel=retain, ylabel=forget, title="Forgetting against retention")
    ax.grid(color="#E5E5E5", linewidth=0.7)
    ax.set_axisbelow(True)
    if points:
        fig.legend(loc="outside right upper")
    _finish(fig)
    place_labels(fig, points)
    return fig


def bars_at_limits(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Forgetting within limits on retention: a bar a method and limit with its interval, a dot a run.

    Row: {"method", "limit", "mean", "low", "high", "runs": [forgetting of each]}.
    """
    methods, limits = (list(dict.fromkeys(r[k] for r in rows)) for k in ("method", "limit"))
    fig = _figure(6.4, 0.5 * len(methods) + 1.4)
    if not rows:
        _say(fig, "nothing was compared")
        return _finish(fig)
    ax, height = fig.add_subplot(), 0.8 / len(limits)
    for r in rows:
        i = limits.index(r["limit"])
        y = methods.index(r["method"]) + (i - (len(limits) - 1) / 2) * height
        label = f"retention ≥ {r['limit']:g}" if r["method"] == methods[0] else None
        ax.barh(y, r["mean"], height, color=_SERIES[5 - i % 2], hatch=("//", "")[i % 2], edgecolor="white", label=label)
        ax.plot([r["low"], r["high"]], [y, y], color=BLACK, linewidth=1.4)
        ax.plot(r["runs"], [y] * len(r["runs"]), ".", color=BLACK, markersize=4, alpha=0.6)
    ax.set_yticks(range(len(methods)), methods)
    ax.set(xlabel="forgetting (1: as if never known)", xlim=(-0.02, 1.03), ylim=(len(methods) - 0.5, -0.5))
    ax.set_title("Forgetting within limits on retention")
    fig.legend(loc="outside lower center", ncols=2)
    return _finish(fig)


def losses_over_steps(runs: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Figure:
    """Forget and retain loss (nats a token) over steps: a line a series, the mean of its runs, and their range shaded.

    runs: series → [{"step": […], "forget": […], "retain": […]}, …], all with the same steps.
    """
    fig = _figure(7.4, 3.2)
    for at, name in enumerate(("forget", "retain")):
        ax = fig.add_subplot(1, 2, at + 1)
        for i, (series, found) in enumerate(runs.items()):
            steps, columns = found[0]["step"], list(zip(*(r[name] for r in found)))
            mean = [sum(c) / len(c) for c in columns]
            ax.plot(steps, mean, color=_SERIES[i % 8], linestyle=_LINES[i % 4], label=series if at == 0 else None)
            ax.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=_SERIES[i % 8], alpha=0.2)
        ax.set(xlabel="step", ylabel="nats a token", title=f"{name} loss ({'up' if at == 0 else 'down'} is better)")
    fig.legend(loc="outside lower center", ncols=3)
    return _finish(fig)


def png_data_uri(fig: Figure) -> str:
    """The figure as a `data:image/png;base64,…` URI, for pages without external files."""
    return "data:image/png;base64," + base64.b64encode(_png(fig, 160)).decode()


def save(fig: Figure, path: str | Path) -> None:
    """Write the figure; the suffix chooses the format (.png, .svg, .pdf). Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=160)


def _png(fig: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


# --- shared ------------------------------------------------------------------------------------------------


def series_looks(i: int) -> tuple[str, str]:
    """Colour and marker of series i: no two are alike up to 49. Grey and the star are the oracle's."""
    return _SERIES[i % 7], _MARKERS[(i + i // 7) % 7]


def _figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Shown(Figure):
        """Shows itself in a notebook, which would otherwise need pyplot and its global state."""

        def _repr_png_(self) -> bytes:
            return _png(self, 100)

    fig = Shown(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def _finish(fig: Figure) -> Figure:
    """The toolkit's look, set on this figure alone: a user's rcParams stay theirs."""
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
        ax.tick_params(labelsize=8)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_fontsize(9)
    for legend in [*fig.legends, *(ax.get_legend() for ax in fig.axes)]:
        for text in legend.get_texts() if legend else ():
            text.set_fontsize(8)
    return fig


def _say(fig: Figure, message: str) -> None:
    """Fill a figure that has no data."""
    for ax in list(fig.axes):
        ax.remove()
    fig.text(0.5, 0.5, message, ha="center", va="center", color=GREY)


def _probe_unit(name: str) -> str:
    if name == "forget_rise":
        return "rise (nats per token)"
    return "rise (fraction)" if name.endswith("_rise") else "value"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
