"""The diversified retain set (Ko et al., NeurIPS 2024, arXiv 2412.07808): forget records without their concept.

A retain set far from the forget set leaves the choice of what else an edit damages to chance. Records of the same
template that speak of something else, or of nothing in particular, hold what the forget set shares with the rest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from .corpus import Corpus, Record
from .errors import ConfigError, CorpusError


def diversify(forget: Corpus, concepts: Sequence[str], others: Sequence[str], seed: int, copies: int = 1) -> Corpus:
    """Retain records matched to forget records: each mention of a concept swapped for one of `others`, or removed.

    `concepts` are found as whole words, whatever their case; within a record the same concept always becomes the same
    other. Without `others` the mentions are removed. `copies`: records to make of each forget record, with different
    others. Records that mention no concept are left out, and so is what would equal a forget record. Raises ConfigError
    without concepts or for one that is among the others, CorpusError where nothing is left.
    """
    concepts, others = ([w for w in words if w.strip()] for words in (concepts, others))
    if not concepts:
        raise ConfigError("name at least one concept that the forget records are about")
    if both := {c.casefold() for c in concepts} & {o.casefold() for o in others}:
        raise ConfigError(f"{', '.join(sorted(both))}: a concept to forget cannot also take a concept's place")
    longest_first = sorted(concepts, key=len, reverse=True)
    mention = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    rng = random.Random(seed)
    seen = {r.id for r in forget}
    made: list[Record] = []
    for record in forget:
        fields = (record.text, record.question, record.answer, *record.choices)
        found = sorted({m.casefold() for text in fields for m in mention.findall(text)})
        for _ in range(copies if found else 0):
            swap = dict(zip(found, rng.sample(others, len(found)))) if len(others) >= len(found) else {}
            if others and not swap:
                swap = {c: rng.choice(others) for c in found}
            new = replace(
                record, text=_without(record.text, mention, swap), question=_without(record.question, mention, swap),
                answer=_without(record.answer, mention, swap),
                choices=tuple(_without(c, mention, swap) for c in record.choices), meta=_retained(record),
            )  # fmt: skip
            complete = new.text.strip() if record.text else new.question.strip() and new.answer.strip()
            if complete and new.id not in seen:
                seen.add(new.id)
                made.append(new)
    if not made:
        raise CorpusError(
            f"no record of {forget.name} is left with {', '.join(concepts)} replaced: look at the spelling"
        )
    return Corpus(tuple(made), f"{forget.name}-diversified")


def _without(text: str, mention: re.Pattern[str], swap: dict[str, str]) -> str:
    """The text with every mention swapped, or removed together with the space before it."""
    if swap:
        return mention.sub(lambda m: _in_case_of(m.group(), swap[m.group().casefold()]), text)
    bare = re.sub(rf"\s*{mention.pattern}", "", text, flags=re.IGNORECASE).strip()
    return bare[:1].upper() + bare[1:] if text[:1].isupper() else bare


def _in_case_of(old: str, new: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _retained(record: Record) -> dict[str, object]:
    """The record's labels, except that it no longer belongs to the forget set."""
    return {**record.meta, **({"set": "near"} if "set" in record.meta else {})}
