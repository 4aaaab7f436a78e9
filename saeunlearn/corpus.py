"""Forget, retain and question records from files and data sets; windows, masks, batches, fingerprints."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import CorpusError, OverlapError

if TYPE_CHECKING:
    from .models import LanguageModel


@dataclass(frozen=True)
class Record:
    """One text, question/answer pair or multiple-choice question.

    `text` is set for plain texts, `question` and `answer` for pairs; `choices` holds all answers of a
    multiple-choice question, `answer` among them. `meta` keeps the file's other fields (group labels).
    """

    text: str = ""
    question: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def full_text(self) -> str:
        """The text, or question and answer joined by one space."""
        return self.text or f"{self.question.rstrip()} {self.answer.lstrip()}".strip()

    @cached_property
    def id(self) -> str:
        """sha256 of the normalised text: equal for records that differ in case, spacing or Unicode form."""
        plain = unicodedata.normalize("NFKC", self.full_text).casefold()
        return hashlib.sha256(re.sub(r"\s+", " ", plain).strip().encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """An ordered list of records under a name. Raises CorpusError when empty."""

    records: tuple[Record, ...]
    name: str = "corpus"

    def __post_init__(self) -> None:
        if not self.records:
            raise CorpusError(f"{self.name} holds no records")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @classmethod
    def of(cls, texts: Sequence[str], name: str = "corpus") -> Corpus:
        """A corpus of plain texts."""
        return cls(tuple(Record(text=t) for t in texts if t.strip()), name)

    @classmethod
    def load(cls, source: str | Path, *, split: str = "train") -> Corpus:
        """Read a JSONL, JSON, text, CSV or Parquet file, or a Hugging Face data set.

        A data set is a folder or hub id, `id:config`, `id:config@split` (a split that is named there wins).
        `saeunlearn.shapes` lists the fields that are known: those of TOFU, MUSE, WMDP, MMLU, LUME and RWKU,
        and plain ones. Raises CorpusError naming file and record.
        """
        from .shapes import read

        name, records = read(source, split)
        if not records:
            raise CorpusError(f"{source} holds no records")
        return cls(records, name)

    def split(self, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
        """(rest, held-out part of about `fraction`), a seeded random split; both non-empty.

        Raises CorpusError for a corpus of one record.
        """
        if len(self) < 2:
            raise CorpusError(f"{self.name} has one record; at least two are needed to hold some out")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        n = min(max(1, round(fraction * len(self))), len(self) - 1)
        held = set(order[:n])
        rest = tuple(r for i, r in enumerate(self.records) if i not in held)
        held_out = tuple(self.records[i] for i in sorted(held))
        return Corpus(rest, self.name), Corpus(held_out, f"{self.name}-held-out")

    def where(self, **fields: str) -> Corpus:
        """The records whose fields (set, phrasing, topic …) have these values. Raises CorpusError where none has."""
        kept = tuple(r for r in self.records if all(r.meta.get(k) == v for k, v in fields.items()))
        if not kept:
            raise CorpusError(f"{self.name}: no record has {', '.join(f'{k} = {v}' for k, v in fields.items())}")
        return Corpus(kept, self.name)

    def sample(self, n: int, seed: int) -> Corpus:
        """At most `n` records, a seeded random subset in the original order."""
        if len(self) <= n:
            return self
        keep = sorted(random.Random(seed).sample(range(len(self)), n))
        return Corpus(tuple(self.records[i] for i in keep), self.name)

    def fingerprint(self) -> str:
        """sha256 over the records' ids in order: says what was used without saying what it says."""
        return hashlib.sha256("\n".join(r.id for r in self.records).encode()).hexdigest()


def refuse_overlap(forget: Corpus, retain: Corpus) -> None:
    """Raises OverlapError when a record (up to case, spacing and Unicode form) is in both sets."""
    shared = {r.id for r in forget} & {r.id for r in retain}
    if shared:
        where = [i + 1 for i, r in enumerate(retain) if r.id in shared][:5]
        raise OverlapError(
            f"{len(shared)} of {len(forget)} forget records are also in the retain set "
            f"(retain records {where}{' …' if len(shared) > 5 else ''}): remove them from one of the two"
        )


