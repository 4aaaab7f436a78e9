"""Figures of a comparison of two checkpoints through SAEs (`features.diff.feature_diff`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import BLACK, BLUE, FORGET, GREEN, GREY, ORANGE, _figure, _finish, _say

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def activity(entry: Mapping[str, Any], named: Sequence[int], fdr: float) -> Figure:
    """Mean activation of every feature before and after, one panel a text, both axes logarithmic.

    `entry`: one of the "layers" of the document. Features with q below `fdr` are drawn as lost or gained, `named` ones
    with a ring. What is silent in one model lies on that axis's edge.
    """
    import numpy as np

    texts = entry["texts"]
    fig = _figure(3.6 * max(1, len(texts)) + 0.4, 3.9)
    for at, (name, t) in enumerate(texts.items()):
        f = {k: np.asarray([np.nan if v is None else v for v in c], float) for k, c in t["features"].items()}
        ax = fig.add_subplot(1, len(texts), at + 1)
        x, y = f["mean_before"], f["mean_after"]
        if not len(x):
            ax.set_title(f"{name}: no feature fires")
            continue
        positive = np.concatenate([x[x > 0], y[y > 0]])
        low, high = float(positive.min()) / 2, float(positive.max()) * 2
        sure = f["q"] < fdr
        styles = (
            ("unchanged", ~sure, GREY, ".", 10),
            ("gained", sure & (f["change"] > 0), BLUE, "^", 20),
            ("lost", sure & (f["change"] < 0), FORGET, "v", 20),
        )
        for label, pick, colour, marker, size in styles:
            ax.scatter(np.maximum(x[pick], low), np.maximum(y[pick], low), s=size, c=colour, marker=marker, alpha=0.7,
                       linewidths=0, label=f"{label} ({int(pick.sum()):,})")  # fmt: skip
        ring = np.isin(f["feature"], list(named))
        if ring.any():
            ax.scatter(np.maximum(x[ring], low), np.maximum(y[ring], low), s=70, facecolors="none", edgecolors=BLACK,
                       label=f"named ({int(ring.sum()):,})")  # fmt: skip
        ax.plot([low, high], [low, high], color=BLACK, linewidth=0.8, linestyle="--")
        ax.set(xscale="log", yscale="log", xlim=(low / 1.3, high), ylim=(low / 1.3, high))
        ax.set(title=f"{name}, layer {entry['layer']}", xlabel="mean activation before", ylabel="mean activation after")
        ax.legend(loc="upper left")
    if not texts:
        _say(fig, "no text was given")
    return _finish(fig)


def weight_shares(weights: Mapping[str, Any]) -> Figure:
    """Share of the change of every writer that lies in the span of the named features, beside random features.

    `weights`: that part of the document. Writers that did not change are left out.
    """
    rows = [w for w in weights["writers"] if w["share"] is not None]
    fig = _figure(6.4, 0.32 * max(3, len(rows)) + 1.2)
    if not rows:
        _say(fig, "no weights changed, or no features were named")
        return _finish(fig)
    ax = fig.add_subplot()
    for i, w in enumerate(rows):
        if w["random"]:
            ax.plot([min(w["random"]), max(w["random"])], [i, i], color=GREEN, linewidth=4, alpha=0.6,
                    label="random features (range)" if i == 0 else None)  # fmt: skip
        ax.plot([w["share"]], [i], "D", color=ORANGE, label="named features" if i == 0 else None)
    ax.axvline(weights["expected"], color=BLACK, linestyle=":", linewidth=1, label="random subspace: K / d")
    ax.set_yticks(range(len(rows)), [w["name"].removesuffix(".weight") for w in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set(xlabel="share of ‖ΔW‖² in the span of decoder rows", title="Where the weights changed")
    fig.legend(loc="outside lower center", ncols=3)
    return _finish(fig)
