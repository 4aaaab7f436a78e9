"""Per-token losses of a language model, batched by length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .corpus import Window, batches
from .errors import NonFiniteError
from .models import LanguageModel
from .progress import Progress

# Logits of one batch stay under 2^26 numbers (256 MB in float32), also with a vocabulary of 256 k.
_MAX_LOGITS = 2**26


def token_losses(model: LanguageModel, items: Sequence[Window], progress: Progress | None = None) -> list[Tensor]:
    """Per-token losses (nats) of each window: float32 CPU tensors aligned to `window.ids[1:]`.

    Every token but the first is scored, the question's too. Raises NonFiniteError for NaN or infinity.
    """

    def score(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)

    return over_windows(model, items, score, progress or Progress(), "token losses")


def mean_loss(model: LanguageModel, items: Sequence[Window]) -> float:
    """Mean loss (nats) over all tokens but the first of each window."""
    return float(torch.cat(token_losses(model, items)).double().mean())


@torch.no_grad()
def over_windows(
    model: LanguageModel,
    items: Sequence[Window],
    score: Callable[[Tensor, Tensor], Tensor],
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """One tensor a window: score(logits [b, t, d_vocab] of positions 0 … t − 1, ids [b, t] that follow) → [b, t]."""
    out: list[Tensor] = [torch.empty(0)] * len(items)
    numbered = [dataclasses.replace(w, record=i) for i, w in enumerate(items)]
    budget = max(1, min(4096, _MAX_LOGITS // model.d_vocab))
    progress.start(what, len(items))
    for batch in batches(numbered, model.pad_id, max_tokens=budget):
        b = batch.to(model.device)
        values = score(model.logits(b.ids, b.attention_mask)[:, :-1], b.ids[:, 1:]).cpu()
        for row, i in enumerate(batch.records):
            out[i] = values[row, : len(items[i].ids) - 1].clone()
            if not out[i].isfinite().all():
                raise NonFiniteError(f"{model.name} gives NaN or infinite losses (window {i + 1} of {what})")
        progress.step(len(batch.records))
    progress.finish()
    return out