# --- tokens, windows, batches ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Token ids of one record or of a part of it (BOS first where the model has one).

    `answer_start`: index of the first answer token of a question/answer pair, else 1. `chosen`: for each of `ids`,
    whether it may be a target; None: all may. `spread`: (position, token, share), distributions that are to be
    predicted at positions, beside the token that stands there.
    """

    ids: tuple[int, ...]
    answer_start: int
    record: int
    chosen: tuple[bool, ...] | None = None
    spread: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Right-padded windows. All tensors [batch, position].

    `mask` (bool) marks the positions whose activations count: never padding, and never the first
    position: it is BOS, or acts as the attention sink in its place. `targets` (bool) marks the tokens
    that are predicted and scored: those of `mask`, from the answer's start on for pairs, that were chosen.
    `spread`: ((row, position, token) [3, n], share [n]) of the windows' distributions, if they have any.
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    targets: Tensor
    records: tuple[int, ...]
    spread: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = (self.ids, self.attention_mask, self.mask, self.targets)
        ids, attention_mask, mask, targets = (t.to(device) for t in tensors)
        spread = None if self.spread is None else (self.spread[0].to(device), self.spread[1].to(device))
        return Batch(ids, attention_mask, mask, targets, self.records, spread)


def windows(corpus: Corpus, model: LanguageModel, max_length: int | None = None) -> list[Window]:
    """Tokenise a corpus; a text longer than the context is cut into consecutive windows, each with BOS.

    A last window of a single token without BOS is dropped: nothing in it can be scored.
    Raises CorpusError when no record yields a token that can be scored, or for windows below two tokens.
    """
    limit = model.max_length if max_length is None else min(max_length, model.max_length)
    if limit < 2:
        raise CorpusError(f"windows of {limit} tokens leave nothing to predict: use at least 2")
    bos = [] if model.bos_id is None else [model.bos_id]
    texts = [render(r, model.tokenizer) for r in corpus]
    tokenised = model.tokenizer(
        [t for t, _ in texts], add_special_tokens=False, return_offsets_mapping=True
    )  # fast tokenizers only: every tokenizer of transformers 5 is one
    out = []
    for i, ((_, start_char), ids, offsets) in enumerate(zip(texts, tokenised.input_ids, tokenised.offset_mapping)):
        first = sum(1 for _, end in offsets if end <= start_char) if start_char else 0
        step = limit - len(bos)
        for at in range(0, len(ids), step):
            part = tuple(bos + ids[at : at + step])
            if len(part) > 1:
                out.append(Window(part, max(1, first - at + len(bos)), i))
    if not out:
        raise CorpusError(f"{corpus.name}: no record is longer than one token")
    return out


def render(record: Record, tokenizer: Any) -> tuple[str, int]:
    """(text, character at which the answer starts; 0 for plain text), through the chat template if any."""
    if record.text:
        return record.text, 0
    if getattr(tokenizer, "chat_template", None):
        user = [{"role": "user", "content": record.question}]
        prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        if tokenizer.bos_token:
            prompt = prompt.removeprefix(tokenizer.bos_token)
        return prompt + record.answer, len(prompt)
    return record.full_text, len(record.question.strip())


def batches(
    items: Sequence[Window], pad_id: int, *, max_tokens: int = 4096, seed: int | None = None
) -> Iterator[Batch]:
    """Batches of windows of similar length, at most `max_tokens` padded tokens each (one window at least).

    With a seed the order of the batches is shuffled and equal lengths are mixed; without, it is fixed.
    """
    order = list(range(len(items)))
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(order)
    order.sort(key=lambda i: len(items[i].ids))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(items[i].ids) > max_tokens:
            groups.append([])
        groups[-1].append(i)
    if seed is not None:
        rng.shuffle(groups)
    for g in groups:
        yield collate([items[i] for i in g], pad_id)


def endless(items: Sequence[Window], pad_id: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Seeded batches of `batch_size` windows for training, epoch after epoch, for ever.

    Windows of similar length share a batch (drawn from eight batches at a time), so little is padding. Every
    window comes once an epoch.
    """
    rng = random.Random(seed)
    queue: list[int] = []
    pool = 8 * batch_size
    while True:
        while len(queue) < pool:
            epoch = list(range(len(items)))
            rng.shuffle(epoch)
            queue += epoch
        near = sorted(queue[:pool], key=lambda i: len(items[i].ids))
        queue = queue[pool:]
        groups = [near[at : at + batch_size] for at in range(0, pool, batch_size)]
        rng.shuffle(groups)
        for g in groups:
            yield collate([items[i] for i in g], pad_id)


def collate(items: Sequence[Window], pad_id: int) -> Batch:
    """Pad windows on the right into one Batch."""
    width = max(len(w.ids) for w in items)
    ids = torch.full((len(items), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(items), width), dtype=torch.long)
    targets = torch.zeros((len(items), width), dtype=torch.bool)
    for row, w in enumerate(items):
        n = len(w.ids)
        ids[row, :n] = torch.tensor(w.ids)
        attention[row, :n] = 1
        targets[row, min(w.answer_start, n) : n] = True
        if w.chosen is not None:
            targets[row, :n] &= torch.tensor(w.chosen)
    mask = attention.bool().clone()
    mask[:, 0] = False
    parts = [(row, at, token, share) for row, w in enumerate(items) for at, token, share in w.spread]
    spread = (torch.tensor([p[:3] for p in parts]).T, torch.tensor([p[3] for p in parts])) if parts else None
    return Batch(ids, attention, mask, targets & mask, tuple(w.record for w in items), spread)


# --- files -----------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """One record a line, with its meta fields."""
    with path.open("w", encoding="utf-8") as f:
        for r in records:
            row: dict[str, Any] = {"text": r.text} if r.text else {"question": r.question, "answer": r.answer}
            if r.choices:
                row["choices"] = list(r.choices)
            f.write(json.dumps({**row, **r.meta}, ensure_ascii=False) + "\n")
