"""Metrics of a language model on a corpus; every aggregate keeps its per-example values.

Log-probabilities are natural logarithms, taken in float32 whatever the dtype of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..corpus import Corpus, Record, Window, render, windows
from ..errors import CorpusError
from ..losses import over_windows, token_losses
from ..models import LanguageModel
from ..progress import Progress


@dataclass(frozen=True)
class Values:
    """A metric with its per-example values.

    `values` holds one number per scored record; `records` the index of each in the corpus; `tokens` how
    many tokens each was scored on.
    """

    name: str
    values: list[float]
    records: list[int]
    tokens: list[int]

    @property
    def n(self) -> int:
        """Number of scored records."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over records, each counting once."""
        return sum(self.values) / self.n

    @property
    def per_token(self) -> float:
        """Mean over tokens: each record counts by its number of scored tokens."""
        return sum(v * t for v, t in zip(self.values, self.tokens)) / sum(self.tokens)


def answer_logprobs(model: LanguageModel, questions: Corpus, progress: Progress | None = None) -> list[list[float]]:
    """Summed log-probability (nats) of every choice of every record, given its question.

    Question and choice are tokenised together, through the chat template where the model has one. A text
    longer than the context loses the start of its question. Raises CorpusError for a record without choices.
    """
    return [[total for total, _ in row] for row in _choice_scores(model, questions, progress)]


def multiple_choice(model: LanguageModel, questions: Corpus, progress: Progress | None = None) -> Values:
    """1.0 where the gold answer has the highest log-probability PER TOKEN of its choices, else 0.0.

    The mean over a choice's tokens, because a sum favours short choices. A tie with another choice counts
    as wrong. Raises CorpusError for a record without choices, or whose answer is not one of them.
    """
    for i, record in enumerate(questions):
        if record.answer not in record.choices:
            raise CorpusError(f"{questions.name}, record {i + 1}: the answer is not among the choices")
    values, tokens = [], []
    for record, row in zip(questions, _choice_scores(model, questions, progress)):
        means = {choice: total / n for choice, (total, n) in zip(record.choices, row)}
        gold = means.pop(record.answer)
        values.append(float(all(gold > other for other in means.values())))
        tokens.append(sum(n for _, n in row))
    return Values("multiple_choice", values, list(range(len(values))), tokens)


def cloze(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> Values:
    """1.0 where greedy decoding gives every token of the answer (teacher forcing), else 0.0.

    Raises CorpusError for a record without question and answer.
    """

    hits = answer_hits(model, pairs, progress)
    return Values("cloze", [float(h.all()) for h in hits], list(range(len(hits))), [len(h) for h in hits])


def answer_hits(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> list[Tensor]:
    """For each record, 1.0 at every answer token that greedy decoding gives after the true prefix, else 0.0.

    Raises CorpusError for a record without question and answer.
    """

    def score(logits: Tensor, ids: Tensor) -> Tensor:
        return (logits.argmax(-1) == ids).float()

    items = _answer_windows(model, pairs, pairs.records)
    rows = over_windows(model, items, score, progress or Progress(), "greedy answers")
    return [row[w.answer_start - 1 :] for w, row in zip(items, rows)]


def answer_losses(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> list[Tensor]:
    """Loss (nats) of every answer token of each record, given the question and the answer so far.

    Raises CorpusError for a record without question and answer.
    """
    items = _answer_windows(model, pairs, pairs.records)
    return [row[w.answer_start - 1 :] for w, row in zip(items, token_losses(model, items, progress))]


def probability(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> Values:
    """P(answer | question)^(1 / tokens of the answer), between 0 and 1 (TOFU, arXiv 2401.06121).

    Raises CorpusError for a record without question and answer.
    """
    losses = answer_losses(model, pairs, progress)
    values = [math.exp(-float(row.mean(dtype=torch.float64))) for row in losses]
    return Values("probability", values, list(range(len(values))), [len(row) for row in losses])


def nll(
    model: LanguageModel, corpus: Corpus, max_length: int | None = None, progress: Progress | None = None
) -> Values:
    """Mean negative log-likelihood (nats per target token) of each record; `per_token` is the corpus's.

    Targets are all tokens but the first of a text, and the answer's of a question/answer pair. Texts longer
    than `max_length` (default: the context) are scored window by window. Records with nothing to predict are
    left out (`records` names the others). Raises CorpusError when none is left.
    """
    items = windows(corpus, model, max_length)
    sums, tokens = [0.0] * len(corpus), [0] * len(corpus)
    for w, losses in zip(items, token_losses(model, items, progress)):
        target = losses[w.answer_start - 1 :]
        sums[w.record] += float(target.sum(dtype=torch.float64))
        tokens[w.record] += len(target)
    kept = [i for i, n in enumerate(tokens) if n]
    if not kept:
        raise CorpusError(f"{corpus.name}: no record has a token to predict")
    return Values("nll", [sums[i] / tokens[i] for i in kept], kept, [tokens[i] for i in kept])


def samples(model: LanguageModel, prompts: Sequence[str], max_new_tokens: int = 40) -> list[str]:
    """Greedy continuations of `prompts`, without the prompts."""
    out: list[str] = []
    for at in range(0, len(prompts), 16):
        out += model.generate(prompts[at : at + 16], max_new_tokens)
    return out


# --- shared ------------------------------------------------------------------------------------------------


def _choice_scores(model: LanguageModel, questions: Corpus, progress: Progress | None) -> list[list[tuple[float, int]]]:
    """For each record and choice: (summed log-probability, number of the choice's tokens)."""
    records = []
    for i, r in enumerate(questions):
        if not r.choices:
            raise CorpusError(f"{questions.name}, record {i + 1}: a multiple-choice question needs choices")
        records += [dataclasses.replace(r, answer=c) for c in r.choices]
    losses = answer_losses(model, Corpus(tuple(records), questions.name), progress)
    rest = iter([(-float(answer.sum(dtype=torch.float64)), len(answer)) for answer in losses])
    return [[next(rest) for _ in r.choices] for r in questions]


def _answer_windows(model: LanguageModel, corpus: Corpus, records: Sequence[Record]) -> list[Window]:
    """One window per question/answer record: the END of the text, so that the answer is always inside."""
    for i, r in enumerate(records):
        if not r.question or not r.answer:
            raise CorpusError(f"{corpus.name}, record {i + 1}: a question and an answer are needed")
    bos = [] if model.bos_id is None else [model.bos_id]
    texts = [render(r, model.tokenizer) for r in records]
    tokenised = model.tokenizer([t for t, _ in texts], add_special_tokens=False, return_offsets_mapping=True)
    room = model.max_length - len(bos)
    out = []
    for i, ((_, start_char), ids, offsets) in enumerate(zip(texts, tokenised.input_ids, tokenised.offset_mapping)):
        first = sum(1 for _, end in offsets if end <= start_char) - max(0, len(ids) - room)
        out.append(Window(tuple(bos + ids[-room:]), max(1, first + len(bos)), i))
    return out
