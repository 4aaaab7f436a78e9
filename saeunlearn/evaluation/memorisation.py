"""How much of an answer a model can still say: along the true answer, and in what it generates itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..corpus import Corpus, Record, render
from ..errors import ConfigError, CorpusError
from ..models import LanguageModel
from ..progress import Progress
from .metrics import Values, answer_hits, nll, probability

MAX_NEW_TOKENS = 200  # of a generation, as in TOFU and OpenUnlearning; at most half of the context
N_GRAM = 4  # of `repetition`: seq-rep-4
_BATCH = 16


def exact_memorisation(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> Values:
    """Share of the answer's tokens that greedy decoding gives after the true prefix (arXiv 2205.10770).

    Raises CorpusError for a record without question and answer.
    """
    hits = answer_hits(model, pairs, progress)
    return _values("exact_memorisation", [float(h.mean()) for h in hits], [len(h) for h in hits])


def extraction_strength(model: LanguageModel, pairs: Corpus, progress: Progress | None = None) -> Values:
    """1 − k*/|y|, where k* tokens are the shortest prefix of the answer after which greedy decoding gives all the rest.

    (As a metric of unlearning: arXiv 2406.09179.) 1: the question alone is enough; 0: not even the last token comes.
    OpenUnlearning's code gives 1/|y| instead of 0 in that last case.
    Raises CorpusError for a record without question and answer.
    """
    hits = answer_hits(model, pairs, progress)
    rest = [int(h.flip(0).cumprod(0).sum()) for h in hits]
    return _values("extraction_strength", [n / len(h) for n, h in zip(rest, hits)], [len(h) for h in hits])


def generations(
    model: LanguageModel, pairs: Corpus, max_new_tokens: int | None = None, progress: Progress | None = None
) -> list[str]:
    """The greedy continuation of every question, through the chat template where the model has one.

    `max_new_tokens`: see `new_tokens`. Raises CorpusError for a record without a question.
    """
    for i, r in enumerate(pairs):
        if not r.question:
            raise CorpusError(f"{pairs.name}, record {i + 1}: a question is needed to generate an answer to")
    prompts = []
    for r in pairs:
        text, answer_start = render(r, model.tokenizer)
        prompts.append(text[:answer_start])
    tokens = new_tokens(model, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding in a batch
    out = [""] * len(prompts)
    progress = progress or Progress()
    progress.start("generating answers", len(prompts))
    for at in range(0, len(order), _BATCH):
        part = order[at : at + _BATCH]
        for i, text in zip(part, model.generate([prompts[i] for i in part], tokens)):
            out[i] = text
        progress.step(len(part))
    progress.finish()
    return out


def new_tokens(model: LanguageModel, asked: int | None = None) -> int:
    """Tokens that `generations` makes at most: as asked, else 200, or half of the context where that is less."""
    return asked or min(MAX_NEW_TOKENS, model.max_length // 2)


def rouge_l(pairs: Corpus, generated: Sequence[str]) -> tuple[Values, Values]:
    """ROUGE-L (recall, F1) of generated texts against the answers; words are stemmed (rouge_score, as in TOFU).

    `tokens` counts the words of the answer. Raises CorpusError where the two differ in number.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _same_number(pairs, generated)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(r.answer, text)["rougeL"] for r, text in zip(pairs, generated)]
    words = [len(r.answer.split()) for r in pairs]
    return _values("rouge_l_recall", [s.recall for s in scores], words), _values(
        "rouge_l_f1", [s.fmeasure for s in scores], words
    )


def repetition(model: LanguageModel, generated: Sequence[str], n: int = N_GRAM) -> Values:
    """1 − distinct n-grams / n-grams, over the tokens of each text (seq-rep-n of arXiv 1908.04319, n = 4 there).

    0 where a text is shorter than n tokens. `tokens` counts the n-grams.
    """
    values, counts = [], []
    for ids in model.tokenizer(list(generated), add_special_tokens=False).input_ids if generated else ():
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        values.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        counts.append(len(grams))
    return _values("repetition", values, counts)


def perplexity(
    reference: LanguageModel, pairs: Corpus, generated: Sequence[str], progress: Progress | None = None
) -> Values:
    """Perplexity of each generated text, after its question, under a reference model (the original, say).

    Empty generations are left out (`records` names the others); all may be. The values have a heavy tail: quote their
    median. Raises CorpusError where the two differ in number.
    """
    _same_number(pairs, generated)
    kept = [i for i, text in enumerate(generated) if text.strip()]
    if not kept:
        return Values("perplexity", [], [], [])
    said = tuple(Record(question=pairs.records[i].question, answer=generated[i]) for i in kept)
    scored = nll(reference, Corpus(said, f"{pairs.name} (generated)"), progress=progress)
    return Values("perplexity", [math.exp(v) for v in scored.values], [kept[i] for i in scored.records], scored.tokens)


TEACHER_FORCED: dict[str, Callable[..., Values]] = {
    f.__name__: f for f in (probability, exact_memorisation, extraction_strength)
}
GENERATED = ("rouge_l_recall", "rouge_l_f1", "repetition")
NAMES = (*TEACHER_FORCED, *GENERATED)


def memorisation(
    model: LanguageModel,
    pairs: Corpus,
    names: Sequence[str] = NAMES,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Values]:
    """The metrics of these names, in this order; answers are generated once for those that need them.

    Raises ConfigError for an unknown name, CorpusError for a record without question and answer.
    """
    if unknown := sorted(set(names) - set(NAMES)):
        raise ConfigError(f"unknown metrics {unknown}; known: {', '.join(NAMES)}")
    found = {n: TEACHER_FORCED[n](model, pairs, progress=progress) for n in names if n in TEACHER_FORCED}
    if set(names) & set(GENERATED):
        said = generations(model, pairs, max_new_tokens, progress)
        found |= {v.name: v for v in (*rouge_l(pairs, said), repetition(model, said))}
    return [found[n] for n in names]


def _values(name: str, values: list[float], tokens: list[int]) -> Values:
    return Values(name, values, list(range(len(values))), tokens)


def _same_number(pairs: Corpus, generated: Sequence[str]) -> None:
    if len(pairs) != len(generated):
        raise CorpusError(f"{len(generated)} generated texts for the {len(pairs)} records of {pairs.name}")
