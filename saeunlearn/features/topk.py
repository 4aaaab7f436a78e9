"""Streaming top-k: the entries of every feature with the largest keys, over any length of text, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..corpus import Batch

FIELDS = ("record", "window", "at")  # where an entry lies: numbers in corpus and windows, position in the window


@dataclass(frozen=True)
class Hits:
    """The active positions of one batch: `p`, `feature` [e] index `z` [position, m]; `place` [3, position] is FIELDS.

    `row` [position] tells which positions belong to one window.
    """

    z: Tensor
    p: Tensor
    feature: Tensor
    row: Tensor
    place: Tensor

    @property
    def value(self) -> Tensor:
        return self.z[self.p, self.feature]


def hits(z: Tensor, batch: Batch, records: Tensor, first: int = 0) -> Hits:
    """The hits of activations z [position, m], positions in the order of `batch.mask`.

    `batch.records` holds indices of windows here, `records` [window] the record of each; window i has number first + i.
    """
    row, at = batch.mask.to(z.device).nonzero().unbind(1)
    window = torch.tensor(batch.records, device=z.device)[row]
    p, feature = (z > 0).nonzero().unbind(1)
    return Hits(z, p, feature, row, torch.stack([records.to(z.device)[window], first + window, at]))


class Best:
    """The n entries with the largest keys for each of m features. Exact; ties go to the earlier one.

    Rows are sorted, the largest first: `key`, `value` [n, m], `place` [3, n, m] (−1: no entry) and `around`
    [n, m, before + 1 + after], the feature's activations beside the entry (0 outside of the window and at its first
    position). `distinct`: a record comes once a feature. With random keys this is a uniform sample.
    """

    def __init__(self, n: int, m: int, before: int, after: int, *, distinct: bool, device: torch.device) -> None:
        self.n, self.distinct = n, distinct
        self.offsets = torch.arange(-before, after + 1, device=device)
        self.key = torch.full((n, m), -torch.inf, dtype=torch.float64, device=device)
        self.value = torch.zeros(n, m, device=device)
        self.place = torch.full((len(FIELDS), n, m), -1, dtype=torch.int32, device=device)
        self.around = torch.zeros(n, m, before + 1 + after, device=device)

    def update(self, h: Hits, key: Tensor) -> None:
        """Take the hits of a batch in; `key` [e] is finite."""
        key = key.double()
        keep = (key > self.key[-1, h.feature]).nonzero()[:, 0]
        keep = keep[key[keep].argsort(descending=True, stable=True)]
        if self.distinct:
            keep = keep[_firsts(h.feature[keep] * (int(h.place[0].max()) + 1) + h.place[0, h.p[keep]])]
        keep = keep[h.feature[keep].argsort(stable=True)]
        columns, counts = torch.unique_consecutive(h.feature[keep], return_counts=True)
        if not len(columns):
            return
        column = torch.repeat_interleave(torch.arange(len(columns), device=key.device), counts)
        rank = torch.arange(len(keep), device=key.device) - (counts.cumsum(0) - counts)[column]
        best = rank < self.n
        self._merge(h, key, keep[best], rank[best], column[best], columns)

    def _merge(self, h: Hits, key: Tensor, e: Tensor, rank: Tensor, column: Tensor, columns: Tensor) -> None:
        """Hit e[i] is the rank[i]-th of the batch for the feature columns[column[i]]."""
        size, p, f = (self.n, len(columns)), h.p[e], h.feature[e]
        new_key = torch.full(size, -torch.inf, dtype=torch.float64, device=key.device)
        new_value = torch.zeros(size, device=key.device)
        new_place = torch.full((len(FIELDS), *size), -1, dtype=torch.int32, device=key.device)
        new_around = torch.zeros(*size, len(self.offsets), device=key.device)
        beside = p[:, None] + self.offsets
        inside = beside.clamp(0, len(h.row) - 1)
        same = (inside == beside) & (h.row[inside] == h.row[p][:, None])
        new_key[rank, column], new_value[rank, column] = key[e], h.z[p, f].float()
        new_place[:, rank, column] = h.place[:, p].int()
        new_around[rank, column] = h.z[inside, f[:, None]].float() * same
        old_key, old_place = self.key[:, columns], self.place[:, :, columns]
        if self.distinct:
            twice = (old_place[0][:, None] == new_place[0][None]) & (new_place[0][None] >= 0)
            older = old_key[:, None] >= new_key[None]
            new_key[(twice & older).any(0)] = -torch.inf
            old_key[(twice & ~older).any(1)] = -torch.inf
        merged, order = torch.cat([old_key, new_key]).sort(dim=0, descending=True, stable=True)
        order, self.key[:, columns] = order[: self.n], merged[: self.n]
        empty = self.key[:, columns].isinf()  # also where a twin was taken out
        values = torch.cat([self.value[:, columns], new_value]).gather(0, order)
        places = torch.cat([old_place, new_place], 1).gather(1, order[None].expand(len(FIELDS), -1, -1))
        wide = order[..., None].expand(-1, -1, len(self.offsets))
        around = torch.cat([self.around[:, columns], new_around]).gather(0, wide)
        self.value[:, columns] = values.masked_fill(empty, 0)
        self.place[:, :, columns] = places.masked_fill(empty, -1)
        self.around[:, columns] = around.masked_fill(empty[..., None], 0)


def _firsts(groups: Tensor) -> Tensor:
    """Indices, ascending, of the first entry of each group."""
    _, inverse = torch.unique(groups, return_inverse=True)
    at = torch.arange(len(groups), device=groups.device)
    number = int(inverse.max()) + 1 if len(groups) else 0
    first = torch.full((number,), len(groups), device=groups.device)
    return first.scatter_reduce(0, inverse, at, "amin").sort()[0]
