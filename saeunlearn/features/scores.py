"""Streaming statistics of SAE features over forget and retain text: one pass, all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..corpus import Batch, Window, batches
from ..errors import NonFiniteError, SAEMismatchError, SelectionError
from ..models import LanguageModel
from ..progress import Progress


@dataclass
class FeatureStats:
    """Running sums for one SAE over one text set; positions are those of `Batch.mask`.

    `sum_sq` [m] of z_j²/‖h‖²: relative to each position's own norm, because a few positions (attention sinks,
    sentence starts) have norms many times the median and would otherwise decide alone. `active` [m] counts of
    z_j > 0, `positions` their number, `norm_sum` the sum of ‖h‖, `residual_sum` of ‖h − ĥ‖², `centred_sum` [d + 1]
    what the variance of h needs (Σh, then Σ‖h‖²).
    """

    sum_sq: Tensor
    active: Tensor
    positions: int
    norm_sum: float
    residual_sum: float
    centred_sum: Tensor

    @property
    def mean_square(self) -> Tensor:
        """E[z_j²/‖h‖²] over positions, [m]: the score s_f or s_r of a set."""
        return self.sum_sq / self.positions

    @property
    def density(self) -> Tensor:
        """Share of positions at which each feature is active, [m]."""
        return self.active / self.positions

    @property
    def mean_norm(self) -> float:
        """Mean ‖h_l‖ over positions."""
        return self.norm_sum / self.positions

    @property
    def fvu(self) -> float:
        """Fraction of the variance of h that the SAE leaves unexplained (0 is perfect, 1 no better than the mean)."""
        mean = self.centred_sum[:-1] / self.positions
        variance = float(self.centred_sum[-1]) / self.positions - float(mean @ mean)
        return (self.residual_sum / self.positions) / max(variance, 1e-12)


def check_sae(sae: Any, layer: int, model: LanguageModel) -> None:
    """Raises SAEMismatchError when the SAE's width or recorded hook does not belong to the output of `layer`."""
    if sae.cfg.d_in != model.d_model:
        raise SAEMismatchError(
            f"the SAE for layer {layer} reads {sae.cfg.d_in} dimensions, {model.name} has {model.d_model}"
        )
    hook = getattr(sae.cfg.metadata, "hook_name", None)
    # The stream before block l+1 is the stream after block l.
    fitting = {f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre",
               f"blocks.{layer}.hook_out", f"blocks.{layer + 1}.hook_in"}  # fmt: skip
    if hook and hook not in fitting:
        raise SAEMismatchError(f"the SAE given for layer {layer} was trained at {hook}")


@torch.no_grad()
def feature_stats(model: LanguageModel, saes: Mapping[int, Any], items: Sequence[Window], progress: Progress,
                  what: str = "scores") -> dict[int, FeatureStats]:  # fmt: skip
    """Statistics of every SAE's features from one pass that stops at the deepest layer.

    Raises SAEMismatchError, and NonFiniteError naming the layer whose activations or SAE give NaN or infinity.
    """
    for layer, sae in saes.items():
        check_sae(sae, layer, model)
    stats: dict[int, FeatureStats] = {}
    for batch in progress.over(list(batches(items, model.pad_id)), what):
        for layer, _, one in batch_stats(model, saes, batch.to(model.device)):
            stats[layer] = add(stats[layer], one) if layer in stats else one
    return stats


@torch.no_grad()
def batch_stats(model: LanguageModel, saes: Mapping[int, Any], b: Batch) -> Iterator[tuple[int, Tensor, FeatureStats]]:
    """(layer, activations z [position, m], their sums) of one batch, positions in the order of `b.mask`.

    Raises NonFiniteError.
    """
    streams = model.capture(b.ids, list(saes), b.attention_mask)
    for layer, sae in saes.items():
        h = streams[layer][b.mask].to(sae.dtype)
        if not torch.isfinite(h).all():
            raise NonFiniteError(f"the activations after block {layer} of {model.name} hold NaN or infinity")
        z = sae.encode(h)
        one = FeatureStats(
            ((z.double() / h.double().norm(dim=-1, keepdim=True)) ** 2).sum(0).cpu(),
            (z > 0).sum(0).double().cpu(), h.shape[0],
            float(h.norm(dim=-1).double().sum()), float((h - sae.decode(z)).double().pow(2).sum()),
            torch.cat([h.double().sum(0), h.double().pow(2).sum()[None]]).cpu(),
        )  # fmt: skip
        if not torch.isfinite(one.sum_sq).all() or not math.isfinite(one.residual_sum):
            raise NonFiniteError(f"the SAE for layer {layer} gives NaN or infinity")
        yield layer, z, one


def add(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """The sums over both sets of positions."""
    return FeatureStats(
        a.sum_sq + b.sum_sq, a.active + b.active, a.positions + b.positions, a.norm_sum + b.norm_sum,
        a.residual_sum + b.residual_sum, a.centred_sum + b.centred_sum,
    )  # fmt: skip


@dataclass(frozen=True)
class FeatureChoice:
    """Relevant and irrelevant features of one layer, most relevant (least used) first."""

    relevant: list[int]
    irrelevant: list[int]
    ratio: Tensor  # ρ [m]; NaN for dead features


def choose_features(forget: FeatureStats, retain: FeatureStats, k: int, percentile: float) -> FeatureChoice:
    """Relevant = the K largest s_f among live features whose ρ = s_f/(s_r + ε) is above the
    `percentile` of live features; irrelevant = the K smallest s_f among live features.

    Live: active somewhere in forget or retain text. ε is 1e-6 of the mean retain score, so ρ has no units.
    Raises SelectionError when K exceeds the candidates.
    """
    s_f, s_r = forget.mean_square, retain.mean_square
    live = (forget.active + retain.active) > 0
    n_live = int(live.sum())
    if k < 1 or 2 * k > n_live:
        raise SelectionError(f"K = {k} relevant and {k} irrelevant features do not fit into {n_live} live features")
    rho = s_f / (s_r + 1e-6 * s_r.mean() + 1e-30)
    rho = torch.where(live, rho, torch.full_like(rho, float("nan")))
    cut = torch.quantile(rho[live], percentile / 100)
    candidates = live & (rho >= cut) & (s_f > 0)
    if int(candidates.sum()) < k:
        raise SelectionError(
            f"only {int(candidates.sum())} features lie above the {percentile:g}th percentile of ρ, fewer than "
            f"K = {k}: lower K or the percentile, or use a wider SAE"
        )
    ranked = torch.where(candidates, s_f, torch.full_like(s_f, -1)).argsort(descending=True, stable=True)
    relevant = ranked[:k].tolist()
    chosen = torch.zeros_like(live)
    chosen[relevant] = True
    quiet = torch.where(live & ~chosen, s_f, torch.full_like(s_f, float("inf"))).argsort(stable=True)
    return FeatureChoice(relevant, quiet[:k].tolist(), rho)


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(a positive score exceeds a negative one), ties half: the Mann-Whitney statistic."""
    both = torch.cat([positive, negative]).double()
    values, inverse, counts = torch.unique(both, return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    rank = (upper - (counts.double() - 1) / 2)[inverse]
    n, m = len(positive), len(negative)
    if not n or not m or len(values) == 1:
        return 0.5
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * m))
