"""RMU and adaptive RMU: forget activations are driven to a random direction, retain activations are kept.

L = E_f ‖h_l − s·u‖² + α E_r ‖h_l − h_l⁰‖², u uniform in [0, 1)^d and normalised, fixed (Li et al., ICML 2024, arXiv
2403.03218, eq. 1 to 3); adaptive: s = β · mean ‖h_l⁰(forget)‖ (Huu-Tien et al., AAAI 2025, arXiv 2408.06223). Means
over positions and dimensions; the published code averages over padding too, here it does not count. First positions
(BOS) are never driven away; they are held like retain positions, their huge norms scaled to the mean of the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..corpus import Batch, windows
from ..models import LanguageModel
from .budget import some
from .gradient import GradientMethod, LoopConfig, Objective, Task, Terms, check_loop
from .trainable import Trainable, trainable_writers


@dataclass(frozen=True)
class RMUConfig(LoopConfig):
    """Settings of RMU."""

    layer: int | None = None  # whose output is driven away; None: the middle block (paper: 7 of 32)
    blocks: int = 3  # trained blocks layer − blocks + 1 … layer (paper: 3), their MLP output matrices
    adaptive: bool = True  # s from the norms of the forget activations
    beta: float = 5.0  # adaptive: s in units of that norm (paper: 5)
    steering: float = 20.0  # not adaptive: s (paper: 20, Zephyr 6.5)
    lr: float = 0.1  # as in LoopConfig (paper: 5e-5 absolute)
    retain_weight: float = 30.0  # α (paper: 100, Zephyr 1200)


class RMU(GradientMethod):
    name = "rmu"
    Config = RMUConfig
    paper = "Li et al., ICML 2024, arXiv 2403.03218; adaptive: Huu-Tien et al., AAAI 2025, arXiv 2408.06223"
    changes = "MLP output matrices of a few blocks"
    cost = "passes up to the chosen layer"

    def check(self, model: LanguageModel, config: RMUConfig) -> None:
        check_loop(config)
        model.check_layers([layer_of(model, config)])

    def training(self, task: Task) -> AbstractContextManager[Trainable]:
        layer = layer_of(task.model, task.config)
        writers = task.model.writers(list(range(max(0, layer - task.config.blocks + 1), layer + 1)))
        return trainable_writers(task.model, writers, [None] * len(writers))

    def objective(self, task: Task) -> Objective:
        model, forget, config, seed = task.model, task.forget, task.config, task.seed
        layer = layer_of(model, config)
        u = torch.rand(model.d_model, generator=torch.Generator().manual_seed(seed)).to(model.device)
        sample = some(windows(forget, model, config.max_length), seed)
        s = config.beta * mean_norm(model, sample, layer) if config.adaptive else config.steering
        target = s * u / u.norm()

        def stream(trained: Trainable, batch: Batch) -> Tensor:
            with trained.edit(1.0):
                return model.capture(batch.ids, [layer], batch.attention_mask)[layer].float()

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            def kept() -> Tensor:
                with torch.no_grad():
                    before = model.capture(r.ids, [layer], r.attention_mask)[layer].float()
                moved = stream(trained, r) - before
                size = before.norm(dim=-1)
                first = moved[:, 0] * (size[r.mask].mean() / size[:, 0])[:, None]
                return torch.cat([moved[r.mask], first]).pow(2).mean()

            return lambda: (stream(trained, f)[f.mask] - target).pow(2).mean(), kept

        return losses


def layer_of(model: LanguageModel, config: RMUConfig) -> int:
    return model.n_layers // 2 if config.layer is None else config.layer


@torch.no_grad()
def mean_norm(model: LanguageModel, items: list[Any], layer: int) -> float:
    """Mean norm of the stream after block `layer` over the counted positions of the windows."""
    norms = []
    for w in items:
        h = model.capture(torch.tensor([w.ids], device=model.device), [layer])[layer]
        norms.append(h[0, 1:].float().norm(dim=-1).cpu())
    return float(torch.cat(norms).mean())
