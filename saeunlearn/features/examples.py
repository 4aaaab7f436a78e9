"""Where features are most active: the contexts of their largest activations. The result quotes the corpus."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from ..corpus import Corpus, batches, windows
from ..models import LanguageModel
from ..progress import Progress
from .scores import batch_stats, check_sae

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
    best: dict[int, dict[int, tuple[float, tuple[int, ...], int]]] = {i: {} for i in features}  # by record
    for batch in progress.over(list(batches(items, model.pad_id)), "top examples"):
        places = batch.mask.nonzero().tolist()
        for _, z, _ in batch_stats(model, {layer: sae}, batch.to(model.device)):
            for feature in features:
                values, found, seen = z[:, feature], best[feature], set[int]()
                for i in values.argsort(descending=True, stable=True).tolist():
                    (row, position), value = places[i], float(values[i])
                    record = batch.records[row]
                    if value <= 0 or len(seen) == n:
                        break
                    if record not in seen and (record not in found or found[record][0] < value):
                        ids = tuple(batch.ids[row][batch.attention_mask[row].bool()].tolist())
                        found[record] = (value, ids, position)
                    seen.add(record)
                kept = heapq.nlargest(n, found, key=lambda r: (found[r][0], -r))
                best[feature] = {r: found[r] for r in kept}

    def example(record: int, value: float, ids: tuple[int, ...], at: int) -> dict[str, Any]:
        text = model.tokenizer.decode(ids[max(0, at - BEFORE) : at + AFTER + 1], skip_special_tokens=True)
        token = model.tokenizer.decode(ids[at : at + 1])
        return {"id": corpus.records[record].id[:16], "activation": value, "token": token, "context": text}

    rows = {str(i): [example(r, *found) for r, found in best[i].items()] for i in features}
    return {"schema": SCHEMA, "layer": layer, "features": rows}
