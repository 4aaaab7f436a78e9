"""What differs between two checkpoints of one architecture, seen through the same SAEs.

Activity: the mean activation of each feature over each record, before and after, and how often it fires. Weights: how
much of the change of every matrix that writes to the residual stream lies in the span of named features' decoder rows,
‖P ΔW‖²/‖ΔW‖² with P the projector onto that span, which for a random subspace of rank K in d dimensions is K/d.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..corpus import Corpus, Window, batches, windows
from ..errors import ConfigError, CorpusError, ModelError
from ..models import LanguageModel
from ..parts import base_parameters
from ..progress import Progress
from .scores import FeatureStats, add, batch_stats, check_sae
from .selection import Selection, check_selection
from .subspace import orthonormal_basis

SCHEMA = 1
FDR = 0.05  # share of false ones expected among the features called lost or gained
CHUNK = 64  # records whose activations are held at a time
CONTROLS = 20  # draws of random features
NOTE = (
    "Means are over records, each the mean of its positions; firing rates are over positions. d: Cohen's d of the two "
    "means, by the pooled standard deviation over records. low, high: 95 % t interval of the change, paired by record; "
    "it covers the choice of records, not the training of the SAE. q: Benjamini-Hochberg over all features, texts and "
    f"layers tested here; lost and gained are those below {FDR}. An SAE describes the changed model only as well as "
    "its fvu_after says."
)


def feature_diff(
    before: LanguageModel,
    after: LanguageModel,
    saes: Mapping[int, Any],
    texts: Mapping[str, Corpus],
    *,
    selection: Selection | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The document of diff.json.

        {"schema", "seed", "versions", "note", "tests", "before", "after": {"name", "fingerprint"},
         "texts": {name: {"n", "fingerprint"}}, "selection": {"layer", "relevant"} | None,
         "layers": [{"layer", "d_sae", "texts": {name: {"positions", "fvu_before", "fvu_after", "lost", "gained",
                     "features": {column: [one value for every feature that fires in either model]}}}}],
         "weights": as `weight_shares` returns it}

    Columns: feature, mean_before, mean_after, rate_before, rate_after, change, low, high, d, p, q. `selection` names
    the features for the weights. Raises ModelError for two architectures, CorpusError for a text with fewer than two
    records, SAEMismatchError, SelectionError, NonFiniteError.
    """
    progress = progress or Progress()
    check_pair(before, after)
    for layer, sae in saes.items():
        check_sae(sae, layer, before)
    if selection is not None:
        check_selection(selection, before, saes)
    for name, corpus in texts.items():
        if len(corpus) < 2:
            raise CorpusError(f"the text {name} has one record: an interval over records needs at least two")
    layers: dict[int, dict[str, Any]] = {
        i: {"layer": i, "d_sae": int(s.W_dec.shape[0]), "texts": {}} for i, s in saes.items()
    }
    for name, corpus in texts.items():
        for layer, entry in _activity(before, after, saes, corpus, progress, f"features on {name}").items():
            layers[layer]["texts"][name] = entry
    tests = _correct([t for entry in layers.values() for t in entry["texts"].values()])
    return {
        "schema": SCHEMA,
        "seed": seed,
        "versions": {n: importlib.metadata.version(n) for n in ("saeunlearn", "torch", "transformers", "sae_lens")},
        "note": NOTE,
        "tests": tests,
        "before": {"name": before.name, "fingerprint": before.fingerprint()},
        "after": {"name": after.name, "fingerprint": after.fingerprint()},
        "texts": {name: {"n": len(c), "fingerprint": c.fingerprint()} for name, c in texts.items()},
        "selection": selection and {"layer": selection.layer, "relevant": selection.relevant},
        "layers": list(layers.values()),
        "weights": weight_shares(
            before, after, saes[selection.layer].W_dec if selection else None,
            selection.relevant if selection else [], seed,
        ),
    }  # fmt: skip


def open_pair(
    before: str, after: str | None, erasure: Path | None, device: str, dtype: str
) -> tuple[LanguageModel, LanguageModel]:
    """Two models to compare: `after` is a checkpoint, or `before` with an Erasure applied to it.

    Raises ConfigError unless exactly one of the two is given, ModelError, ErasureError.
    """
    from ..erasure import Erasure

    if (after is None) == (erasure is None):
        raise ConfigError("give either a second checkpoint or --erasure")
    edit = Erasure.load(erasure) if erasure else None
    first = LanguageModel.open(before, device=device, dtype=dtype)
    if edit is None:
        return first, LanguageModel.open(str(after), device=device, dtype=dtype)
    second = first.copy()
    edit.apply(second)
    return first, second


