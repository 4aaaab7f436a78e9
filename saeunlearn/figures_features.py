"""Figures of SAE features and of the subspaces they span, in the look of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import _LINES, _MARKERS, BLACK, BLUE, FORGET, GREEN, GREY, ORANGE, PURPLE, SKY, _figure, _finish, _say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXTS = (FORGET, BLUE, GREEN, PURPLE, ORANGE)  # forget text comes first wherever texts are compared
_CONTROLS = {"random features": (GREEN, "//"), "random directions": (GREY, "")}
_MAX_WIDTH = 92  # characters of a context


def feature(view: Mapping[str, Any]) -> Figure:
    """How strongly a feature is active on each text, and the tokens that its decoder row promotes and suppresses.

    `view`: as `explore.feature.feature_view` returns it.
    """
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    fig = _figure(8.6, 3.3)
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    for i, (text, h) in enumerate(view["histogram"].items()):
        if not h["counts"]:
            left.plot([], [], _LINES[i % 4], color=_TEXTS[i % 5], label=f"{text}: never active")
            continue
        per_bin = view["density"][text] / sum(h["counts"])
        left.stairs([c * per_bin for c in h["counts"]], h["edges"], color=_TEXTS[i % 5], linestyle=_LINES[i % 4],
                    label=f"{text}: active on {view['density'][text]:.2%} of positions")  # fmt: skip
    if any(h["counts"] for h in view["histogram"].values()):
        left.set(xscale="log", yscale="log")
        left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        left.xaxis.set_minor_formatter(NullFormatter())
    left.set(xlabel="activation (units of the SAE)", ylabel="share of positions in a bin")
    left.set_title(f"Feature {view['feature']} of layer {view['layer']}: activity")
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    words = [*view["promoted"][:6], *reversed(view["suppressed"][:6])]
    right.barh(range(len(words)), [w["logit"] for w in words],
               color=[FORGET if w["logit"] > 0 else SKY for w in words])  # fmt: skip
    right.set_yticks(range(len(words)), [repr(w["token"]).replace("$", r"\$") for w in words])
    right.invert_yaxis()
    right.axvline(0, color=BLACK, linewidth=0.8)
    right.set(xlabel="logit of the decoder row", title="Promoted and suppressed tokens")
    return _finish(fig)


def contexts(views: Sequence[Mapping[str, Any]], texts: Sequence[str] | None = None, each: int = 3) -> Figure:
    """Where features are most active: the `each` strongest contexts of each text, tokens shaded by activation.

    `views`: as `explore.feature.feature_view` returns them. Shading is relative to the feature's largest activation;
    the number on the left is the largest of the row. Quotes the texts.
    """
    rows: list[tuple[str, Any]] = []
    for v in views:
        top = max((e["activation"] for found in v["examples"].values() for e in found), default=0.0)
        rows.append((f"feature {v['feature']} of layer {v['layer']}", None))
        for text in v["examples"] if texts is None else texts:
            rows += [(text, (e, top)) for e in v["examples"][text][:each]]
    written = [sum(map(len, entry[0]["tokens"])) for _, entry in rows if entry is not None]
    width = min(_MAX_WIDTH, max(written, default=0))
    fig = _figure(0.084 * (width + 18) + 0.2, 0.235 * len(rows) + 0.5)
    if not views:
        _say(fig, "no feature was given")
        return _finish(fig)
    ax = fig.add_subplot()
    ax.set(xlim=(-17, width), ylim=(len(rows) - 0.4, -0.6))
    ax.axis("off")
    for y, (label, entry) in enumerate(rows):
        if entry is None:
            ax.text(-17, y, label, va="center", fontsize=8.5, weight="bold")
            continue
        example, top = entry
        ax.text(-16, y, label, va="center", fontsize=8, color=FORGET if label == "forget" else BLUE)
        ax.text(-2, y, f"{example['activation']:.2g}", va="center", ha="right", fontsize=7.5, color=GREY)
        _shaded(ax, y, example, top)
    ax.set_title("Strongest contexts (darker: more active)", loc="left")
    return _finish(fig)


def _shaded(ax: Axes, y: int, example: Mapping[str, Any], top: float) -> None:
    """One line of tokens in a fixed-width font, so that a character is one unit wide."""
    from matplotlib.patches import Rectangle

    at = 0
    for token, activation in zip(example["tokens"], example["activations"]):
        shown = token.replace("\n", "⏎")
        if at + len(shown) > _MAX_WIDTH:
            break
        if activation > 0 and top > 0:
            ax.add_patch(Rectangle((at, y - 0.42), len(shown), 0.84, color=ORANGE, alpha=0.15 + 0.85 * activation / top,
                                   linewidth=0))  # fmt: skip
        for i, character in enumerate(shown):
            ax.text(at + i + 0.5, y, character.replace("$", r"\$"), va="center", ha="center", fontsize=8,
                    family="monospace")  # fmt: skip
        at += len(shown)


# --- subspaces ---------------------------------------------------------------------------------------------


def geometry(found: Mapping[str, Any]) -> Figure:
    """Spectrum of the relevant decoder rows and their principal angles to others, with the range of the random draws.

    `found`: as `features.geometry.geometry` returns it.
    """
    fig = _figure(8.6, 3.5)
    left, right = fig.subplots(1, 2)
    for ax, part in ((left, "spectra"), (right, "angles")):
        for name, drawn in found[part].items():
            if name in _CONTROLS:
                _band(ax, drawn, name)
            else:
                colour, style = (FORGET, "-") if name == "relevant" else (BLUE, "--")
                ax.plot(range(1, len(drawn[0]) + 1), drawn[0], style, color=colour, label=name, zorder=3)
    left.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    left.set(xlabel="singular value, largest first", ylabel="singular value (1: rows are orthogonal)")
    left.set_title(f"Spectrum of the decoder rows, K = {found['K']} of d = {found['d']}")
    left.set_ylim(bottom=0)
    right.axhline(90, color=BLACK, linewidth=0.8, linestyle=":")
    right.set(xlabel="principal angle, smallest first", ylabel="degrees (90: orthogonal)", ylim=(0, 94))
    right.set_title("Angles of the relevant subspace to …")
    for ax in (left, right):
        ax.legend(loc="upper right" if ax is left else "lower right")
    return _finish(fig)


def _band(ax: Axes, drawn: Sequence[Sequence[float]], name: str) -> None:
    """The range over random draws."""
    n = min(map(len, drawn))
    columns = list(zip(*(d[:n] for d in drawn)))
    colour, hatch = _CONTROLS[name]
    ax.fill_between(range(1, n + 1), list(map(min, columns)), list(map(max, columns)), facecolor=colour, alpha=0.35,
                    hatch=hatch, edgecolor="white", linewidth=0, label=f"{name} (range of {len(drawn)})")  # fmt: skip


def variance_shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of each text's variance inside the span of the relevant rows, by layer, beside random spans of that size.

    `rows`: as `features.geometry.variance_shares` returns them.
    """
    texts = list(dict.fromkeys(r["text"] for r in rows))
    fig = _figure(2.9 * max(1, len(texts)) + 0.3, 3.4)
    if not rows:
        _say(fig, "no text was measured")
        return _finish(fig)
    axes = fig.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for ax, text in zip(axes, texts):
        part = sorted((r for r in rows if r["text"] == text), key=lambda r: r["layer"])
        for j, (name, (colour, hatch)) in enumerate(_CONTROLS.items()):
            for i, r in enumerate(part):
                low, high = min(r[name]), max(r[name])
                ax.bar(i + 0.26 * (j + 0.5) - 0.05, high - low, 0.22, bottom=low, color=colour, alpha=0.6, hatch=hatch,
                       edgecolor="white", label=f"{name} (range)" if i == 0 else None)  # fmt: skip
        ax.plot([i - 0.18 for i in range(len(part))], [r["features"] for r in part], "D", color=FORGET,
                label="relevant features")  # fmt: skip
        ax.set_xticks(range(len(part)), [str(r["layer"]) for r in part])
        ax.set(title=f"{text} text", xlabel="layer", ylim=(0, 1.02))
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.7)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("share of the stream's variance")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _finish(fig)


