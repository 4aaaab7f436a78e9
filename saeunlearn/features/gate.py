"""The gate: at which positions do the relevant features fire? (METHODS §1h, ours)"""

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


@dataclass(frozen=True)
class Gate:
    """Open where Σ_j z_j / scale_j over the relevant features j exceeds `threshold`.

    `scale`: root mean square of each relevant feature over forget and retain positions, so that no single loud
    feature decides. `open_forget`, `open_retain`: the share of positions at which the gate is open.
    """

    features: list[int]
    scale: list[float]
    threshold: float
    open_forget: float
    open_retain: float

    def activity(self, sae: Any, h: Tensor) -> Tensor:
        """Summed relative activity [...] of the relevant features for a stream h [..., d_model]."""
        z = sae.encode(h.to(sae.dtype))[..., self.features]
        return (z / torch.tensor(self.scale, device=z.device, dtype=z.dtype)).sum(-1)

    def open(self, sae: Any, h: Tensor) -> Tensor:
        """Bool [...]: is the gate open for the stream h [..., d_model]?"""
        return self.activity(sae, h) > self.threshold


@dataclass(frozen=True)
class FittedGate:
    """A gate and how well its activity tells forget from retain positions (AUC)."""

    gate: Gate
    auc: float


@torch.no_grad()
def fit_gates(model: LanguageModel, saes: Mapping[int, Any], choices: Mapping[int, FeatureChoice],
              forget: Sequence[Window], retain: Sequence[Window], f_stats: Mapping[int, FeatureStats],
              r_stats: Mapping[int, FeatureStats], percentile: float, progress: Progress) -> dict[int, FittedGate]:  # fmt: skip
    """A gate for every layer, its threshold at the `percentile` of the retain positions."""
    gates = {}
    for layer, choice in choices.items():
        square = (f_stats[layer].mean_square + r_stats[layer].mean_square)[choice.relevant] / 2
        gates[layer] = Gate(choice.relevant, square.sqrt().clamp_min(1e-12).tolist(), 0.0, 0.0, 0.0)
    on_forget = _activities(model, saes, gates, forget, progress, "gates on forget text")
    on_retain = _activities(model, saes, gates, retain, progress, "gates on retain text")
    out = {}
    for layer, gate in gates.items():
        f, r = on_forget[layer], on_retain[layer]
        threshold = float(torch.quantile(r[:: max(1, len(r) // 1_000_000)], percentile / 100))
        fitted = Gate(
            gate.features, gate.scale, threshold, float((f > threshold).double().mean()),
            float((r > threshold).double().mean()),
        )  # fmt: skip
        out[layer] = FittedGate(fitted, auc(f, r))
    return out


def _activities(model: LanguageModel, saes: Mapping[int, Any], gates: Mapping[int, Gate], items: Sequence[Window],
                progress: Progress, what: str) -> dict[int, Tensor]:  # fmt: skip
    parts: dict[int, list[Tensor]] = {i: [] for i in gates}
    for batch in progress.over(list(batches(items, model.pad_id)), what):
        b = batch.to(model.device)
        streams = model.capture(b.ids, list(gates), b.attention_mask)
        for layer, gate in gates.items():
            parts[layer].append(gate.activity(saes[layer], streams[layer][b.mask]).float().cpu())
    return {i: torch.cat(p) for i, p in parts.items()}
