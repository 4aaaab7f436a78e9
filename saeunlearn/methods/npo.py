"""NPO: negative preference optimisation (Zhang et al., COLM 2024, arXiv 2404.05868, eq. 3).

`npo` is the paper's, with a retain likelihood; `npo-lora` the low-rank one of SemEval-2025 task 4 (Bronec & Helcl,
arXiv 2503.13690): a LoRA on query and value whose reference is the same network with the adapter off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..corpus import Batch
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms
from .objectives import kl, nll, npo, target_log_probs, target_mask
from .trainable import Trainable


@dataclass(frozen=True)
class NPOConfig(GradientConfig):
    """L = NPO(forget; β) + retain_weight · (nll_weight · NLL + kl_weight · KL(original ‖ trained)), both on retain."""

    beta: float = 0.1  # inverse temperature (paper: 0.1); towards 0 it is gradient ascent
    nll_weight: float = 1.0  # paper: 1
    kl_weight: float = 0.0  # paper: 0
    per_token: bool = False  # the ratio of each token instead of the whole answer's (as published with 2503.13690)


@dataclass(frozen=True)
class LowRankNPOConfig(NPOConfig):
    """The best setting of 2503.13690 for 1B models."""

    lr: float = 0.1  # as in LoopConfig (paper: 1e-4 absolute)
    rank: int = 5  # paper: 2 to 5
    beta: float = 0.5
    kl_weight: float = 0.5  # paper: .5 at 1B, 0 at 7B; over the gold token only in its code, the whole vocabulary here


class NPO(GradientMethod):
    name = "npo"
    Config: type = NPOConfig
    paper = "Zhang et al., COLM 2024, arXiv 2404.05868"

    def objective(self, task: Task) -> Objective:
        config = task.config

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            def forget_loss() -> Any:
                before = target_log_probs(trained.original_logits(f), f)
                now = target_log_probs(trained.logits(f), f)
                return npo(now, before, target_mask(f), config.beta, config.per_token)

            def retain_loss() -> Any:
                original = trained.original_logits(r) if config.kl_weight else None
                logits = trained.logits(r).unbind()  # once for both terms, or each would hold a gradient of all logits
                loss = config.nll_weight * nll(target_log_probs(logits, r), target_mask(r))
                return loss if original is None else loss + config.kl_weight * kl(original, logits, target_mask(r))

            return forget_loss, retain_loss

        return losses


class LowRankNPO(NPO):
    name = "npo-lora"
    Config = LowRankNPOConfig
    paper = "Bronec & Helcl, SemEval-2025 task 4, arXiv 2503.13690"
    changes = "a LoRA on query and value"
    cost = "as fine-tuning a LoRA; no second copy of the model"
