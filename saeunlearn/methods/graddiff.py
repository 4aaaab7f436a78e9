"""GradDiff: gradient ascent on forget texts, likelihood on retain texts (Liu et al., 2022, arXiv 2203.12817)."""

from __future__ import annotations

from dataclasses import dataclass

from ..corpus import Batch
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms
from .objectives import ascent, nll, target_log_probs, target_mask
from .trainable import Trainable


@dataclass(frozen=True)
class GradDiffConfig(GradientConfig):
    """GA's forget loss beside the retain texts' negative log-likelihood."""

    bound: float = 10.0  # nats a token beyond which a forget text pulls no further (paper: none)


class GradDiff(GradientMethod):
    name = "graddiff"
    Config = GradDiffConfig
    paper = "Liu et al., CoLLAs 2022, arXiv 2203.12817; for language models TOFU, arXiv 2401.06121"

    def objective(self, task: Task) -> Objective:
        config = task.config

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            return (
                lambda: ascent(target_log_probs(trained.logits(f), f), target_mask(f), config.bound),
                lambda: nll(target_log_probs(trained.logits(r), r), target_mask(r)),
            )

        return losses
