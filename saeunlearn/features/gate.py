"""The gate: which positions of a forget text are about the topic at all? (ours)

Texts share most of their words with everything else; pushing on those positions wrecks ordinary language. The gate
is a logistic regression on SAE features that tells forget from retain positions, closed on all but a few retain ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..corpus import Window, batches
from ..models import LanguageModel
from ..progress import Progress
from .scores import FeatureChoice, FeatureStats, auc

MAX_FEATURES = 512  # that a gate reads: those whose density differs most
MAX_POSITIONS = 30_000  # of each set that it is fitted and calibrated on
RIDGE = 1e-3  # weight of ‖w‖² against the mean log-loss


@dataclass(frozen=True)
class Gate:
    """Open where Σ_j weight_j z_j / ‖h‖ exceeds `threshold`.

    `open_forget`, `open_retain`: the share of positions, not used for fitting, at which the gate is open.
    """

    features: list[int]
    weights: list[float]
    threshold: float
    open_forget: float
    open_retain: float

    def activity(self, sae: Any, h: Tensor) -> Tensor:
        """Σ_j weight_j z_j / ‖h‖ [...] for a stream h [..., d_model]."""
        z = relative(sae, h, self.features)
        return z @ torch.tensor(self.weights, device=z.device, dtype=z.dtype)

    def open(self, sae: Any, h: Tensor) -> Tensor:
        """Bool [...]: is the gate open for the stream h [..., d_model]?"""
        return self.activity(sae, h) > self.threshold


@dataclass(frozen=True)
class FittedGate:
    """A gate, and how well two things tell forget from retain positions (AUC): the gate, and the bare sum of the
    relevant features' relative activities."""

    gate: Gate
    gate_auc: float
    relevant_auc: float


@torch.no_grad()
def topic_votes(model: LanguageModel, saes: Mapping[int, Any], gates: Mapping[int, Gate], items: Sequence[Window]
                ) -> list[Tensor]:  # fmt: skip
    """Share of the layers whose gate is open at each token of forget texts, aligned to each `window.ids[1:]`.

    One layer's gate misses words of the topic, and opens at others; layers err at different words. So what at least
    half of them name is about the topic, and what none of them names is not.
    """
    layers = sorted(gates.keys() & saes.keys())
    out = []
    for w in items:
        streams = model.capture(torch.tensor([w.ids], device=model.device), layers)
        opened = torch.stack([gates[i].open(saes[i], streams[i])[0, 1:] for i in layers])
        out.append(opened.float().mean(0).cpu())
    return out


def relative(sae: Any, h: Tensor, features: Sequence[int]) -> Tensor:
    """z_j / ‖h‖ [..., len(features)] of a stream h [..., d_model]."""
    h = h.to(sae.dtype)
    return sae.encode(h)[..., list(features)] / h.norm(dim=-1, keepdim=True)


@torch.no_grad()
def fit_gates(
    model: LanguageModel,
    saes: Mapping[int, Any],
    choices: Mapping[int, FeatureChoice],
    forget: Sequence[Window],
    retain: Sequence[Window],
    f_stats: Mapping[int, FeatureStats],
    r_stats: Mapping[int, FeatureStats],
    percentile: float,
    progress: Progress,
) -> dict[int, FittedGate]:
    """A gate for every layer: fitted on every other batch, its threshold at the `percentile` of the retain positions
    of the remaining ones."""
    read = {}
    for layer, choice in choices.items():
        read[layer] = sorted({*choice.relevant, *telling(f_stats[layer], r_stats[layer])})
    f = _activities(model, saes, read, forget, progress, "gates on forget text")
    r = _activities(model, saes, read, retain, progress, "gates on retain text")
    out = {}
    for layer, choice in choices.items():
        (f_fit, f_rest), (r_fit, r_rest) = f[layer], r[layer]
        weights = logistic(f_fit, r_fit)
        on_forget, on_retain = f_rest @ weights, r_rest @ weights
        threshold = float(torch.quantile(on_retain, percentile / 100))
        places = [read[layer].index(j) for j in choice.relevant]
        square = (f_stats[layer].mean_square + r_stats[layer].mean_square)[choice.relevant] / 2
        scale = square.sqrt().clamp_min(1e-12).float()
        gate = Gate(
            read[layer], weights.tolist(), threshold, float((on_forget > threshold).double().mean()),
            float((on_retain > threshold).double().mean()),
        )  # fmt: skip
        bare = [(x[:, places] / scale).sum(-1) for x in (f_rest, r_rest)]
        out[layer] = FittedGate(gate, auc(on_forget, on_retain), auc(bare[0], bare[1]))
    return out


def telling(f: FeatureStats, r: FeatureStats) -> list[int]:
    """The live features whose density differs most between forget and retain text, in standard errors."""
    pooled = (f.active + r.active) / (f.positions + r.positions)
    error = (pooled * (1 - pooled) * (1 / f.positions + 1 / r.positions)).clamp_min(1e-30).sqrt()
    distance = ((f.density - r.density) / error).abs()
    n = min(MAX_FEATURES, int(((f.active + r.active) > 0).sum()))
    return distance.argsort(descending=True, stable=True)[:n].tolist()


def logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights [m] of a ridge logistic regression with equal class weights; the intercept is dropped."""
    x = torch.cat([positive, negative])
    scale = x.pow(2).mean(0).sqrt().clamp_min(1e-9)
    x = x / scale
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    balance = torch.where(y > 0, 0.5 / len(positive), 0.5 / len(negative))
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, reduction="none")
        loss = (balance * losses).sum() + RIDGE * w[:-1].pow(2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return w.detach()[:-1] / scale


def _activities(
    model: LanguageModel,
    saes: Mapping[int, Any],
    read: Mapping[int, list[int]],
    items: Sequence[Window],
    progress: Progress,
    what: str,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Relative activities [positions, features read] of every layer, for the even and the odd batches."""
    parts: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in read}
    shuffled = list(batches(items, model.pad_id, max_tokens=1024, seed=0))
    seen = 0
    progress.start(what, len(shuffled))
    for n, batch in enumerate(shuffled):
        if seen < MAX_POSITIONS:
            b = batch.to(model.device)
            seen += int(b.mask.sum())
            streams = model.capture(b.ids, list(read), b.attention_mask)
            for layer, features in read.items():
                z = relative(saes[layer], streams[layer][b.mask], features).float().cpu()
                if len(shuffled) == 1:  # too little text for two batches: every other position
                    parts[layer][0].append(z[::2])
                    parts[layer][1].append(z[1::2])
                else:
                    parts[layer][n % 2].append(z)
        progress.step()
    progress.finish()
    return {i: (torch.cat(p[0]), torch.cat(p[1])) for i, p in parts.items()}