def check_pair(before: LanguageModel, after: LanguageModel) -> None:
    """Raises ModelError unless both have the same vocabulary and the same parameters in name and shape."""
    shapes = [{n: tuple(p.shape) for n, p in base_parameters(m).items()} for m in (before, after)]
    if shapes[0] != shapes[1]:
        name = next(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
        raise ModelError(
            f"{before.name} and {after.name} are of different architectures: {name} is {shapes[0].get(name, 'not in')} "
            f"the first, {shapes[1].get(name, 'not in')} the second"
        )
    if before.vocabulary != after.vocabulary:
        raise ModelError(f"{before.name} and {after.name} have different vocabularies")


# --- activity ----------------------------------------------------------------------------------------------


def _activity(before: LanguageModel, after: LanguageModel, saes: Mapping[int, Any], corpus: Corpus, progress: Progress,
              what: str) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Per layer the columns without q. One chunk of records is in memory at a time."""
    sums: dict[int, Tensor] = {}  # [5, m]: over records a, b, a², b², (b − a)²; a before, b after
    stats: tuple[dict[int, FeatureStats], dict[int, FeatureStats]] = ({}, {})
    n = 0
    for part in progress.over(list(_chunks(windows(corpus, before))), what):
        a, found = _record_means(before, saes, part, stats[0])
        b, _ = _record_means(after, saes, part, stats[1])
        n += found
        for layer in saes:
            x, y = a[layer], b[layer]
            new = torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), ((y - x) ** 2).sum(0)])
            sums[layer] = sums[layer] + new if layer in sums else new
    if n < 2:
        raise CorpusError(f"{corpus.name}: fewer than two records have a token to look at")
    return {i: _columns(sums[i].numpy(), n, stats[0][i], stats[1][i]) for i in saes}


def _chunks(items: Sequence[Window]) -> Iterator[list[Window]]:
    """The windows of CHUNK records at a time; `windows` gives them in the order of the records."""
    part: list[Window] = []
    seen: set[int] = set()
    for w in items:
        if w.record not in seen and len(seen) == CHUNK:
            yield part
            part, seen = [], set()
        part.append(w)
        seen.add(w.record)
    yield part


def _record_means(model: LanguageModel, saes: Mapping[int, Any], items: Sequence[Window],
                  stats: dict[int, FeatureStats]) -> tuple[dict[int, Tensor], int]:  # fmt: skip
    """Mean activations {layer: [record, m]} (float64, CPU) and the number of records; adds to `stats` in place."""
    rows = {record: i for i, record in enumerate(dict.fromkeys(w.record for w in items))}
    totals: dict[int, Tensor] = {}
    positions = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches(items, model.pad_id):
        row = torch.tensor([rows[r] for r in batch.records])[batch.mask.nonzero()[:, 0]]
        positions.index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
        for layer, z, one in batch_stats(model, saes, batch.to(model.device)):
            stats[layer] = add(stats[layer], one) if layer in stats else one
            total = totals.setdefault(layer, torch.zeros(len(rows), z.shape[1], dtype=torch.float64))
            total.index_add_(0, row, z.double().cpu())
    return {layer: t / positions[:, None] for layer, t in totals.items()}, len(rows)


def _columns(sums: np.ndarray, n: int, before: FeatureStats, after: FeatureStats) -> dict[str, Any]:
    from scipy.stats import t as student

    fires = ((before.active + after.active) > 0).numpy()
    a, b, aa, bb, dd = sums[:, fires] / n
    change = b - a
    spread, variance_a, variance_b = (np.maximum(square - mean**2, 0) * n / (n - 1)
                                      for square, mean in ((dd, change), (aa, a), (bb, b)))  # fmt: skip
    error, pooled = np.sqrt(spread / n), np.sqrt((variance_a + variance_b) / 2)
    half = student.ppf(0.975, n - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(change == 0, 1.0, 2 * student.sf(np.abs(change) / error, n - 1))
        d = np.where(change == 0, 0.0, change / pooled)
    columns = {
        "feature": np.flatnonzero(fires), "mean_before": a, "mean_after": b, "rate_before": before.density[fires],
        "rate_after": after.density[fires], "change": change, "low": change - half, "high": change + half, "d": d,
        "p": p,
    }  # fmt: skip
    return {
        "positions": before.positions,
        "fvu_before": before.fvu,
        "fvu_after": after.fvu,
        "features": {k: [_short(v) for v in np.asarray(c).tolist()] for k, c in columns.items()},
    }


def _short(value: float) -> float | int | None:
    """Six significant digits: there are many; None for an effect without spread."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _correct(entries: Sequence[dict[str, Any]]) -> int:
    """Add q and the counts of lost and gained features to every entry, and return how many tests there were."""
    from scipy.stats import false_discovery_control

    p = [v for e in entries for v in e["features"]["p"]]
    q = iter(false_discovery_control(p).tolist() if p else [])
    for e in entries:
        own = [next(q) for _ in e["features"]["p"]]
        e["features"]["q"] = [_short(v) for v in own]
        signs = [np.sign(c) for c, v in zip(e["features"]["change"], own) if v < FDR]
        e["lost"], e["gained"] = signs.count(-1), signs.count(1)
    return len(p)


# --- weights -----------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_shares(
    before: LanguageModel, after: LanguageModel, w_dec: Tensor | None, relevant: Sequence[int], seed: int
) -> dict[str, Any]:
    """How much of ΔW of each residual writer lies in the span of the decoder rows `relevant` of `w_dec` [m, d].

        {"rank", "expected": rank / d, "elsewhere": share of the squared change outside the writers,
         "writers": [{"name", "block", "norm": ‖ΔW‖, "share", "random": [share for as many random features]}]}

    `share` is None where nothing changed or no features are named. A norm between the matrix and the stream (Gemma-2)
    counts with its gain, as the stream sees the change.
    """
    basis, controls = None, []
    if w_dec is not None and relevant:
        rows = w_dec.detach().cpu()
        basis = orthonormal_basis(rows[list(relevant)])
        others = [i for i in range(len(rows)) if i not in set(relevant) and bool(rows[i].any())]
        rng = random.Random(seed)
        k = min(len(relevant), len(others))
        controls = [orthonormal_basis(rows[rng.sample(others, k)]) for _ in range(CONTROLS)] if k else []
    writers, squares = [], 0.0
    for w, square, delta in _writer_deltas(before, after):
        squares += square
        writers.append(
            {"name": w.name, "block": w.block, "norm": float(delta.norm()), "share": _share(basis, delta),
             "random": [_share(c, delta) for c in controls]}
        )  # fmt: skip
    new = base_parameters(after)
    total = sum(float((new[n].double() - p.double()).pow(2).sum()) for n, p in base_parameters(before).items())
    rank = None if basis is None else basis.shape[1]
    return {
        "rank": rank,
        "expected": None if rank is None else rank / before.d_model,
        "elsewhere": 1 - squares / total if total else None,
        "writers": writers,
    }


