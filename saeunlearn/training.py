"""The one loop that trains a language model: sandbox, and every later use (oracle, healing, relearning)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import NonFiniteError
from .models import LanguageModel
from .progress import Progress


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`."""

    steps: int = 400  # optimiser steps
    lr: float = 2e-3  # peak learning rate of a one-cycle schedule
    warmup: float = 0.1  # share of the steps with rising learning rate
    weight_decay: float = 0.01  # AdamW's, on matrices only
    clip: float = 1.0  # gradient norm


def train(model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig,
          progress: Progress, what: str = "training") -> list[float]:  # fmt: skip
    """Train all weights in place on (ids, targets) batches; returns the loss of each step (nats a token).

    ids: [batch, position]; targets (bool, same shape) marks the tokens that are predicted. The weights must be
    float32 (master weights); the matrix products run in bfloat16 where the machine has them.
    Raises NonFiniteError at the first loss that is not finite, Cancelled when asked to stop.
    """
    net = model.model.train()
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    losses: list[float] = []
    progress.start(what, config.steps)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * one_cycle(step, config.steps, config.warmup)
        ids, targets = (t.to(model.device) for t in next(batches))
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            logits = net(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].float()[targets[:, 1:]], ids[:, 1:][targets[:, 1:]])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"{what}: the loss is {losses[-1]} at step {step}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, config.clip)
        optimiser.step()
        progress.step(loss=losses[-1])
    progress.finish(loss=losses[-1])
    net.eval()
    return losses


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear rise over `warmup` of the steps, then a cosine to 0."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def packed(sequences: list[list[int]], length: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, targets) of [batch, length]: shuffled sequences laid end to end, epoch after epoch.

    Each sequence brings its own BOS, which is never a target.
    """
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    starts: list[bool] = []
    need = batch * length
    while True:
        while len(stream) < need:
            for i in torch.randperm(len(sequences), generator=generator).tolist():
                stream += sequences[i]
                starts += [True] + [False] * (len(sequences[i]) - 1)
        ids = torch.tensor(stream[:need]).view(batch, length)
        targets = ~torch.tensor(starts[:need]).view(batch, length)
        stream, starts = stream[need:], starts[need:]
        yield ids, targets
