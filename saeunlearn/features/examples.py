"""Where features are most active: the contexts of their largest activations. The result quotes the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..corpus import Corpus, batches, windows
from ..models import LanguageModel
from ..progress import Progress
from .scores import batch_stats, check_sae
from .topk import Best, hits

SCHEMA = 1
BEFORE, AFTER = 10, 4  # tokens of context around the one that a feature is active on


def top_examples(
    model: LanguageModel, sae: Any, layer: int, features: Sequence[int], corpus: Corpus, progress: Progress, n: int = 3
) -> dict[str, Any]:
    """{"schema", "layer", "features": {index: [{"id", "activation", "token", "context"}, … at most n, highest first]}}.

    A record comes once a feature. Raises SAEMismatchError, NonFiniteError.
    """
    check_sae(sae, layer, model)
    items = windows(corpus, model)
    records = torch.tensor([w.record for w in items])
    best = Best(n, len(features), 0, 0, distinct=True, device=model.device)
    numbered = [replace(w, record=i) for i, w in enumerate(items)]
    for batch in progress.over(list(batches(numbered, model.pad_id)), "top examples"):
        for _, z, _ in batch_stats(model, {layer: sae}, batch.to(model.device)):
            found = hits(z[:, list(features)], batch, records)
            best.update(found, found.value)

    def example(value: float, record: int, window: int, at: int) -> dict[str, Any]:
        ids = items[window].ids
        text = model.tokenizer.decode(ids[max(0, at - BEFORE) : at + AFTER + 1], skip_special_tokens=True)
        token = model.tokenizer.decode(ids[at : at + 1])
        return {"id": corpus.records[record].id[:16], "activation": value, "token": token, "context": text}

    rows = {
        str(feature): [example(v, *place) for v, place in zip(values, places) if place[0] >= 0]
        for feature, values, places in zip(features, best.value.T.tolist(), best.place.permute(2, 1, 0).tolist())
    }
    return {"schema": SCHEMA, "layer": layer, "features": rows}