def scores_along(rows: Sequence[Mapping[str, Any]], along: str, title: str, unit: str = "share correct") -> Figure:
    """Lines with 95 % intervals: a score against `along` (layer, block, step …), one line a series.

    Row: {along: number or name, "series", "value", "low", "high"} and optionally "chance". Series named forget… take
    the forget colour, `original` black; places keep the order of the rows.
    """
    fig = _figure(5.8, 3.6)
    if not rows:
        _say(fig, "nothing was measured")
        return _finish(fig)
    ax = fig.add_subplot()
    places = list(dict.fromkeys(r[along] for r in rows))
    series = list(dict.fromkeys(r["series"] for r in rows))
    warm, others = iter((FORGET, ORANGE, PURPLE)), iter((BLUE, GREEN, SKY, PURPLE, ORANGE))
    for n, name in enumerate(series):
        part = [r for r in rows if r["series"] == name]
        shift = 0.06 * (n - (len(series) - 1) / 2)  # or intervals would hide each other
        colour = BLACK if name == "original" else next(warm if name.startswith("forget") else others, GREY)
        errors = [[max(0.0, r["value"] - r["low"]) for r in part], [max(0.0, r["high"] - r["value"]) for r in part]]
        ax.errorbar([places.index(r[along]) + shift for r in part], [r["value"] for r in part], yerr=errors,
                    color=colour, marker=_MARKERS[n % 8], linestyle=_LINES[n % 4], markersize=5, elinewidth=1,
                    label=name)  # fmt: skip
    if (chance := rows[0].get("chance")) is not None:
        ax.axhline(chance, color=BLACK, linewidth=0.9, linestyle=":", label="chance")
    ax.set_xticks(range(len(places)), [str(p) for p in places])
    ax.set(xlabel=along, ylabel=unit, title=title, ylim=(-0.03, 1.03) if unit.startswith("share") else None)
    fig.legend(loc="outside right upper")
    return _finish(fig)
