"""What the methods share that train on next-token losses: settings, the loop, the retention budget."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..corpus import Batch, Corpus, Window, endless, refuse_overlap, windows
from ..erasure import Erasure
from ..errors import ConfigError
from ..features.selection import Selection
from ..models import LanguageModel
from ..parts import WeightDelta
from ..progress import Progress
from ..training import one_cycle
from ..updates import Rule, make_update
from .budget import MAX_SCALE, Budget, Edit, OverBudgetError, some
from .trainable import Trainable, check_weights, edited, trainable


@dataclass(frozen=True)
class LoopConfig:
    """Settings of every method that trains by a forget and a retain loss."""

    lr: float = 0.03  # AdamW step relative to the root mean square of each weight matrix (papers: 1e-5 absolute)
    steps: int = 200  # papers: 5 to 10 epochs
    batch: int = 16  # forget windows and retain windows a step (papers: 4 to 32)
    max_length: int = 256  # tokens in a training window
    retain_weight: float = 1.0  # of the retain loss against the forget loss
    update: Rule = "plain"  # or restricted: gradients that do not hurt the other loss (arXiv 2412.07808)
    precondition: bool = True  # restricted: measure by a running mean of squared gradients, as Adam, not by plain ones
    max_retain_rise: float = 0.02  # relative rise of the loss on held-out retain records that the result keeps to
    check_every: int = 25  # steps between checks of the budget


@dataclass(frozen=True)
class GradientConfig(LoopConfig):
    """Settings that all methods of the gradient family have."""

    # What is trained: all, blocks (their matrices), lora, or module names such as down_proj,o_proj (papers: all)
    weights: str = "lora"
    rank: int = 8  # of the LoRA; its alpha is the same


ATTEMPTS = 3  # at a step length with which anything is left within the budget
SHORTER = 4.0  # by which the learning rate is divided after a failed one

POSITIVE = ("rank", "lr", "steps", "batch", "max_retain_rise", "check_every", "beta", "bound", "steering", "blocks",
            "offset_weight")  # fmt: skip
NOT_NEGATIVE = ("retain_weight", "gamma", "kl_weight", "nll_weight")


@dataclass(frozen=True)
class Task:
    """What a run is given. `model`: what computes the losses (see `GradientMethod.subject`); `retain`: for objectives
    the part that is trained on, while the budget watches the rest."""

    model: Any
    forget: Corpus
    retain: Corpus
    config: Any
    seed: int
    selection: Selection | None
    saes: Mapping[int, Any]


Terms = tuple[Callable[[], Tensor], Callable[[], Tensor]]
Objective = Callable[[Trainable, Batch, Batch], Terms]
"""objective(trained, forget batch, retain batch): how to compute the forget loss, and the retain loss unweighted."""


def check_loop(config: Any) -> None:
    """Raises ConfigError naming the setting that is out of range."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in given.keys() & set(POSITIVE):
        if given[name] is not None and not (math.isfinite(given[name]) and given[name] > 0):
            raise ConfigError(f"{name} must be positive and finite, not {given[name]}")
    for name in given.keys() & set(NOT_NEGATIVE):
        if not given[name] >= 0:
            raise ConfigError(f"{name} must not be negative, not {given[name]}")
    if config.update not in get_args(Rule):
        raise ConfigError(f"unknown update {config.update!r}; use {' or '.join(get_args(Rule))}")


@dataclass(frozen=True)
class Trained:
    """What training under the budget gives: the parts at the strength that it allows, the loss log, what it cost."""

    parts: list[Any]
    losses: list[dict[str, float]]
    budget: dict[str, float]