@torch.no_grad()
def weights_by_feature(before: LanguageModel, after: LanguageModel, w_dec: Tensor) -> list[float]:
    """For every row d_j of `w_dec` [m, d], scaled to length 1: d · Σ‖d_jᵀ ΔW‖² / Σ‖ΔW‖² over all residual writers.

    1 is what a random direction has on average; d says that all of the change is along d_j. 0 for empty rows, and
    everywhere where nothing changed.
    """
    rows = torch.nn.functional.normalize(w_dec.detach().cpu().double(), dim=-1)
    along, total = torch.zeros(len(rows), dtype=torch.float64), 0.0
    for delta in _writer_deltas(before, after):
        along += (rows @ delta[2]).pow(2).sum(-1)
        total += float(delta[2].pow(2).sum())
    return (before.d_model * along / total if total else along).tolist()


def _writer_deltas(before: LanguageModel, after: LanguageModel) -> Iterator[tuple[Any, float, Tensor]]:
    """(writer, ‖change of its weights‖², ΔW [d, d_in] as the stream sees it) of every residual writer."""
    kinds, blocks = ("mlp", "attn"), range(before.n_layers)
    for w, v in zip(before.writers(blocks, kinds), after.writers(blocks, kinds)):
        delta = (v.weight.double() - w.weight.double()).cpu()
        square = float(delta.pow(2).sum())
        delta = delta.T if w.transposed else delta
        if w.post_scale is not None:
            delta = w.post_scale.double().cpu()[:, None] * delta
        yield w, square, delta


def _share(basis: Tensor | None, delta: Tensor) -> float | None:
    """‖Uᵀ ΔW‖² / ‖ΔW‖² for an orthonormal U [d, r] and ΔW [d, d_in]."""
    total = float(delta.pow(2).sum())
    return float((basis.T @ delta).pow(2).sum()) / total if basis is not None and total else None
