"""One Erasure taken apart: what it changed in the weights by feature, in the stream, and in what layers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..corpus import Corpus, windows
from ..errors import SelectionError
from ..evaluation.attacks.probes import Lens
from ..evaluation.evaluate import bootstrap, wilson
from ..evaluation.metrics import multiple_choice
from ..features.diff import weight_shares, weights_by_feature
from ..models import LanguageModel
from ..progress import Progress
from .compare import residual_shares
from .opened import ORIGINAL, OpenedRun

RECORDS = 64  # of each text
SHARES = ("relevant", "irrelevant", "other", "total")


def weight_changes(run: OpenedRun, name: str) -> dict[str, Any]:
    """{**`features.diff.weight_shares`, "by_feature": [share of every feature], "relevant": [features]} of an Erasure,
    for the SAE of the selection's layer. Raises SelectionError without a selection, ConfigError for an unknown name."""
    if run.selection is None:
        raise SelectionError("the run has no selection, so there are no features to split the change by")
    with run.edited(name) as model:
        after = model.copy()
    w_dec, relevant = run.sae(run.selection.layer).W_dec, run.selection.relevant
    found = weight_shares(run.model, after, w_dec, relevant, run.config.seed)
    return {**found, "by_feature": weights_by_feature(run.model, after, w_dec), "relevant": list(relevant)}


@torch.no_grad()
def stream_changes(
    run: OpenedRun, name: str, records: int = RECORDS, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """How an Erasure moves the stream on every text of the run, by layer.

    [{"layer", "text", "n": records, SHARE: {"mean", "low", "high"}}], the shares of `compare.residual_shares` over all
    positions but the first of a sample of `records` records. "relevant", "irrelevant" and "other" are shares of the
    squared change, "total" is that change relative to ‖h‖²; 95 % bootstrap intervals over records. A share is None
    where nothing changed. Raises ConfigError for an unknown name.
    """
    run.check_name(name)
    out = []
    for text, corpus in run.texts.items():
        found: dict[int, list[dict[str, Any]]] = {i: [] for i in range(run.model.n_layers)}
        items = [w for w in windows(corpus.sample(records, run.config.seed), run.model) if len(w.ids) > 1]
        for w in (progress or Progress()).over(items, f"change on {text}"):
            before, after = (_streams(run, n, w.ids) for n in (ORIGINAL, name))
            for i, rows in found.items():
                size = float(before[i].double().pow(2).sum())
                rows.append({**residual_shares(run, before[i], after[i]), "size": size})
        for i, rows in found.items():
            moved = [r["total"] * r["size"] for r in rows]  # ‖Δh‖², the weight of a share in the pooled one
            summary = {s: _pooled([r[s] for r in rows], moved) for s in SHARES[:-1]}
            summary["total"] = _pooled([r["total"] for r in rows], [r["size"] for r in rows])
            out.append({"layer": i, "text": text, "n": len(rows), **summary})
    return out


def _streams(run: OpenedRun, name: str, ids: Sequence[int]) -> dict[int, Any]:
    with run.edited(name) as model:
        given = torch.tensor([list(ids)], device=model.device)
        return {i: h[0, 1:] for i, h in model.capture(given, range(model.n_layers)).items()}


def _pooled(values: Sequence[float | None], weights: Sequence[float]) -> dict[str, float] | None:
    kept = [(v, w) for v, w in zip(values, weights) if v is not None and w > 0]
    if not kept:
        return None
    v, w = (list(column) for column in zip(*kept))
    low, high = bootstrap(v, w)
    return {"mean": float(np.average(v, weights=w)), "low": low, "high": high}


def answers_by_layer(
    run: OpenedRun, names: Sequence[str], questions: Corpus, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Multiple choice by the logit lens after every block: what the model's own head reads from the stream there.

    [{"model": name, "layer", "n", "mean", "low", "high", "chance"}], 95 % Wilson intervals over questions; the last
    layer is the model's own answer. Raises ConfigError for an unknown name, CorpusError for a question without choices.
    """
    chance = float(np.mean([1 / len(q.choices) for q in questions if q.choices])) if len(questions) else None
    out = []
    for name in names:
        with run.edited(name) as model:
            for i in range(model.n_layers):
                view: LanguageModel = Lens(model, i) if i < model.n_layers - 1 else model
                values = multiple_choice(view, questions, progress).values
                low, high = wilson(sum(values), len(values))
                out.append({"model": name, "layer": i, "n": len(values), "mean": float(np.mean(values)), "low": low,
                            "high": high, "chance": chance})  # fmt: skip
    return out
