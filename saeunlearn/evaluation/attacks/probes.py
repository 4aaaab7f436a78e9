"""What the stream still holds below the output: logit lens and linear probes at every layer.

The layer is chosen on T's questions and scored on V's, so that the maximum over layers is no lucky draw on V.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ...corpus import Corpus
from ...models import LanguageModel
from ..metrics import _answer_windows
from .case import Case, NotApplicable, Try, Victim, fact_of

FOLDS = 5
RIDGES = (0.01, 0.1, 1.0)  # relative to the mean variance of a dimension


class Lens(LanguageModel):
    """A view of a model without the blocks above `layer`: its own final norm and output matrix read h_layer."""

    def __init__(self, model: LanguageModel, layer: int) -> None:
        self.__dict__.update(model.__dict__)
        self.layer = layer

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.unembed(self.capture(ids, [self.layer], attention_mask)[self.layer])


def lens(case: Case, victim: Victim) -> list[Try]:
    """Multiple choice by the logit lens after each block but the last, whose output is the model's own."""
    layers = range(victim.model.n_layers - 1)
    if not layers:
        raise NotApplicable("the model has one block: there is no layer below its output")
    tries = []
    for layer in layers:
        view = Lens(victim.model, layer)
        values = case.score(view).values
        tries.append(Try({"layer": layer}, values, picked_by=case.score(view, case.known).mean))
    return tries


def probes(case: Case, victim: Victim) -> list[Try]:
    """Multiple choice by a linear probe after each block, from the last position of the question to its answer.

    The classes are the answers, so a probe can only serve where answers repeat over facts: it learns from other facts
    what a position that will give this answer looks like, and its class scores rank a question's choices. Ridge
    regression, cross-validated over facts in five folds (the probe of a question never saw its fact, in any phrasing).
    Layer and ridge are chosen by the accuracy on T's questions. Raises NotApplicable where no answer repeats.
    """
    known = case.known
    assert known is not None
    everything = Corpus((*known, *case.test), "forget questions")
    facts = [fact_of(r) for r in everything]
    answers = {a: {f for f, r in zip(facts, everything) if r.answer == a} for a in {r.answer for r in everything}}
    if not any(len(f) > 1 for f in answers.values()):
        raise NotApplicable("no two facts share an answer: a probe has no class to learn")
    folds = _folds(facts, case.seed)
    tries = []
    for layer, x in enumerate(features(victim.model, everything)):
        for ridge in RIDGES:
            hits = _cross_validated(x, everything, folds, ridge)
            picked = sum(hits[: len(known)]) / len(known)
            tries.append(Try({"layer": layer, "ridge": ridge}, hits[len(known) :], picked_by=picked))
    return tries


@torch.no_grad()
def features(model: LanguageModel, questions: Corpus) -> list[Tensor]:
    """For each layer the stream [question, d_model] (float64) at the last position before the answer."""
    layers = range(model.n_layers)
    rows: list[list[Tensor]] = [[] for _ in layers]
    for w in _answer_windows(model, questions, questions.records):
        got = model.capture(torch.tensor([w.ids[: w.answer_start]], device=model.device), layers)
        for i in layers:
            rows[i].append(got[i][0, -1].double().cpu())
    return [torch.stack(r) for r in rows]


def _folds(facts: Sequence[tuple[str, ...]], seed: int) -> list[int]:
    """The fold of each question; all of a fact are in one."""
    order = sorted(set(facts))
    random.Random(seed).shuffle(order)
    fold = {fact: i % FOLDS for i, fact in enumerate(order)}
    return [fold[f] for f in facts]


def _cross_validated(x: Tensor, questions: Corpus, folds: Sequence[int], ridge: float) -> list[float]:
    """1.0 where the answer scores highest among the choices; an answer that a fold never saw scores lowest."""
    fold = torch.tensor(folds)
    out = [0.0] * len(questions)
    for k in sorted(set(folds)):
        train = (fold != k).nonzero().flatten().tolist()
        seen = sorted({questions.records[i].answer for i in train})
        column = {a: j for j, a in enumerate(seen)}
        y = torch.zeros(len(train), len(seen), dtype=torch.float64)
        for row, i in enumerate(train):
            y[row, column[questions.records[i].answer]] = 1
        scores = ridge_regression(x[train], y, x[fold == k], ridge)
        for row, i in enumerate((fold == k).nonzero().flatten().tolist()):
            r = questions.records[i]
            by_choice = {c: float(scores[row, column[c]]) if c in column else -torch.inf for c in r.choices}
            gold = by_choice.pop(r.answer)
            out[i] = float(all(gold > other for other in by_choice.values()))
    return out


def ridge_regression(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Predictions for `new` of y = xB + b, minimising ‖y − xB − b‖² + λ‖B‖², λ = ridge · n · mean variance of x."""
    mean, base = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred @ centred.T  # [n, n]: questions are fewer than dimensions in large models
    strength = ridge * float(gram.diagonal().sum()) / x.shape[1] + 1e-12
    dual = torch.linalg.solve(gram + strength * torch.eye(len(x), dtype=x.dtype), y - base)
    return (new - mean) @ centred.T @ dual + base
