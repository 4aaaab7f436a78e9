"""δ-unlearning: a logit offset trained beside a black-box model (Huang et al., TMLR 2025, arXiv 2404.11045).

    ℓ(y|·) = ℓ_M(y|·) + w·(ℓ_o'(y|·) − ℓ_o(y|·))

o and o' start as one small model that shares M's vocabulary; only o' is trained, with a loss of the gradient family on
the logits of the ensemble. Nothing of M is read but its logits, and nothing in it changes: M keeps the knowledge, so an
offset controls access to it. One Erasure holds one offset; those of several requests add up, and each can go by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..corpus import Corpus, refuse_overlap
from ..errors import ConfigError
from ..models import LanguageModel
from ..offsets import Ensemble, Logits, Offset, check_vocabularies
from ..progress import Progress
from . import get_method
from .budget import Edit
from .gradient import GradientConfig, GradientMethod, Objective, Task, Trained, check_loop
from .trainable import Trainable, check_weights, trainable

LOSSES = ("ga", "graddiff", "kl", "npo", "simnpo", "idkdpo")  # methods whose losses need nothing but logits


@dataclass(frozen=True)
class DeltaConfig(GradientConfig):
    """Settings of the gradient family, for training o'. A LoRA is on every matrix of its blocks."""

    lr: float = 0.003
    steps: int = 400  # paper: 5 epochs
    retain_weight: float = 5.0
    offset_model: str = ""  # folder or hub id of the small model; required
    loss: str = "npo"  # a method of the gradient family (paper: several)
    beta: float | None = None  # that of the loss; None: as the loss has it
    offset_weight: float = 1.0  # w while training (paper: 1); the budget scales it afterwards


class Delta(GradientMethod):
    """The method object; see the module's docstring. Positions: those of the loss, the targets of each text."""

    name = "delta"
    Config = DeltaConfig
    kind: Literal["weights", "offset"] = "offset"
    changes = "nothing in the model, which keeps the knowledge: its logits at inference (access control)"
    paper = "Huang et al., TMLR 2025, arXiv 2404.11045"
    cost = "trains the small model, with a forward pass of the model for each batch; at inference two small models more"

    def check(self, model: LanguageModel, config: DeltaConfig) -> None:
        """Raises ConfigError, ModelError for an offset model that cannot be opened, TokenizerMismatchError."""
        if not config.offset_model:
            raise ConfigError("delta needs offset_model: the folder or hub id of a small model with the same tokenizer")
        loss_of(config)
        small = self._open(model, config)
        check_vocabularies(model, small)
        check_loop(config)
        check_weights(small, config.weights, config.rank)

    def objective(self, task: Task) -> Objective:
        method, settings = loss_of(task.config)
        return method.objective(dataclasses.replace(task, config=settings))

    def subject(self, model: LanguageModel, config: DeltaConfig) -> Ensemble:
        return Ensemble(model, self._open(model, config))

    @contextlib.contextmanager
    def training(self, task: Task) -> Iterator[Trainable]:
        """o' is trained; the logits are the ensemble's, and the original is the base model."""
        subject, config, seed = task.model, task.config, task.seed
        given = subject.small
        small = given
        if given.dtype != torch.float32:  # as at inference
            small = given.copy()
            small.model.float()
        unchanged = Offset.of(small, [], config.offset_weight, given.dtype)
        with trainable(small, config.weights, config.rank, seed, "all-linear") as inner:

            def offset(ids: Tensor, mask: Tensor | None) -> Tensor:
                with torch.no_grad(), inner.original() as original:
                    before = original.logits(ids, mask)
                return config.offset_weight * (inner.net.logits(ids, mask) - before)

            def parts() -> list[Any]:
                changes = inner.parts()
                return [dataclasses.replace(unchanged, changes=changes)] if changes else []

            bare = partial(subject.with_offsets, [])
            with subject.with_offsets([offset]):
                yield Trainable(subject, inner.params, inner.sizes, bare, parts)

    def edit(self, subject: Ensemble, parts: Sequence[Offset]) -> Edit:
        (runtime,) = [p.runtime() for p in parts]

        def edit(scale: float) -> contextlib.AbstractContextManager[object]:
            return subject.with_offsets([lambda ids, mask: scale * runtime(ids, mask)])

        return edit

    def scaled(self, part: Offset, scale: float) -> Offset:
        return dataclasses.replace(part, weight=scale * part.weight)

    def _open(self, model: LanguageModel, config: DeltaConfig) -> LanguageModel:
        return LanguageModel.open(config.offset_model, device=str(model.device))


def unlearn_offset(
    base: Logits,
    offset_model: LanguageModel,
    forget: Corpus,
    retain: Corpus,
    *,
    config: DeltaConfig,
    seed: int,
    progress: Progress | None = None,
) -> Trained:
    """An offset for a base model of which there are only logits; `offset_model` is o, and is unchanged afterwards.

    `config.offset_model` is not read. The result holds the part (an `Offset`): `part.runtime()` computes it,
    `Ensemble(base, offset_model, [part.runtime()])` scores with it. Raises what `Delta.unlearn` raises.
    """
    method = Delta()
    loss_of(config)
    check_loop(config)
    check_weights(offset_model, config.weights, config.rank)
    refuse_overlap(forget, retain)
    task = Task(Ensemble(base, offset_model), forget, retain, config, seed, None, {})
    return method.train(task, progress or Progress())


def loss_of(config: DeltaConfig) -> tuple[GradientMethod, Any]:
    """The method whose objective is used, and its settings. Raises ConfigError for another loss, or a foreign beta."""
    if config.loss not in LOSSES:
        raise ConfigError(f"unknown loss {config.loss!r}; use one of {', '.join(LOSSES)}")
    method: Any = get_method(config.loss)
    if config.beta is None:
        return method, method.Config()
    if "beta" not in {f.name for f in dataclasses.fields(method.Config)}:
        raise ConfigError(f"the loss {config.loss} has no beta; leave it out")
    return method, method.Config(beta=config.beta)
