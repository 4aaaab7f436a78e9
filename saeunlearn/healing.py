"""Healing: after an edit, bring what was to be kept back to the original's answers, and nothing of the rest.

The edited model is trained towards the original one, by KL and residual streams (`objectives.distance`), on sentences
that the original writes itself (they tell what no record at hand says), or on the retain records. Two things keep the
way back closed. What the edit erased stays erased: each change of a matrix is kept orthogonal, on its input side, to
the right singular vectors that hold `ERASED` of the energy of its ΔW, and rows of the embedding that the edit moved far
stay where they are. And the loss on forget text is watched: of the healing only as large a share is taken as leaves the
edit that much of its effect there.

Compute: one forward pass of the original and a forward and a backward pass of the edited model a step, and the
sampling, a forward pass a token.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .corpus import Corpus, endless, windows
from .erasure import Erasure, WeightDelta
from .errors import ConfigError
from .losses import mean_loss
from .methods.budget import some
from .methods.objectives import distance
from .models import LanguageModel
from .own_text import own_sentences
from .parts import base_parameters
from .progress import Progress
from .stored import parameter_key
from .training import TrainConfig, train

ERASED = 0.9  # of the energy of a ΔW: the input directions that healing must not write to
MOVED = 0.5  # rows that the edit changed by more than this share of their length stay as they are


@dataclass(frozen=True)
class HealConfig:
    """Settings of `heal`. There is no paper to compare with."""

    steps: int = 300  # optimiser steps
    lr: float = 1e-3  # peak learning rate of AdamW, one-cycle
    batch: int = 32  # windows in a step
    samples: int = 3000  # sentences that the original writes, to train on; 0: train on the retain records
    tokens: int = 32  # the most in one of them
    max_length: int = 256  # tokens in a window of a record
    state_weight: float = 3.0  # of the distance of the residual streams against the KL
    max_return: float = 0.1  # share of the edit's effect on the forget loss that may be lost

    def check(self) -> None:
        """Raises ConfigError naming the setting that is out of range."""
        for name, least in (("steps", 1), ("batch", 1), ("samples", 0), ("tokens", 2), ("max_length", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"healing: {name} = {getattr(self, name)}; use at least {least}")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ConfigError(f"healing: lr = {self.lr} must be positive and finite")
        if not self.state_weight >= 0:
            raise ConfigError(f"healing: state_weight = {self.state_weight} must not be negative")
        if not 0 < self.max_return < 1:
            raise ConfigError(f"healing: max_return = {self.max_return} must lie between 0 and 1")


def heal(
    model: LanguageModel, erasure: Erasure, forget: Corpus, retain: Corpus, config: HealConfig, seed: int,
    progress: Progress,
) -> Erasure:  # fmt: skip
    """An Erasure in place of the given one: the same edit, healed. `model` is the original and stays as it is.

    The manifest is that of `erasure` with config["heal"] and extra["heal"]: the forget loss of the original, edited and
    healed model, the scale of the healing that the guard allows, and the KL by step. Raises ConfigError where the
    Erasure has parts that are no change of weights, NonFiniteError, Cancelled.
    """
    config.check()
    if other := sorted({p.kind for p in erasure.parts} - {WeightDelta.kind}):
        raise ConfigError(f"only changes of weights can be healed; {erasure.manifest['method']} has {', '.join(other)}")
    text = retain
    if config.samples:
        text = own_sentences(model, forget, retain, config.samples, config.tokens, seed, progress)
    rows = endless(windows(text, model, config.max_length), model.pad_id, config.batch, seed)
    student = model.copy()
    student.model.float()
    erasure.apply(student)
    watched = some(windows(forget, model, config.max_length), seed)
    before, edited = mean_loss(model, watched), mean_loss(student, watched)
    start = {k: p.detach().clone() for k, p in base_parameters(student).items()}
    held = {k: held_by(p, start[k]) for p in erasure.parts if isinstance(p, WeightDelta)
            and (k := parameter_key(p.name))}  # fmt: skip
    student.model.requires_grad_(True)

    @torch.no_grad()
    def hold(_step: int) -> None:
        for k, p in base_parameters(student).items():
            if k in held:
                held[k].restore(p, start[k])

    plan = TrainConfig(steps=config.steps, lr=config.lr, weight_decay=0.0)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout, where the model has any
        torch.manual_seed(seed)
        losses = train(
            student, rows, plan, progress, "healing", hold, lambda b: distance(model, student, b, config.state_weight)
        )
    now = {k: p.detach().clone() for k, p in base_parameters(student).items()}

    def at(scale: float) -> float:
        """The forget loss with that share of the healing."""
        with torch.no_grad():
            for k, p in base_parameters(student).items():
                p.copy_(start[k] + scale * (now[k] - start[k]))
        return mean_loss(student, watched)

    floor = edited - config.max_return * max(0.0, edited - before)
    scale, low, high = 1.0, 0.0, 1.0
    if at(1.0) < floor:
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) >= floor else (low, middle)
        scale = low
    healed = at(scale)
    parts = [WeightDelta(name, False, dense=p.detach() - old.detach().to(p))
             for (name, old), p in zip(model._base.named_parameters(), student._base.parameters())
             if not torch.equal(p, old.to(p))]  # fmt: skip
    manifest = erasure.manifest
    said = {"forget_loss": {"original": before, "edited": edited, "healed": healed}, "scale": scale, "kl": losses}
    return Erasure.create(
        model, parts, method=manifest["method"], config={**manifest["config"], "heal": asdict(config)},
        seed=manifest["seed"], forget_fingerprint=manifest["forget_fingerprint"],
        retain_fingerprint=manifest["retain_fingerprint"], selection=manifest["selection"], saes=manifest["saes"],
        losses=manifest["losses"], extra={**manifest["extra"], "heal": said},
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What healing must not change of a parameter that the edit changed: rows as stored, and, of its canonical form
    [d_out, d_in], what it does to the input directions [d_in, r]."""

    rows: Tensor | None
    directions: Tensor | None
    transposed: bool

    def restore(self, p: Tensor, start: Tensor) -> None:
        """Take from `p`, in place, what it changed of `start` against this."""
        if self.rows is not None:
            p[self.rows] = start[self.rows]
        if self.directions is not None:
            change = (p - start).T if self.transposed else p - start
            forbidden = change @ self.directions @ self.directions.T
            p.sub_(forbidden.T if self.transposed else forbidden)


def held_by(part: WeightDelta, weight: Tensor) -> Held:
    """By the edit of `weight`, the edited parameter as stored."""
    if part.rows is not None and part.dense is not None:
        rows, change = part.rows.to(weight.device), part.dense.to(weight)
        far = change.norm(dim=1) > MOVED * (weight[rows] - change).norm(dim=1)
        return Held(rows[far], None, False)
    delta = part.delta().to(weight.device)
    if delta.ndim != 2 or not delta.any():
        return Held(None, None, False)
    _, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    energy = sizes.pow(2).cumsum(0)
    r = int((energy < ERASED * energy[-1]).sum()) + 1
    return Held(None, right[:r].T.contiguous(), part.transposed)
