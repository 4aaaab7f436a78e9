"""Residual activations of many layers from one forward pass, as batches in a seeded, bounded-memory shuffle."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from saeunlearn.corpus import Corpus, Window, batches, windows
from saeunlearn.errors import NonFiniteError
from saeunlearn.models import LanguageModel

from .config import SAEConfig
from .processes import Processes

FORWARD_TOKENS = 8192  # padded tokens of one forward pass

Capture = Callable[[Sequence[int], Tensor], None]
"""capture(windows, out): write the activations of these windows' positions, in order, to out [layers, n, d]."""


def positions(window: Window) -> int:
    """Positions that count: all but the first, which is BOS or the attention sink in its place."""
    return len(window.ids) - 1


def text_windows(corpus: Corpus, model: LanguageModel, config: SAEConfig) -> list[Window]:
    """The windows that SAEs read: one record or a part of it each, or with `pack` rows full of records.

    Records in a row are parted by the tokenizer's end-of-text token where it has one. Raises CorpusError.
    """
    items = windows(corpus, model, config.context)
    if not config.pack:
        return items
    first = 0 if model.bos_id is None else 1
    end = [] if model.tokenizer.eos_token_id is None else [model.tokenizer.eos_token_id]
    ids: list[int] = []
    for at, w in enumerate(items):
        ids += [*(end if at and w.record != items[at - 1].record else []), *w.ids[first:]]
    return full_rows(ids, model, config.context)


def full_rows(ids: Sequence[int], model: LanguageModel, context: int | None) -> list[Window]:
    """Token ids cut into windows of the context's length, each with BOS where the model has one."""
    bos = [] if model.bos_id is None else [model.bos_id]
    step = min(context or model.max_length, model.max_length) - len(bos)
    parts = [(*bos, *ids[at : at + step]) for at in range(0, len(ids), step)]
    return [Window(part, 1, i) for i, part in enumerate(parts) if len(part) > 1]


def capturing(model: LanguageModel, items: Sequence[Window], layers: Sequence[int]) -> Capture:
    """Activations from forward passes that stop at the deepest of `layers`.

    Raises NonFiniteError naming the layers with NaN or infinity.
    """

    @torch.no_grad()
    def capture(chosen: Sequence[int], out: Tensor) -> None:
        starts = [0]
        for i in chosen:
            starts.append(starts[-1] + positions(items[i]))
        numbered = [Window(items[i].ids, 1, at) for at, i in enumerate(chosen)]
        for batch in batches(numbered, model.pad_id, max_tokens=FORWARD_TOKENS):
            b = batch.to(model.device)
            streams = model.capture(b.ids, layers, b.attention_mask)
            rows = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in batch.records]).to(out.device)
            for n, layer in enumerate(layers):
                h = streams[layer][b.mask]
                if not torch.isfinite(h).all():
                    raise NonFiniteError(f"activations after block {layer} of {model.name} hold NaN or infinity")
                out[n, rows] = h.to(out)

    return capture


@dataclass(frozen=True)
class Block:
    """Windows whose positions are shuffled together, in the order in which their positions are numbered."""

    windows: list[int]
    steps: int
    seed: int


@dataclass
class Shuffle:
    """Endless batches of positions. Everything follows from the seed, so that any step can be gone to directly.

    An epoch is a random order of the windows, cut into blocks of about `buffer` positions; a block's positions are
    held in memory and come in random order, those that fill no whole batch are left out this time. A corpus that fits
    is one block, computed once. Several processes draw the same batches: each computes its windows of a block, and
    returns the part of a batch that lies in them.
    """

    items: Sequence[Window]
    capture: Capture
    shape: tuple[int, int]  # layers, d_model
    batch: int
    buffer: int
    seed: int
    device: torch.device
    processes: Processes

    def __post_init__(self) -> None:
        total = sum(map(positions, self.items))
        self.batch = min(self.batch, total)
        self.blocks_an_epoch = max(1, round(total / max(self.buffer, 4 * self.batch)))

    def plan(self) -> Iterator[Block]:
        """The blocks of all epochs."""
        epoch = 0
        while True:
            order = list(range(len(self.items)))
            if self.blocks_an_epoch > 1:
                random.Random(_seed(self.seed, epoch)).shuffle(order)
            ends = list(accumulate(positions(self.items[i]) for i in order))
            first = 0
            for n in range(1, self.blocks_an_epoch + 1):
                last = bisect_left(ends, ends[-1] * n / self.blocks_an_epoch) + 1
                held = ends[last - 1] - (ends[first - 1] if first else 0) if last > first else 0
                if steps := held // self.batch:
                    yield Block(order[first:last], steps, _seed(self.seed, epoch, n))
                first = last
            epoch += 1

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Batches [layers, n, d] (float32) from batch number `step` on; n is `batch` over all processes."""
        held: list[int] | None = None
        memory = torch.empty(0)
        for block in self.plan():
            if step >= block.steps:
                step -= block.steps
                continue
            counts = [positions(self.items[i]) for i in block.windows]
            if held != block.windows:
                held = block.windows
                own = block.windows[self.processes.rank :: self.processes.count]
                need = sum(positions(self.items[i]) for i in own)
                if memory.numel() < self.shape[0] * need * self.shape[1]:
                    memory = torch.empty(0)  # before the larger one is there
                    memory = torch.empty(self.shape[0] * need * self.shape[1], device=self.device)
                h = memory[: self.shape[0] * need * self.shape[1]].view(self.shape[0], need, self.shape[1])
                self.capture(own, h)
                where = _where(counts, self.processes.rank, self.processes.count)
            order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(block.seed))
            for at in range(step, block.steps):
                rows = where[order[at * self.batch : (at + 1) * self.batch]]
                rows = rows[rows >= 0].to(self.device)
                yield torch.stack([layer[rows] for layer in h])
            step = 0


def _where(counts: Sequence[int], rank: int, count: int) -> Tensor:
    """For every position of a block: its row in this process's memory, or −1 where another one holds it."""
    owner = torch.arange(len(counts)) % count
    mine = torch.repeat_interleave(owner == rank, torch.tensor(counts))
    return torch.where(mine, mine.long().cumsum(0) - 1, -1)


def _seed(*numbers: int) -> int:
    """A seed for a generator, independent for every sequence of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7])
