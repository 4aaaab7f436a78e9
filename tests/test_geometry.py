"""The geometry of subspaces where the answer is known, and what of the stream lies in them, computed slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import D_MODEL
from toys import FORGET, RETAIN, topk_sae

from saeunlearn.corpus import windows
from saeunlearn.errors import SelectionError
from saeunlearn.features.geometry import DRAWS, geometry, random_rows, variance_shares
from saeunlearn.features.subspace import orthonormal_basis
from saeunlearn.models import LanguageModel


def test_orthogonal_rows_have_a_flat_spectrum_and_right_angles() -> None:
    rows = torch.cat([3.0 * torch.eye(16), torch.randn(40, 16, generator=torch.Generator().manual_seed(0))])
    found = geometry(rows, [0, 1, 2], [5, 6, 7])
    assert found["rank"] == {"relevant": 3, "irrelevant": 3}
    assert np.allclose(found["spectra"]["relevant"], 1.0)
    assert np.allclose(found["angles"]["irrelevant features"], 90.0)
    assert {n: len(d) for n, d in found["angles"].items()} == {
        "irrelevant features": 1, "random features": DRAWS, "random directions": DRAWS}  # fmt: skip
    assert all(s[0] > 1 and s == sorted(s, reverse=True) for s in found["spectra"]["random directions"])


def test_shared_directions_show_in_the_spectrum_and_in_the_angles() -> None:
    rows = torch.eye(8)[[0, 1, 0, 2]]
    rows[2, 1] = 1e-3  # nearly the first row again
    found = geometry(rows, [0, 2], [1, 3])
    assert found["spectra"]["relevant"][0] == pytest.approx([2**0.5, 0], abs=2e-3)
    # The two span the first two axes, one of which is also the irrelevant row 1.
    assert found["angles"]["irrelevant features"][0] == pytest.approx([0, 90], abs=0.2)
    with pytest.raises(SelectionError):
        geometry(torch.eye(4), [0, 1, 2, 3], [0])


def test_random_rows_are_others_and_never_empty() -> None:
    rows = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0, 6.0]))
    for drawn in random_rows(rows, 2, [0, 5], seed=0):
        assert {int(r.argmax()) for r in drawn} < {1, 2, 4}
        assert drawn.shape == (2, 6)


@pytest.mark.slow
@torch.no_grad()
def test_shares_of_variance_are_those_of_the_stream(llama: LanguageModel) -> None:
    saes, features = {0: topk_sae(0), 2: topk_sae(2, seed=1)}, {0: [1, 2, 3], 2: [4, 5]}
    texts = {"forget": FORGET, "near": RETAIN}
    rows = variance_shares(llama, saes, features, texts)
    assert [(r["layer"], r["text"]) for r in rows] == [(i, t) for i in (0, 2) for t in texts]
    streams = {
        t: torch.cat([llama.capture(torch.tensor([w.ids]), [2])[2][0, 1:] for w in windows(c, llama)]).double()
        for t, c in texts.items()
    }
    mean = torch.cat(list(streams.values())).mean(0)
    basis = orthonormal_basis(saes[2].W_dec[[4, 5]])
    for r in rows[2:]:
        h = streams[r["text"]] - mean
        assert r["features"] == pytest.approx(float((h @ basis).pow(2).sum() / h.pow(2).sum()), rel=1e-4)
        assert len(r["random features"]) == len(r["random directions"]) == DRAWS
        # A random direction has 1 / d of the variance on average.
        assert np.mean(r["random directions"]) == pytest.approx(2 / D_MODEL, abs=0.05)
