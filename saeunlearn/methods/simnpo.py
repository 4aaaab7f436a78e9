"""SimNPO: length-normalised NPO without a reference model (Fan et al., 2024, arXiv 2410.07163)."""

from __future__ import annotations

from dataclasses import dataclass

from ..corpus import Batch
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms
from .objectives import nll, simnpo, target_log_probs, target_mask
from .trainable import Trainable


@dataclass(frozen=True)
class SimNPOConfig(GradientConfig):
    """L = SimNPO(forget; β, γ) + retain_weight · NLL(retain)."""

    lr: float = 0.1  # as in LoopConfig (paper: 1e-5 absolute)
    beta: float = 2.5  # paper: 2.5 on TOFU forget05, up to 4.5
    gamma: float = 2.0  # margin (paper: 0 to 2)


class SimNPO(GradientMethod):
    name = "simnpo"
    Config = SimNPOConfig
    paper = "Fan et al., NeurIPS 2025, arXiv 2410.07163"

    def objective(self, task: Task) -> Objective:
        config = task.config

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            return (
                lambda: simnpo(target_log_probs(trained.logits(f), f), target_mask(f), config.beta, config.gamma),
                lambda: nll(target_log_probs(trained.logits(r), r), target_mask(r)),
            )

        return losses
