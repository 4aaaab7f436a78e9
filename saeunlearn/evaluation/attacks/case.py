"""What every attack is given: the facts it may use (T), those it is tested on (V), the models, the budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ...corpus import Corpus, Record
from ...erasure import Erasure
from ...errors import ConfigError, ModelError
from ...models import LanguageModel
from ...progress import Progress
from ..evaluate import group_of, is_forget
from ..metrics import Values, multiple_choice, nll

SHARE_OF_T = 0.25  # of the forget facts that an attacker knows


@dataclass(frozen=True)
class Budget:
    """How hard an attacker tries."""

    test: int  # records of V that are scored
    lora_rates: tuple[float, ...]  # learning rates (paper: 2e-4, for models of 7 billion parameters)
    full_rates: tuple[float, ...]
    samples: tuple[int, ...]  # training records; the smaller of it and what there is
    steps: int  # of each fine-tuning
    marks: tuple[int, ...]  # steps after which V is scored
    shots: tuple[int, ...]  # examples in front of a question
    batch: int = 16
    windows: int = 128  # of T, for the directions of the ablation
    each_layer: bool = False  # ablate at single layers too


BUDGETS = {
    "quick": Budget(test=160, lora_rates=(2e-4, 1e-3, 5e-3), full_rates=(5e-5, 3e-4, 2e-3), samples=(256,), steps=48,
                    marks=(6, 12, 24, 48), shots=(1, 5)),
    "full": Budget(test=1000, lora_rates=(5e-5, 2e-4, 1e-3, 5e-3, 1e-2), full_rates=(1e-5, 5e-5, 3e-4, 1e-3, 3e-3),
                   samples=(10, 100, 1000), steps=200, marks=(5, 10, 20, 50, 100, 200), shots=(1, 3, 5, 10),
                   windows=512, each_layer=True),
}  # fmt: skip


class NotApplicable(Exception):
    """An attack has nothing to act on here; the message says why."""


@dataclass(frozen=True)
class Victim:
    """A model to attack: `base`, which stays as it is, with `erasure` applied to a copy of it."""

    base: LanguageModel
    erasure: Erasure | None = None

    def fresh(self) -> LanguageModel:
        """A new copy that may be changed at will; hooks of the Erasure are attached to it."""
        twin = self.base.copy()
        if self.erasure is not None:
            self.erasure.apply(twin)
        return twin

    @cached_property
    def model(self) -> LanguageModel:
        """One copy for attacks that change no weight and leave no hook behind."""
        return self.fresh()


@dataclass(frozen=True)
class Try:
    """One setting of an attack: `values` holds the score of each record of V.

    `picked_by`: the score on T by which the best try is chosen (None: by V itself). `curve`: [{"step", metric}].
    """

    settings: dict[str, Any]
    values: list[float]
    curve: list[dict[str, float]] = field(default_factory=list)
    picked_by: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`train`: T as text to learn from; `known`: T's questions; `test`: V. No fact of T is in V, in any phrasing.

    Without questions `known` is None and the metric is the loss on forget text that was held out.
    """

    train: Corpus
    known: Corpus | None
    test: Corpus
    unrelated: Corpus
    retain_questions: Corpus | None
    original: LanguageModel
    budget: Budget
    seed: int
    progress: Progress

    @property
    def metric(self) -> Literal["accuracy", "nll"]:
        return "nll" if self.known is None else "accuracy"

    @property
    def sign(self) -> float:
        """+1 where a high value is a gain for the attacker, −1 where a low one is."""
        return -1.0 if self.metric == "nll" else 1.0

    def score(self, model: LanguageModel, records: Corpus | None = None) -> Values:
        """The metric of a model on V, or on other records of the same kind."""
        records = records or self.test
        return nll(model, records) if self.metric == "nll" else multiple_choice(model, records)

    def mean(self, values: Sequence[float]) -> float:
        """Over V: of a share by records, of a loss by tokens."""
        weights = self.weights
        return sum(v * w for v, w in zip(values, weights)) / sum(weights)

    @cached_property
    def weights(self) -> list[float]:
        """Of each record of V in a mean: 1 for a question, for a text its number of tokens."""
        if self.metric == "accuracy":
            return [1.0] * len(self.test)
        return [float(n) for n in nll(self.original, self.test).tokens]

    @property
    def chance(self) -> list[float] | None:
        """Of each question of V; None for texts."""
        return [1 / len(r.choices) for r in self.test] if self.metric == "accuracy" else None


def fact_of(record: Record) -> tuple[str, ...]:
    """What a record is about: its fields `entity` and `attribute`, or `entity` alone; without them itself."""
    entity, attribute = record.meta.get("entity"), record.meta.get("attribute")
    if entity is None:
        return (record.id,)
    return (str(entity),) if attribute is None else (str(entity), str(attribute))


def make_case(
    original: LanguageModel, forget: Corpus, retain: Corpus, questions: Corpus | None, budget: str, seed: int,
    progress: Progress,
) -> Case:  # fmt: skip
    """Split the forget facts into T (a quarter) and V.

    With questions: those of the set `forget` (all, where no question says its set) are split, and T's text is the
    forget records on T's facts, or T's questions with their answers where no record is on one of them. Without: the
    forget records are split. Raises ConfigError where there are fewer than four facts.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"unknown budget {budget!r}; use {' or '.join(BUDGETS)}")
    size = BUDGETS[budget]
    asked, others = _forget_questions(questions)
    facts = sorted({fact_of(r) for r in asked or forget})
    if len(facts) < 4:
        raise ConfigError(f"{len(facts)} forget facts cannot be split into some to attack with and others to test on")
    chosen = set(random.Random(seed).sample(facts, max(1, round(SHARE_OF_T * len(facts)))))
    known = tuple(r for r in asked or forget if fact_of(r) in chosen)
    rest = tuple(r for r in asked or forget if fact_of(r) not in chosen)
    train = tuple(r for r in forget if fact_of(r) in chosen) or known
    far = tuple(r for r in retain if r.meta.get("set") == "far") or retain.records
    return Case(
        train=Corpus(train, "T"),
        known=Corpus(known, "questions of T") if asked else None,
        test=Corpus(rest, "V").sample(size.test, seed),
        unrelated=Corpus(far, "unrelated"),
        retain_questions=Corpus(tuple(others), "retain questions").sample(size.test, seed) if others else None,
        original=original, budget=size, seed=seed, progress=progress,
    )  # fmt: skip


def check_oracle(model: LanguageModel, oracle: LanguageModel) -> None:
    """Raises ModelError unless the oracle has the model's tokens and shape, as one that was retrained has."""
    if oracle.vocabulary != model.vocabulary:
        raise ModelError(
            f"the oracle {oracle.name} has another vocabulary than {model.name}: retrain with the same one"
        )
    if (oracle.n_layers, oracle.d_model) != (model.n_layers, model.d_model):
        raise ModelError(
            f"the oracle {oracle.name} has {oracle.n_layers} blocks of width {oracle.d_model}, but {model.name} has "
            f"{model.n_layers} of width {model.d_model}: it must be that model, trained anew without the forget set"
        )


def _forget_questions(questions: Corpus | None) -> tuple[list[Record], list[Record]]:
    """(multiple-choice questions on what is to be forgotten, those on what is to be kept)."""
    usable = [r for r in questions or () if r.question and r.answer in r.choices]
    if not any("set" in r.meta for r in usable):
        return usable, []
    return [r for r in usable if is_forget(group_of(r))], [r for r in usable if not is_forget(group_of(r))]
