"""Which positions of a batch are pushed and held, and the batches that are held beside the data itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from ..corpus import Batch, Window, collate


def prefix_hashes(ids: Sequence[int]) -> Iterator[int]:
    """For every position, a hash of all tokens up to and with it."""
    state = 0
    for token in ids:
        state = hash((state, token))
        yield state


def shared_prefixes(forget: Sequence[Window], retain: Sequence[Window]) -> frozenset[int]:
    """Hashes of the beginnings that some forget and some retain window have in common."""
    own = {p for w in forget for p in prefix_hashes(w.ids)}
    return frozenset(p for w in retain for p in takewhile(own.__contains__, prefix_hashes(w.ids)))


def known(batch: Batch, prefixes: frozenset[int]) -> Tensor:
    """Bool [batch, positions]: is the text up to and with this token among `prefixes`?

    Activations there are the same in forget and retain texts, so that a push would only work against the hold.
    """
    rows = [[p in prefixes for p in prefix_hashes(ids)] for ids in batch.ids.tolist()]
    return torch.tensor(rows, device=batch.ids.device)


def stacked(f: Batch, r: Batch, pad_id: int) -> Batch:
    """Two batches as one, padded to a common width."""
    items = [
        Window(tuple(row[: int(n)].tolist()), 1, 0)
        for b in (f, r)
        for row, n in zip(b.ids.cpu(), b.attention_mask.sum(-1).cpu())
    ]
    return collate(items, pad_id)


def with_swapped_tokens(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """The batch with a share of its tokens exchanged for others of the batch, drawn at random.

    Held like the rest, it keeps the update from firing on single tokens that forget and unseen retain texts have in
    common (a piece of a name), which a finite retain set cannot show.
    """
    words = batch.ids[batch.mask]
    drawn = words[torch.randint(len(words), batch.ids.shape, generator=generator)]
    chosen = (torch.rand(batch.ids.shape, generator=generator) < share) & batch.mask
    return replace(batch, ids=torch.where(chosen, drawn, batch.ids))
