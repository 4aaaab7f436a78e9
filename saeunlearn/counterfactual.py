"""Counterfactual forget text: what a forget set tells, told differently, to be written over what a model knows.

A word is knowledge where the model is sure of it, p > 1/2, and holds it more likely by GAP nats than its context in
the corpora does. That context is the longest of these that occurs at least SEEN times elsewhere in forget or retain
text: the k words before it, k ≤ REACH, whole or with one of them left out, which may be the name that the fact is
about. Its word is then drawn anew, by their frequencies, from the other words that follow this context. The same word
beside the same left-out word becomes the same again: a fact that several records tell stays one fact. What follows a
replaced word is read as it was.

A word is a run of letters, digits and underscores; other signs are read, each as a word, but stay. Of question/answer
pairs only the answer is rewritten.

Where sentences of one kind recur the new words make sense. In running text contexts are short, and so is the sense.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .corpus import Corpus, Window, render, windows
from .losses import token_losses
from .models import LanguageModel
from .progress import Progress

GAP = 1.0  # nats
SURE = 0.5
SEEN = 5
REACH = 6
MOST_RECORDS = 50_000  # of the retain set that contexts are looked up in
AT_ONCE = 20_000  # places whose contexts are in memory

_WORD = re.compile(r"\w+|[^\w\s]")
_START = "\n"  # stands before the first word of a text, and is none itself
# (distances to the words of a context, that of the word left out or 0), longest contexts first.
_CONTEXTS = sorted(
    {
        (tuple(i for i in range(1, k + 1) if i != out), 0 if out == k else out)
        for k in range(1, REACH + 1) for out in range(k) if k > 1 or not out
    },
    key=lambda c: (-len(c[0]), c),
)  # fmt: skip
_Key = tuple[int, tuple[str, ...]]  # (which of _CONTEXTS, its words)


@dataclass(frozen=True)
class Place:
    """A word of a record that the model is sure of. `start`, `end`: characters; `log_p`: nats; `contexts`: the longest
    first, each with the word that it leaves out, or ""."""

    record: int
    word: str
    start: int
    end: int
    log_p: float
    contexts: list[tuple[_Key, str]]


def counterfactual(
    model: LanguageModel, forget: Corpus, retain: Corpus, max_length: int, seed: int, progress: Progress
) -> list[Window]:
    """Windows of the rewritten forget records; of their tokens those of replaced words are `chosen`.

    Windows without a replaced word are left out: all of them where the model is sure of nothing that its context does
    not tell.
    """
    texts = [render(r, model.tokenizer) for r in forget]
    places = list(_sure(model, windows(forget, model, max_length), texts, progress))
    more = [render(r, model.tokenizer)[0] for r in retain.sample(MOST_RECORDS, seed)]
    corpus = [*(t for t, _ in texts), *more]
    replaced: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for at in range(0, len(places), AT_ONCE):
        some = places[at : at + AT_ONCE]
        followed = _followers({key for p in some for key, _ in p.contexts}, corpus, progress)
        for p in some:
            key, subject = next(((k, s) for k, s in p.contexts if followed[k].total() > SEEN), (None, ""))
            if key is None:
                continue
            around = followed[key]
            if p.log_p - math.log(max(around[p.word] - 1, 1e-9) / (around.total() - 1)) <= GAP:
                continue  # counts leave out the place itself
            if others := {w: n for w, n in around.items() if w != p.word and w[0].isalnum()}:
                replaced[p.record].append((p.start, p.end, draw(f"{seed}/{p.word}/{subject}", others)))
    return _marked(model, [_rewrite(texts[i][0], found) for i, found in sorted(replaced.items())], max_length)


def _sure(
    model: LanguageModel, items: Sequence[Window], texts: Sequence[tuple[str, int]], progress: Progress
) -> Iterator[Place]:
    """The words with p > SURE of the texts [(text, character where what may change begins)] behind the windows."""
    scored: dict[int, list[float]] = defaultdict(list)  # log p of each token
    for w, losses in zip(items, token_losses(model, items, progress)):
        if model.bos_id is None:  # the first token of a window is not scored
            scored[w.record].append(-math.inf)
        scored[w.record] += (-losses).tolist()
    for record, ((text, begin), offsets) in enumerate(zip(texts, _offsets(model, [t for t, _ in texts]))):
        tokens, ends = scored[record], [end for _, end in offsets]
        before = [_START] * REACH
        for m in _WORD.finditer(text):
            own = []
            for t in range(bisect_right(ends, m.start()), len(tokens)):
                if offsets[t][0] >= m.end():
                    break
                own.append(tokens[t])
            log_p = sum(own)
            spelled = m.group()[0].isalnum()
            if spelled and own and m.start() >= begin and log_p > math.log(SURE):
                yield Place(record, m.group(), m.start(), m.end(), log_p, _contexts(before[-REACH:]))
            before.append(m.group())


def _contexts(before: Sequence[str]) -> list[tuple[_Key, str]]:
    """The contexts made of the words before a place, nearest last, and what each leaves out."""
    return [((n, tuple(before[-i] for i in c)), before[-out] if out else "") for n, (c, out) in enumerate(_CONTEXTS)]


def _followers(wanted: set[_Key], texts: Sequence[str], progress: Progress) -> dict[_Key, Counter[str]]:
    """How often each word follows each of the wanted contexts."""
    found: dict[_Key, Counter[str]] = {key: Counter() for key in wanted}
    for text in progress.over(texts, "contexts of words"):
        before = [_START] * REACH
        for m in _WORD.finditer(text):
            for key, _ in _contexts(before[-REACH:]):
                if key in found:
                    found[key][m.group()] += 1
            before.append(m.group())
    return found


def draw(key: str, weights: Mapping[str, int]) -> str:
    """One of the words, with odds in proportion to their weights, the same for the same key.

    Also where some of the words are missing, if it is not the drawn one (weighted rendezvous hashing).
    """

    def height(word: str) -> float:
        digest = hashlib.sha256(f"{key}/{word}".encode()).digest()
        return -math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64) / weights[word]

    return min(weights, key=height)


def _rewrite(text: str, replaced: Sequence[tuple[int, int, str]]) -> tuple[str, list[tuple[int, int]]]:
    """(the text with these (start, end, new word), where the new words are in it)."""
    out, at, spans = "", 0, []
    for start, end, new in replaced:
        out += text[at:start]
        spans.append((len(out), len(out) + len(new)))
        out += new
        at = end
    return out + text[at:], spans


def _marked(model: LanguageModel, rewritten: Sequence[tuple[str, list[tuple[int, int]]]], max_length: int
            ) -> list[Window]:  # fmt: skip
    if not rewritten:
        return []
    texts = [t for t, _ in rewritten]
    flags = [[any(b > s and a < e for s, e in spans) for a, b in offsets]
             for (_, spans), offsets in zip(rewritten, _offsets(model, texts))]  # fmt: skip
    bos = [] if model.bos_id is None else [False]
    at = Counter[int]()
    out = []
    for w in windows(Corpus.of(texts, "counterfactual text"), model, max_length):
        n = len(w.ids) - len(bos)
        chosen = (*bos, *flags[w.record][at[w.record] : at[w.record] + n])
        at[w.record] += n
        if any(chosen[1:]):
            out.append(dataclasses.replace(w, chosen=chosen))
    return out


def _offsets(model: LanguageModel, texts: Sequence[str]) -> Any:
    return model.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True).offset_mapping
