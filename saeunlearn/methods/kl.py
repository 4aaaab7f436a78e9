"""KL: gradient ascent on forget texts, closeness to the original on retain texts (TOFU, arXiv 2401.06121)."""

from __future__ import annotations

from dataclasses import dataclass

from ..corpus import Batch
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms
from .objectives import ascent, kl, target_log_probs, target_mask
from .trainable import Trainable


@dataclass(frozen=True)
class KLConfig(GradientConfig):
    """GA's forget loss beside KL(original ‖ trained) over the whole vocabulary."""

    bound: float = 10.0  # nats a token beyond which a forget text pulls no further (paper: none)


class KL(GradientMethod):
    name = "kl"
    Config = KLConfig
    paper = "KL minimisation in TOFU, Maini et al., COLM 2024, arXiv 2401.06121"

    def objective(self, task: Task) -> Objective:
        config = task.config

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            return (
                lambda: ascent(target_log_probs(trained.logits(f), f), target_mask(f), config.bound),
                lambda: kl(trained.original_logits(r), trained.logits(r), target_mask(r)),
            )

        return losses
