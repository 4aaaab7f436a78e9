"""Subspaces of decoder rows against their defining equations and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeunlearn.errors import NonFiniteError, SelectionError
from saeunlearn.features.subspace import orthonormal_basis, principal_angles, projector, subspaces

D = 12
KINDS = ("random", "duplicated", "dependent", "nearly dependent", "tiny", "huge")


def make_rows(kind: str, k: int, seed: int, d: int = D) -> tuple[Tensor, int]:
    """(rows [k, d] float64, their rank by construction)."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(k, d, generator=g, dtype=torch.float64)
    full = min(k, d)
    if kind == "tiny":
        return base * 1e-30, full
    if kind == "huge":
        return base * 1e30, full
    if kind == "random" or k < 3:
        return base, full
    half = math.ceil(k / 2)
    mix = torch.randn(k - half, half, generator=g, dtype=torch.float64)
    if kind == "duplicated":
        base[half:] = -base[torch.arange(k - half) % half]
    elif kind == "dependent":
        base[half:] = mix @ base[:half]
    else:  # a genuine direction each, far above the rank cut and far below the rows themselves
        base[half:] = mix @ base[:half] + 1e-3 * base[half:]
        return base, full
    return base, min(half, d)


def clear_cut(rows: Tensor) -> bool:
    """No singular value near the rank cut, where two correct bases may differ."""
    s = torch.linalg.svdvals(rows)
    return not bool(((s > 1e-12 * s[0]) & (s < 1e-5 * s[0])).any())


def same_span(basis: Tensor, rows: Tensor) -> bool:
    """Does SciPy's basis of the rows span what `basis` does?"""
    peer = scipy.linalg.orth(rows.numpy().T, rcond=1e-6)
    return peer.shape == tuple(basis.shape) and np.abs(peer @ peer.T - projector(basis).numpy()).max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), k=st.integers(1, 16), seed=st.integers(0, 10_000))
def test_basis_is_orthonormal_and_spans_the_rows(kind: str, k: int, seed: int) -> None:
    rows, rank = make_rows(kind, k, seed)
    assume(clear_cut(rows))
    u = orthonormal_basis(rows)
    assert u.dtype == torch.float64
    assert u.shape == (D, rank)
    assert float((u.T @ u - torch.eye(rank, dtype=torch.float64)).norm()) < 1e-12
    p = projector(u)
    assert float((p @ p - p).abs().max()) < 1e-12
    assert torch.equal(p, p.T)
    assert math.isclose(float(p.trace()), rank, abs_tol=1e-10)
    scale = float(rows.abs().max())
    assert float((rows @ p - rows).abs().max()) < 1e-12 * scale  # every row lies inside
    assert same_span(u, rows)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), k=st.integers(1, 6), q=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_subspaces_are_orthogonal_to_each_other(kind: str, k: int, q: int, seed: int) -> None:
    rows, rank = make_rows(kind, k + q, seed)
    order = torch.randperm(k + q, generator=torch.Generator().manual_seed(seed))
    w_dec = rows[order]
    relevant, irrelevant = list(range(k)), list(range(k, k + q))
    assume(clear_cut(w_dec) and clear_cut(w_dec[relevant]))
    assume(torch.linalg.matrix_rank(w_dec[relevant], rtol=1e-6) < rank)  # some direction is left
    u_rel, u_irr = subspaces(w_dec, relevant, irrelevant)
    assert float((u_rel.T @ u_irr).abs().max()) < 1e-12
    for u in (u_rel, u_irr):
        assert float((u.T @ u - torch.eye(u.shape[1], dtype=torch.float64)).norm()) < 1e-12
    assert same_span(u_rel, w_dec[relevant])
    assert same_span(torch.cat([u_rel, u_irr], dim=1), w_dec)  # together they span all rows and no more


