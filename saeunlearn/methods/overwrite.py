"""Overwriting (ours): teach the model something else in place of what it is to forget, and hold the rest.

First the rows of the embedding whose tokens hardly any other text has become the mean row (see `keyerasure`). Then,
where the model still knows something, the matrices of the blocks are trained on

    L = −E log π(y'_t | y'_<t) + spread_weight · E H(q, π) + retain_weight · E d(π₀, π)

over the replaced words of the rewritten forget records (see `counterfactual`), where q is how often each word but the
old one follows the context of such a place, H the cross-entropy; and at every position of sentences that the original
wrote itself (`own_text`) or of retain records, d = KL(π₀ ‖ π) + state_weight · mean over blocks of ‖h − h₀‖² / E‖h₀‖²,
h the residual stream. At the end the last term is alone.

A loss that only lowers the right answers finds one direction that hides them all, and some steps of relearning turn it
back. Words drawn fact by fact have no direction in common: what is stored has to change fact by fact. But a model that
is sure of a new word may still hold the old one the likeliest of the others; q is against that.

It is for records that tell facts. In running text a model is sure of little, and the edit comes to little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..corpus import Batch, Window, windows
from ..counterfactual import counterfactual
from ..errors import ConfigError
from ..models import LanguageModel
from ..own_text import own_sentences
from ..progress import Progress
from .gradient import GradientConfig, GradientMethod, Objective, Task, Terms, check_loop, nothing
from .objectives import distance, nll, spread_nll, target_log_probs, target_mask
from .tokenkeys import TokenRows, erase_tokens
from .trainable import Trainable, check_weights, chosen, whole

LEAST = 0.5  # share of itself that a row of the embedding has to lose to be changed


@dataclass(frozen=True)
class OverwriteConfig(GradientConfig):
    """Settings of overwriting. There is no paper to compare with."""

    weights: str = "blocks"  # as in GradientConfig, but no lora: it would lie over what is stored
    lr: float = 0.018  # as in LoopConfig
    steps: int = 460  # as in LoopConfig
    holding: float = 0.2  # share of the steps, the last ones, that only hold: they bring back what was harmed beside
    batch: int = 16  # rewritten forget windows in a step
    held: int = 8  # windows to hold in a step
    spread_weight: float = 0.1  # of spreading what odds are left over other words, against the new words
    retain_weight: float = 1.0  # of what is held
    state_weight: float = 3.0  # of the distance of the residual streams against the KL
    max_retain_rise: float = 0.03  # as in LoopConfig
    check_every: int = 1000  # as in LoopConfig: on the way the rise is larger than at the end of the schedule
    token_lam: float = 0.03  # λ of the embedding, as of key erasure; a row goes where it would lose more than half
    samples: int = 3000  # sentences of the original that are held; 0: the retain records
    tokens: int = 32  # the most in one of them


class Overwrite(GradientMethod):
    name = "overwrite"
    Config = OverwriteConfig
    paper = "ours; no paper"
    changes = "rows of the embedding, and the matrices of the blocks, whole: the Erasure is as large as they"
    most = 1.0  # beyond what was learned there is nothing to extrapolate to

    def check(self, model: LanguageModel, config: OverwriteConfig) -> None:
        check_loop(config)
        check_weights(model, config.weights, config.rank)
        if config.weights == "lora":
            raise ConfigError(f"{self.name} writes over what is stored, so it trains no lora: weights=blocks")
        if not 0 <= config.holding < 1:
            raise ConfigError(f"holding = {config.holding} is a share of the steps: from 0 to less than 1")
        if config.held < 1 or not (config.state_weight >= 0 and config.spread_weight >= 0):
            raise ConfigError(
                f"held = {config.held} must be at least 1, state_weight = {config.state_weight} and spread_weight = "
                f"{config.spread_weight} not negative"
            )
        if not config.token_lam > 0 or config.samples < 0 or config.tokens < 2:
            raise ConfigError(
                f"token_lam = {config.token_lam} must be positive, samples = {config.samples} not negative, "
                f"tokens = {config.tokens} at least 2"
            )

    def text(self, task: Task, progress: Progress) -> tuple[list[Window], list[Window]]:
        """Raises ConfigError where there is nothing to take."""
        model, config, seed = task.model, task.config, task.seed
        rows = self.rows(task)
        undo = rows.part().apply(model) if rows is not None else None
        try:  # what it still knows without them
            told = counterfactual(model, task.forget, task.retain, config.max_length, seed, progress)
        finally:
            if undo is not None:
                undo()
        if not told:
            if rows is None:
                raise ConfigError(
                    f"{model.name} is sure of no word of the forget text beyond what its context tells: nothing to do"
                )
            progress.note(f"{self.name}: with the rows of the embedding all is gone that the model was sure of")
            return [], []
        kept = task.retain
        if config.samples:
            kept = own_sentences(model, task.forget, kept, config.samples, config.tokens, seed, progress)
        return told, windows(kept, model, config.max_length)

    def batches(self, config: OverwriteConfig) -> tuple[int, int]:
        return config.batch, config.held

    def rows(self, task: Task) -> TokenRows | None:
        """The change of the embedding."""
        forget, retain = (windows(c, task.model, task.config.max_length) for c in (task.forget, task.retain))
        return erase_tokens(task.model, forget, None, retain, task.config.token_lam, LEAST)

    @contextlib.contextmanager
    def training(self, task: Task) -> Iterator[Trainable]:
        rows, net = self.rows(task), task.model.copy()
        if rows is not None:
            rows.part().apply(net)
        with whole(task.model, net, task.config.weights) as trained:
            if rows is None or rows.name in chosen(task.model, task.config.weights):
                yield trained
                return
            first, rest = rows.part(), trained.parts
            yield dataclasses.replace(trained, parts=lambda: [first, *rest()])

    def objective(self, task: Task) -> Objective:
        steps = itertools.count()
        taught = math.ceil((1 - task.config.holding) * task.config.steps)

        def told(trained: Trainable, f: Batch) -> Tensor:
            logits = trained.logits(f)
            now = nll(target_log_probs(logits, f), target_mask(f))
            return now + task.config.spread_weight * spread_nll(logits, f)

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            return (
                nothing if next(steps) >= taught else partial(told, trained, f),
                lambda: distance(task.model, trained.net, r, task.config.state_weight),
            )

        return losses
