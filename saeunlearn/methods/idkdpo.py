"""IdkDPO: prefer a refusal to the answer (direct preference optimisation, arXiv 2305.18290; in TOFU, arXiv 2401.06121).

L = −(1/β) E log σ(β(log π/π₀ of the refusal − log π/π₀ of the answer)) + retain_weight · NLL(retain). Positions: the
refusal's and the answer's tokens; a plain text is asked for by all but its last word, which is its answer. It is a
refusal method: it changes what is said, and the answer's likelihood only on the way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..corpus import Batch, Window, collate
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms
from .objectives import dpo, nll, target_log_probs, target_mask
from .refusal import answers, prompts, refusals
from .trainable import Trainable


@dataclass(frozen=True)
class IdkDPOConfig(GradientConfig):
    """Settings of IdkDPO."""

    lr: float = 0.1  # as in LoopConfig (TOFU: 1e-5 absolute)
    beta: float = 0.02  # inverse temperature: at TOFU's 0.1 a small model prefers refusals and still says the answer


class IdkDPO(GradientMethod):
    name = "idkdpo"
    Config = IdkDPOConfig
    paper = "IDK with DPO in TOFU, Maini et al., COLM 2024, arXiv 2401.06121; Rafailov et al., arXiv 2305.18290"

    def objective(self, task: Task) -> Objective:
        model, config = task.model, task.config
        answered = answers(task.forget, model, config.max_length)
        refused = refusals(model)
        asked = prompts(task.forget, model, config.max_length)
        rng = random.Random(task.seed)

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            which = [asked[i] for i in dict.fromkeys(f.records)]
            no = collate(
                [Window((*p.ids, *rng.choice(refused)), len(p.ids), p.record) for p in which], model.pad_id
            ).to(f.ids.device)
            yes = collate([answered[p.record] for p in which], model.pad_id).to(f.ids.device)

            def pair(batch: Batch) -> tuple[Tensor, Tensor]:
                before = target_log_probs(trained.original_logits(batch), batch)
                return target_log_probs(trained.logits(batch), batch), before

            def retain_loss() -> Any:
                return nll(target_log_probs(trained.logits(r), r), target_mask(r))

            return lambda: dpo(pair(no), pair(yes), config.beta), retain_loss

        return losses