class GradientMethod(ABC):
    """A method that is its objective; see `GradientConfig`. A subclass has name, Config, paper, cost, `objective`.

    One that trains on other text overrides `text`, one that trains something else than the model's weights `subject`,
    `training`, `edit` and `scaled`.
    """

    name: str
    Config: type
    paper: str
    cost = "whole forward and backward passes over a forget and a retain batch a step"
    needs: frozenset[str] = frozenset()
    kind: Literal["weights", "offset"] = "weights"
    changes = "weights of your choice: a LoRA, modules, or all"
    most = MAX_SCALE  # of what was learned, where the budget has room

    @abstractmethod
    def objective(self, task: Task) -> Objective:
        """The losses; called before each training."""

    def check(self, model: LanguageModel, config: Any) -> None:
        """Raises ConfigError naming the setting that is out of range."""
        check_loop(config)
        check_weights(model, config.weights, config.rank)

    def text(self, task: Task, progress: Progress) -> tuple[list[Window], list[Window]]:
        """The windows that forget batches and retain batches are drawn from; called once, before training.

        Without any of the first nothing is trained.
        """
        items = [windows(c, task.model, task.config.max_length) for c in (task.forget, task.retain)]
        return items[0], items[1]

    def batches(self, config: Any) -> tuple[int, int]:
        """How many forget windows and how many retain windows a step takes."""
        return config.batch, config.batch

    def training(self, task: Task) -> AbstractContextManager[Trainable]:
        """What is trained; the model is as before afterwards."""
        return trainable(task.model, task.config.weights, task.config.rank, task.seed)

    def subject(self, model: LanguageModel, config: Any) -> Any:
        """What computes the losses: the model, or something that computes with it."""
        return model

    def edit(self, subject: Any, parts: Sequence[Any]) -> Edit:
        """The subject with a share of the trained parts."""
        return partial(edited, subject, parts)

    def scaled(self, part: Any, scale: float) -> Any:
        """The part with another strength."""
        return scaled(part, scale)

    def unlearn(
        self,
        model: LanguageModel,
        forget: Corpus,
        retain: Corpus,
        *,
        config: Any,
        selection: Selection | None,
        saes: Mapping[int, Any],
        seed: int,
        progress: Progress,
    ) -> Erasure:
        """Train under the retention budget and return the Erasure; the model is unchanged.

        Losses use the targets of each text: the answer of a question/answer pair, else all tokens but the first. The
        budget raises the weight of the retain loss where it is overdrawn, ends a run that ruins the model, and scales
        the result to the strength that it allows; where that is none, the run is repeated with shorter steps, twice at
        most, and says so (`extra["budget"]["lr"]` of the manifest). Raises ConfigError, OverlapError, NonFiniteError,
        Cancelled.
        """
        self.check(model, config)
        refuse_overlap(forget, retain)
        done = self.train(Task(self.subject(model, config), forget, retain, config, seed, selection, saes), progress)
        return Erasure.create(
            model, done.parts, method=self.name, config=asdict(config), seed=seed,
            forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(), losses=done.losses,
            selection=None if selection is None else selection.to_dict(), extra={"budget": done.budget},
        )  # fmt: skip

    def train(self, task: Task, progress: Progress) -> Trained:
        """`unlearn` after the checks, up to the parts."""
        config, seed = task.config, task.seed
        kept, held = task.retain.split(0.2, seed)
        task = replace(task, retain=kept)
        f_items, r_items = self.text(task, progress)
        budget = Budget(task.model)
        budget.watch("retain", some(windows(held, task.model, config.max_length), seed), config.max_retain_rise)
        for attempt in range(ATTEMPTS):
            now = replace(config, lr=config.lr / SHORTER**attempt)
            objective = self.objective(task)
            with self.training(task) as trained:
                losses = []
                if f_items:
                    losses = _fit(self, trained, budget, f_items, r_items, now, seed, progress, objective)
                parts = trained.parts()
            if not parts:
                raise ConfigError(f"{self.name} changed nothing: raise lr or steps")
            try:
                said = budget.settle(self.edit(task.model, parts), self.most)
                break
            except OverBudgetError as e:
                if attempt + 1 == ATTEMPTS:
                    raise
                progress.note(f"{self.name}, lr {now.lr:g}: {e}; again with lr {now.lr / SHORTER:g}")
        return Trained([self.scaled(p, said["scale"]) for p in parts], losses, {**said, "lr": now.lr})


def _fit(method: GradientMethod, trained: Trainable, budget: Budget, f_items: list[Window], r_items: list[Window],
         config: Any, seed: int, progress: Progress, objective: Objective) -> list[dict[str, float]]:  # fmt: skip
    model = trained.net
    groups = trained.groups(config.lr)
    step = make_update(config.update, groups, config.precondition)
    f_size, r_size = method.batches(config)
    f_batches = endless(f_items, model.pad_id, f_size, seed)
    r_batches = endless(r_items, model.pad_id, r_size, seed + 1)
    history: list[dict[str, float]] = []
    ruined = False
    budget = dataclasses.replace(budget, model=model)
    progress.start(method.name, config.steps)
    for n in range(config.steps):
        for group in groups:
            group["lr"] = group["peak"] * one_cycle(n, config.steps, 0.05)
        f, r = next(f_batches).to(model.device), next(r_batches).to(model.device)
        forget_loss, retain_loss = objective(trained, f, r)
        weight = config.retain_weight * budget.factor
        value, kept = step(forget_loss, partial(_weighted, retain_loss, weight))
        row = {"step": n, "forget": value, "retain": kept / weight if weight else 0.0}
        if (n + 1) % config.check_every == 0 or n + 1 == config.steps:
            rises = budget.check(trained.edit)
            row |= {f"{k}_rise": v for k, v in rises.items() if math.isfinite(v)}
            ruined = math.inf in rises.values()  # what is merely beyond the limit may recover under the retain loss
        history.append(row)
        progress.step(1, **{k: v for k, v in row.items() if k != "step"})
        if ruined:
            break
    progress.finish()
    return history


def _weighted(loss: Callable[[], Tensor], weight: float) -> Tensor:
    return weight * loss()


def scaled(part: WeightDelta, scale: float) -> WeightDelta:
    """The same change with another strength."""
    if part.dense is not None:
        return dataclasses.replace(part, dense=scale * part.dense)
    assert part.left is not None
    return dataclasses.replace(part, left=scale * part.left)


def nothing() -> Tensor:
    """The loss of a method that has none."""
    return torch.zeros(())
