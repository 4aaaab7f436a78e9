"""Residual-stream activations of many layers from one forward pass, shuffled within a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saeunlearn.corpus import Window, batches
from saeunlearn.errors import NonFiniteError
from saeunlearn.models import LanguageModel


@torch.no_grad()
def activation_stream(model: LanguageModel, items: Sequence[Window], layers: Sequence[int], seed: int | None
                      ) -> Iterator[Tensor]:  # fmt: skip
    """One epoch of activations [n, len(layers), d_model] (float32), without BOS and padding.

    Raises NonFiniteError naming the layer with NaN or infinity.
    """
    for batch in batches(items, model.pad_id, seed=seed):
        b = batch.to(model.device)
        streams = model.capture(b.ids, layers, b.attention_mask)
        h = torch.stack([streams[i][b.mask] for i in layers], dim=1).float()
        if not torch.isfinite(h).all():
            bad = [i for n, i in enumerate(layers) if not torch.isfinite(h[:, n]).all()]
            raise NonFiniteError(f"the activations after blocks {bad} of {model.name} hold NaN or infinity")
        yield h


def shuffled(model: LanguageModel, items: Sequence[Window], layers: Sequence[int], *, batch: int, buffer: int,
             seed: int) -> Iterator[Tensor]:  # fmt: skip
    """Endless batches [batch, len(layers), d_model] in a seeded random order.

    Holds at most about `buffer` positions: a corpus that fits is computed once and reshuffled every epoch,
    a larger one streams through, half of the buffer replaced at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = sum(len(w.ids) - 1 for w in items)
    if positions <= buffer:
        everything = torch.cat(list(activation_stream(model, items, layers, None)))
        batch = min(batch, len(everything))
        while True:
            order = torch.randperm(len(everything), generator=generator).to(everything.device)
            for i in range(0, len(order) - batch + 1, batch):
                yield everything[order[i : i + batch]]
    pool: list[Tensor] = []
    held, epoch = 0, 0
    while True:
        for h in activation_stream(model, items, layers, seed + epoch):
            pool.append(h)
            held += len(h)
            if held >= buffer:
                mixed = torch.cat(pool)
                order = torch.randperm(len(mixed), generator=generator).to(mixed.device)
                give = len(mixed) // 2 // batch * batch
                for i in range(0, give, batch):
                    yield mixed[order[i : i + batch]]
                pool = [mixed[order[give:]]]
                held = len(pool[0])
        epoch += 1
