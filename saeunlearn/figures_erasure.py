"""Figures of one Erasure taken apart, in the look of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import _LINES, _MARKERS, BLACK, BLUE, FORGET, GREY, _figure, _finish, _say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = (("relevant", FORGET), ("irrelevant", BLUE), ("other", GREY))


def weights_by_feature(values: Sequence[float], relevant: Sequence[int]) -> Figure:
    """How much of the weight change lies along each feature's decoder row, largest first; the relevant ones marked.

    `values`: as `features.diff.weights_by_feature` returns them: 1 is what a random direction has on average.
    """
    fig = _figure(6.4, 3.4)
    order = sorted((i for i, v in enumerate(values) if v > 0), key=lambda i: -values[i])
    if not order:
        _say(fig, "no weights changed")
        return _finish(fig)
    ax, known = fig.add_subplot(), set(relevant)
    rank = {j: n + 1 for n, j in enumerate(order)}
    ax.plot(list(rank.values()), [values[j] for j in order], ".", color=GREY, markersize=3, label="other features")
    own = [j for j in order if j in known]
    ax.plot([rank[j] for j in own], [values[j] for j in own], "D", color=FORGET, markersize=4.5,
            label=f"relevant features ({len(own)})")  # fmt: skip
    ax.axhline(1, color=BLACK, linewidth=0.9, linestyle=":", label="a random direction")
    ax.set(xscale="log", yscale="log", xlabel="features, largest first", title="The weight change, feature by feature")
    ax.set_ylabel("d · ‖dⱼᵀΔW‖² / ‖ΔW‖²")
    ax.legend(loc="lower left")
    return _finish(fig)


def stream_changes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How large the change of the stream is by layer, and which subspace it lies in, a column a text; 95 % intervals.

    `rows`: as `explore.taken_apart.stream_changes` returns them.
    """
    texts = list(dict.fromkeys(r["text"] for r in rows))
    fig = _figure(2.9 * max(1, len(texts)) + 0.5, 5.0)
    if not rows:
        _say(fig, "nothing was measured")
        return _finish(fig)
    above, below = fig.subplots(2, len(texts), sharex=True, sharey="row", squeeze=False)
    for column, text in enumerate(texts):
        part = sorted((r for r in rows if r["text"] == text), key=lambda r: r["layer"])
        for ax, names in ((above[column], (("total", BLACK),)), (below[column], _PARTS)):
            for n, (name, colour) in enumerate(names):
                label = "elsewhere" if name == "other" else f"in the {name} subspace"
                found = [(i, r[name]) for i, r in enumerate(part) if r[name] is not None and r[name]["mean"] > 0]
                if not found:
                    continue
                errors = [[max(0.0, v["mean"] - v["low"]) for _, v in found],
                          [max(0.0, v["high"] - v["mean"]) for _, v in found]]  # fmt: skip
                ax.errorbar([i + 0.07 * (n - 1) for i, _ in found], [v["mean"] for _, v in found], yerr=errors,
                            color=colour, marker=_MARKERS[n], linestyle=_LINES[n], markersize=5,
                            label=label)  # fmt: skip
            ax.set_xticks(range(len(part)), [str(r["layer"]) for r in part])
            ax.grid(axis="y", color="#E5E5E5", linewidth=0.7)
        above[column].set(title=f"{text} text (n = {part[0]['n']})", yscale="log")
        below[column].set(xlabel="layer", ylim=(-0.03, 1.03))
        below[column].tick_params(labelbottom=True)
    above[0].set_ylabel("‖Δh‖² / ‖h‖²")
    below[0].set_ylabel("share of ‖Δh‖²")
    handles = max((ax.get_legend_handles_labels() for ax in below), key=lambda pair: len(pair[0]))
    fig.legend(*handles, loc="outside lower center", ncols=3)
    return _finish(fig)


def lens(models: Mapping[str, Mapping[str, Any]], last: int = 8) -> Figure:
    """What each model's own head reads from the stream after every block: the most probable next token at the `last`
    positions of a prompt, shaded by its probability; a panel a model.

    `models`: "models" of `explore.compare.compare_view`. Quotes the prompt.
    """
    first = next(iter(models.values()))
    tokens = first["tokens"][-last:]
    layers = len(first["lens"])
    fig = _figure(0.98 * len(tokens) + 1.3, len(models) * (0.36 * layers + 0.85) + 0.3)
    axes = fig.subplots(len(models), 1, squeeze=False)[:, 0]
    for ax, (name, view) in zip(axes, models.items()):
        grid = [[cell[0] for cell in row["tokens"][-last:]] for row in reversed(view["lens"])]
        image = ax.imshow([[c["probability"] for c in row] for row in grid], cmap="Blues", vmin=0, vmax=1,
                          aspect="auto")  # fmt: skip
        for y, row in enumerate(grid):
            for x, c in enumerate(row):
                ax.text(x, y, _short(c["token"]), ha="center", va="center", fontsize=7.5,
                        color="white" if c["probability"] > 0.6 else "black")  # fmt: skip
        ax.set_yticks(range(len(grid)), [str(r["layer"]) for r in reversed(view["lens"])])
        ax.set_xticks(range(len(tokens)), [_short(t) for t in view["tokens"][-last:]])
        ax.set(title=name, ylabel="layer")
    axes[-1].set_xlabel("position (its token)")
    fig.colorbar(image, ax=list(axes), label="probability", fraction=0.03, pad=0.01)
    return _finish(fig)


def token_losses(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The loss of every token of a prompt, a line a model.

    `models`: "models" of `explore.compare.compare_view`. Quotes the prompt.
    """
    first = next(iter(models.values()))
    fig = _figure(max(4.0, 0.42 * len(first["tokens"]) + 1.6), 3.2)
    ax = fig.add_subplot()
    for n, (name, view) in enumerate(models.items()):
        points = [(i, v) for i, v in enumerate(view["loss"]) if v is not None]
        ax.plot(*zip(*points), _LINES[n % 4], color=(GREY, FORGET, BLUE)[n % 3], marker=_MARKERS[n % 8], markersize=4.5,
                label=name)  # fmt: skip
    ax.set_xticks(range(len(first["tokens"])), [_short(t) for t in first["tokens"]], rotation=45, ha="right")
    ax.set(ylabel="loss (nats)", xlabel="token", title="Loss of each token, given those before it")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    fig.legend(loc="outside right upper")
    return _finish(fig)


def _short(token: str) -> str:
    shown = token.strip() or repr(token)
    return (shown[:9] + "…" if len(shown) > 10 else shown).replace("$", r"\$")
