"""GA: gradient ascent on the forget texts (Jang et al., ACL 2023, arXiv 2210.01504); no retain loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..corpus import Batch
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms, nothing
from .objectives import ascent, target_log_probs, target_mask
from .trainable import Trainable


@dataclass(frozen=True)
class GAConfig(GradientConfig):
    """Known to ruin models: only the retention budget holds it back."""

    bound: float = 10.0  # nats a token beyond which a text pulls no further (paper: none)


class GA(GradientMethod):
    name = "ga"
    Config = GAConfig
    paper = "Jang et al., ACL 2023, arXiv 2210.01504"

    def objective(self, task: Task) -> Objective:
        config = task.config

        def losses(trained: Trainable, f: Batch, _r: Batch) -> Terms:
            return (
                lambda: ascent(target_log_probs(trained.logits(f), f), target_mask(f), config.bound),
                nothing,
            )

        return losses
