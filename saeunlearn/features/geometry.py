"""The subspaces of a selection as geometry: spectrum, principal angles, and what of the stream lies in them.

Each beside random controls of the same size: K random decoder rows, and K random directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..corpus import Corpus, batches, windows
from ..models import LanguageModel
from ..progress import Progress
from .subspace import orthonormal_basis, principal_angles, subspaces

DRAWS = 20  # of each control


def random_rows(w_dec: Tensor, k: int, without: Sequence[int], seed: int, draws: int = DRAWS) -> Iterator[Tensor]:
    """`draws` times k decoder rows [k, d] of `w_dec` [m, d], never those `without` nor empty ones."""
    left = w_dec.detach().norm(dim=-1) > 0
    left[list(without)] = False
    rows, generator = left.nonzero()[:, 0], torch.Generator().manual_seed(seed)
    for _ in range(draws):
        yield w_dec.detach()[rows[torch.randperm(len(rows), generator=generator)[:k]]]


def random_bases(d: int, k: int, seed: int, draws: int = DRAWS) -> Iterator[Tensor]:
    """`draws` times k directions [k, d] drawn from a Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        yield torch.randn(k, d, generator=generator, dtype=torch.float64)


def geometry(w_dec: Tensor, relevant: Sequence[int], irrelevant: Sequence[int], *, seed: int = 0) -> dict[str, Any]:
    """Spectra and angles of the decoder rows of a selection.

        {"K", "d", "rank": {"relevant", "irrelevant"},
         "spectra": {"relevant": [[value]], "irrelevant": …, "random features": [DRAWS spectra], "random directions"},
         "angles": {"irrelevant features": [[degrees]], "random features": [DRAWS lists], "random directions": …}}

    Spectrum: singular values of the rows scaled to length 1, divided by √(their squares' mean), descending: all 1 where
    the rows are orthogonal. Angles: principal ones between U_rel and the span of the others, degrees, ascending; 90
    is orthogonal. The irrelevant rows are as they are, before SSPU takes the relevant part out of them (which makes
    every angle 90). Raises SelectionError, NonFiniteError.
    """
    rows, d, k = w_dec.detach().cpu().double(), w_dec.shape[1], len(relevant)
    u_rel, u_irr = subspaces(rows, list(relevant), list(irrelevant))
    sets = {
        "relevant": [rows[list(relevant)]],
        "irrelevant": [rows[list(irrelevant)]],
        "random features": list(random_rows(rows, k, relevant, seed)),
        "random directions": list(random_bases(d, k, seed)),
    }
    others = {("irrelevant features" if n == "irrelevant" else n): s for n, s in sets.items() if n != "relevant"}
    return {
        "K": k, "d": d, "rank": {"relevant": u_rel.shape[1], "irrelevant": u_irr.shape[1]},
        "spectra": {n: [_spectrum(m) for m in drawn] for n, drawn in sets.items()},
        "angles": {n: [_degrees(u_rel, m) for m in drawn] for n, drawn in others.items()},
    }  # fmt: skip


def _spectrum(rows: Tensor) -> list[float]:
    values = torch.linalg.svdvals(torch.nn.functional.normalize(rows, dim=-1))
    return (values / values.pow(2).mean().sqrt()).tolist()


def _degrees(basis: Tensor, rows: Tensor) -> list[float]:
    return (principal_angles(basis, orthonormal_basis(rows)) * 180 / torch.pi).tolist()


@torch.no_grad()
def variance_shares(
    model: LanguageModel, saes: Mapping[int, Any], features: Mapping[int, Sequence[int]], texts: Mapping[str, Corpus],
    *, seed: int = 0, progress: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """How much of the stream of each text lies in the span of these features' decoder rows, by layer.

    [{"layer", "text", "features": share, "random features": [DRAWS shares], "random directions": [DRAWS shares]}],
    share = E‖Uᵀ(h − μ)‖² / E‖h − μ‖² over positions without the first, μ the mean over all texts: 1 says that the
    text varies only inside the span. `features`: {layer: indices}. Raises CorpusError for a text without positions.
    """
    layers = sorted(features)
    sums: dict[str, dict[int, list[Tensor]]] = {}  # second moment [d, d], sum [d], count
    for name, corpus in texts.items():
        items = windows(corpus, model)
        d, kind = model.d_model, torch.float64
        found = {i: [torch.zeros(d, d, dtype=kind), torch.zeros(d, dtype=kind), torch.zeros(1)] for i in layers}
        sums[name] = found
        for batch in (progress or Progress()).over(list(batches(items, model.pad_id)), f"streams of {name}"):
            b = batch.to(model.device)
            for i, h in model.capture(b.ids, layers, b.attention_mask).items():
                x = h[b.mask].double().cpu()
                for total, new in zip(found[i], (x.T @ x, x.sum(0), torch.tensor([float(len(x))]))):
                    total += new
    out = []
    for i in layers:
        mean = torch.stack([s[i][1] for s in sums.values()]).sum(0) / sum(float(s[i][2]) for s in sums.values())
        rows = saes[i].W_dec.detach().cpu().double()
        k = len(features[i])
        spans = {"features": [rows[list(features[i])]], "random features": random_rows(rows, k, features[i], seed),
                 "random directions": random_bases(model.d_model, k, seed)}  # fmt: skip
        bases = {n: [orthonormal_basis(r) for r in drawn] for n, drawn in spans.items()}
        for name, s in sums.items():
            second, first, n = s[i]
            cov = second / n - torch.outer(first / n, mean) - torch.outer(mean, first / n) + torch.outer(mean, mean)
            whole = float(cov.trace())
            shares = {b: [float((u.T @ cov @ u).trace()) / whole for u in drawn] for b, drawn in bases.items()}
            out.append({"layer": i, "text": name, **shares, "features": shares["features"][0]})
    return out
