"""The one loop that trains a language model: sandbox, and every later use (oracle, healing, relearning)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .corpus import Batch
from .errors import NonFiniteError
from .models import LanguageModel
from .progress import Progress


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`."""

    steps: int = 1000  # optimiser steps
    lr: float = 4e-3  # peak learning rate of a one-cycle schedule
    warmup: float = 0.1  # share of the steps with rising learning rate
    weight_decay: float = 0.1  # AdamW's, on matrices only
    clip: float = 1.0  # gradient norm


def train(
    model: LanguageModel, batches: Iterator[Batch], config: TrainConfig, progress: Progress, what: str = "training",
    after: Callable[[int], None] | None = None, loss_of: Callable[[Batch], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Train all weights in place on the targets of `batches`; returns the loss of each step (nats a token).

    The weights must be float32 (master weights); on a GPU the matrix products run in bfloat16. `after` is called
    after every step with the number of steps done, the model in evaluation mode. `loss_of`: a scalar that
    it computes from a batch with the model, in place of the loss on the batch's targets.
    Raises NonFiniteError at the first loss that is not finite, Cancelled when asked to stop.
    """
    net = model.model.train()
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    progress.start(what, config.steps)
    try:
        for step in range(config.steps):
            for group in optimiser.param_groups:
                group["lr"] = config.lr * one_cycle(step, config.steps, config.warmup)
            b = next(batches).to(model.device)
            # On CPUs bfloat16 gains nothing at the sizes that are trained here.
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = loss_of(b) if loss_of else next_token_loss(b, model.logits(b.ids, b.attention_mask))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"{what}: the loss is {losses[-1]} at step {step}; lower the learning rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, config.clip)
            optimiser.step()
            progress.step(loss=losses[-1])
            if after is not None:
                net.eval()
                after(step + 1)
                net.train()
    finally:
        net.eval()
    progress.finish(loss=losses[-1])
    return losses


def next_token_loss(b: Batch, logits: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the tokens that are targets."""
    wanted = b.targets[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1][wanted].float(), b.ids[:, 1:][wanted])


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear rise over `warmup` of the steps, then a cosine to 0."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
