"""Counterfactual forget text: what a forget set tells, told differently, to be written over what a model knows.

A word is knowledge where the model is sure of it, p > 1/2, and holds it more likely by GAP nats than its context in
the corpora does. That context is the longest of these that occurs at least SEEN times elsewhere in forget or retain
text: the k words before it, k ≤ REACH, whole or with one of them left out, which may be the name that the fact is
about. Its word is then drawn anew, by their frequencies, from the other words that follow this context. The same word
beside the same left-out word becomes the same again: a fact that several records tell stays one fact. What follows a
replaced word is read as it was; a word that the two words after it tell stays (the "is" before "a kind").

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
USUAL = 50  # the most words of a context that odds are spread over
LEAD = 32  # characters before a word that decide on its tokens
AT_ONCE = 20_000  # places whose contexts are in memory

_WORD = re.compile(r"\w+|[^\w\s]")
_EDGE = "\n"  # stands before the first and after the last word of a text, and is none itself
# (distances to the words of a context, that of the word left out or 0), longest contexts first.
_CONTEXTS = sorted(
    {
        (tuple(i for i in range(1, k + 1) if i != out), 0 if out == k else out)
        for k in range(1, REACH + 1) for out in range(k) if k > 1 or not out
    },
    key=lambda c: (-len(c[0]), c),
)  # fmt: skip
_Key = tuple[int, tuple[str, ...]]  # (which of _CONTEXTS, its words), or (-1, the two words that follow)


@dataclass(frozen=True)
class Place:
    """A word of a record that the model is sure of. `start`, `end`: characters; `log_p`: nats; `contexts`: the longest
    first, each with the word that it leaves out, or ""; `after`: the context of the words that follow."""

    record: int
    word: str
    start: int
    end: int
    log_p: float
    contexts: list[tuple[_Key, str]]
    after: _Key


@dataclass(frozen=True)
class Change:
    """A word, characters `start` to `end`, that becomes `new`; `usual`: how often which others stand there."""

    start: int
    end: int
    new: str
    usual: list[tuple[str, int]]


def counterfactual(
    model: LanguageModel, forget: Corpus, retain: Corpus, max_length: int, seed: int, progress: Progress
) -> list[Window]:
    """Windows of the rewritten forget records; of their tokens those of replaced words are `chosen`, and at the first
    of each word `spread` is how often which other words follow the context of the old one.

    Windows without a replaced word are left out: all of them where the model is sure of nothing that its context does
    not tell.
    """
    texts = [render(r, model.tokenizer) for r in forget]
    places = list(_sure(model, windows(forget, model, max_length), texts, progress))
    more = [render(r, model.tokenizer)[0] for r in retain.sample(MOST_RECORDS, seed)]
    corpus = [*(t for t, _ in texts), *more]
    replaced: dict[int, list[Change]] = defaultdict(list)
    for at in range(0, len(places), AT_ONCE):
        some = places[at : at + AT_ONCE]
        keys = {key for p in some for key, _ in p.contexts} | {p.after for p in some}
        found = _words_in(keys, corpus, progress)
        for p in some:
            key, subject = next(((k, s) for k, s in p.contexts if found[k].total() > SEEN), (None, ""))
            if key is None or _told(p, found[key]) or _told(p, found[p.after]):
                continue
            around = found[key]
            if others := {w: n for w, n in around.items() if w != p.word and w[0].isalnum()}:
                new = draw(f"{seed}/{p.word}/{subject}", others)
                replaced[p.record].append(Change(p.start, p.end, new, Counter(others).most_common(USUAL)))
    order = sorted(replaced)
    return _marked(model, [texts[i][0] for i in order], [replaced[i] for i in order], max_length)


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
        words = list(_WORD.finditer(text))
        around = _padded(words)
        for n, m in enumerate(words):
            own = []
            for t in range(bisect_right(ends, m.start()), len(tokens)):
                if offsets[t][0] >= m.end():
                    break
                own.append(tokens[t])
            log_p = sum(own)
            spelled = m.group()[0].isalnum()
            if spelled and own and m.start() >= begin and log_p > math.log(SURE):
                yield Place(record, m.group(), m.start(), m.end(), log_p, _before(around, n), _after(around, n))


def _padded(words: Sequence[re.Match[str]]) -> list[str]:
    """Word n of a text at n + REACH."""
    return [_EDGE] * REACH + [m.group() for m in words] + [_EDGE] * 2


def _before(around: Sequence[str], n: int) -> list[tuple[_Key, str]]:
    """The contexts made of the words before word n, and what each leaves out."""
    at = n + REACH
    return [((k, tuple(around[at - i] for i in c)), around[at - out] if out else "")
            for k, (c, out) in enumerate(_CONTEXTS)]  # fmt: skip


def _after(around: Sequence[str], n: int) -> _Key:
    return -1, tuple(around[n + REACH + 1 : n + REACH + 3])


def _words_in(wanted: set[_Key], texts: Sequence[str], progress: Progress) -> dict[_Key, Counter[str]]:
    """How often each word stands in each of the wanted contexts."""
    found: dict[_Key, Counter[str]] = {key: Counter() for key in wanted}
    for text in progress.over(texts, "contexts of words"):
        words = list(_WORD.finditer(text))
        around = _padded(words)
        for n, m in enumerate(words):
            for key in (*(key for key, _ in _before(around, n)), _after(around, n)):
                if key in found:
                    found[key][m.group()] += 1
    return found


def _told(place: Place, around: Counter[str]) -> bool:
    """Does the context in which these words stand tell the word of the place?"""
    n = around.total() - 1  # without the place itself
    return n >= SEEN and place.log_p - math.log(max(around[place.word] - 1, 1e-9) / n) <= GAP


def draw(key: str, weights: Mapping[str, int]) -> str:
    """One of the words, with odds in proportion to their weights, the same for the same key.

    Also where some of the words are missing, if it is not the drawn one (weighted rendezvous hashing).
    """

    def height(word: str) -> float:
        digest = hashlib.sha256(f"{key}/{word}".encode()).digest()
        return -math.log((int.from_bytes(digest[:8], "big") + 1) / 2**64) / weights[word]

    return min(weights, key=height)


def _rewrite(text: str, changes: Sequence[Change]) -> tuple[str, list[tuple[int, int]]]:
    """(the text with these changes, where the new words are in it)."""
    out, at, spans = "", 0, []
    for c in changes:
        out += text[at : c.start]
        spans.append((len(out), len(out) + len(c.new)))
        out += c.new
        at = c.end
    return out + text[at:], spans


def _marked(model: LanguageModel, texts: Sequence[str], changes: Sequence[Sequence[Change]], max_length: int
            ) -> list[Window]:  # fmt: skip
    """Windows of the texts with these changes."""
    if not texts:
        return []
    rewritten = [_rewrite(t, c) for t, c in zip(texts, changes)]
    usual = _usual_tokens(model, rewritten, changes)
    flags, firsts = [], []
    for (_, spans), offsets in zip(rewritten, _offsets(model, [t for t, _ in rewritten])):
        ends = [end for _, end in offsets]
        flags.append([any(b > s and a < e for s, e in spans) for a, b in offsets])
        firsts.append([bisect_right(ends, s) for s, _ in spans])
    bos = [] if model.bos_id is None else [False]
    at = Counter[int]()
    out = []
    for w in windows(Corpus.of([t for t, _ in rewritten], "counterfactual text"), model, max_length):
        i, begin, n = w.record, at[w.record], len(w.ids) - len(bos)
        at[i] += n
        chosen = (*bos, *flags[i][begin : begin + n])
        if any(chosen[1:]):
            places = [(t - begin + len(bos), shares) for t, shares in zip(firsts[i], usual[i])]
            spread = tuple((t, *x) for t, shares in places if 0 < t < len(w.ids) for x in shares.items())
            out.append(dataclasses.replace(w, chosen=chosen, spread=spread))
    return out


def _usual_tokens(
    model: LanguageModel, rewritten: Sequence[tuple[str, list[tuple[int, int]]]], changes: Sequence[Sequence[Change]]
) -> list[list[dict[int, float]]]:
    """Of each change {token: share} with which its usual words begin where they stand."""
    # A word's tokens depend on what is before it: the word before and what is between.
    leads = [[text[max(text.rfind(" ", 0, max(0, s - 1)) + 1, s - LEAD) : s] for s, _ in spans]
             for text, spans in rewritten]  # fmt: skip
    keys = sorted({(lead, w) for row, cs in zip(leads, changes) for lead, c in zip(row, cs) for w, _ in c.usual})
    found = model.tokenizer([a + w for a, w in keys], add_special_tokens=False, return_offsets_mapping=True)
    first = {(a, w): ids[bisect_right([end for _, end in offsets], len(a))]
             for (a, w), ids, offsets in zip(keys, found.input_ids, found.offset_mapping)}  # fmt: skip

    def shares(lead: str, usual: Sequence[tuple[str, int]]) -> dict[int, float]:
        total = sum(n for _, n in usual)
        out: dict[int, float] = defaultdict(float)
        for w, n in usual:
            out[first[lead, w]] += n / total
        return dict(out)

    return [[shares(lead, c.usual) for lead, c in zip(row, cs)] for row, cs in zip(leads, changes)]


def _offsets(model: LanguageModel, texts: Sequence[str]) -> Any:
    return model.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True).offset_mapping