def test_dependent_rows_keep_the_span_that_unpivoted_qr_loses() -> None:
    # The second row repeats the first, so R₂₂ = 0 while the column of Q beside it carries the third row.
    e = torch.eye(4, dtype=torch.float64)
    rows = torch.stack([e[0], e[0], e[0] + e[1], e[0] + e[1] + e[2]])
    known = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    u = orthonormal_basis(rows)
    assert u.shape == (4, 3)
    assert torch.allclose(projector(u), known, atol=1e-14)
    for pivoting, right in ((True, True), (False, False)):
        q, r, *_ = scipy.linalg.qr(rows.numpy().T, pivoting=pivoting)
        kept = q[:, np.abs(np.diag(r)) > 1e-6]
        assert np.allclose(kept @ kept.T, known, atol=1e-14) is right


@pytest.mark.parametrize(("share", "rank"), [(1e-8, 1), (1e-4, 2)])
def test_rank_cut_is_relative(share: float, rank: int) -> None:
    # Two unit rows at a small angle: singular values √2 cos(θ/2) and √2 sin(θ/2), their ratio tan(θ/2).
    theta = 2 * math.atan(share)
    rows = torch.tensor([[1.0, 0.0, 0.0], [math.cos(theta), math.sin(theta), 0.0]], dtype=torch.float64)
    assert orthonormal_basis(rows).shape == (3, rank)
    assert orthonormal_basis(rows * 1e-20).shape == (3, rank)


def test_float32_rows_nearly_inside_the_relevant_span() -> None:
    # One float32 pass leaves U_relᵀU_irr at 1e-3.
    g = torch.Generator().manual_seed(0)
    w_dec = torch.randn(6, 64, generator=g)
    inside = torch.randn(3, 6, generator=g) @ w_dec
    w_dec = torch.cat([w_dec, inside + 1e-3 * torch.randn(3, 64, generator=g)])
    u_rel, u_irr = subspaces(w_dec, list(range(6)), [6, 7, 8])
    assert u_irr.shape == (64, 3)
    assert float((u_rel.T @ u_irr).abs().max()) < 1e-14


@settings(max_examples=40, deadline=None)
@given(a=st.integers(1, D), b=st.integers(1, D), shared=st.booleans(), seed=st.integers(0, 10_000))
def test_principal_angles_are_scipys(a: int, b: int, shared: bool, seed: int) -> None:
    first, _ = make_rows("random", a, seed)
    second, _ = make_rows("random", b, seed + 1)
    if shared:
        second[0] = first[0]
    u, v = orthonormal_basis(first), orthonormal_basis(second)
    got = principal_angles(u, v)
    peer = np.sort(scipy.linalg.subspace_angles(u.numpy(), v.numpy()))
    assert got.shape == (min(a, b),)
    assert np.all(np.diff(got) >= 0)
    np.testing.assert_allclose(got, peer, atol=1e-7)  # an arc cosine is good to √eps only near 0


def test_principal_angles_of_known_planes() -> None:
    e = torch.eye(4, dtype=torch.float64)
    tilted = torch.stack([e[0], math.cos(0.3) * e[1] + math.sin(0.3) * e[2]], dim=1)
    np.testing.assert_allclose(principal_angles(e[:, :2], tilted), [0.0, 0.3], atol=1e-7)


def test_errors_name_what_is_wrong() -> None:
    e = torch.eye(4)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            orthonormal_basis(torch.tensor([[1.0, bad]]))
    for nothing in (torch.zeros(2, 4), torch.zeros(0, 4)):
        with pytest.raises(SelectionError, match="no directions"):
            orthonormal_basis(nothing)
    with pytest.raises(SelectionError, match="rank 4 of d = 4"):
        subspaces(torch.cat([e, e]), [0, 1, 2, 3], [4])
    u_rel, u_irr = subspaces(e, [0, 1, 2], [3])  # one direction left is enough
    assert (u_rel.shape, u_irr.shape) == ((4, 3), (4, 1))
    with pytest.raises(SelectionError, match="inside the subspace"):
        subspaces(torch.stack([e[0], e[1], e[0] - 2 * e[1]]), [0, 1], [2])


def test_rounding_left_by_the_projection_is_no_direction() -> None:
    # Third row = first + second to float32 precision: what the projection leaves of it is noise.
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 32, generator=g)
    with pytest.raises(SelectionError, match="inside the subspace"):
        subspaces(torch.cat([rows, rows.sum(0, keepdim=True)]), [0, 1], [2])
