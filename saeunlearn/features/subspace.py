"""Orthonormal bases of decoder directions, and projectors onto them (SSPU, arXiv 2505.24428):
U_rel spans the relevant rows, U_irr what the irrelevant ones add to it, P = U Uᵀ.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, SelectionError

RANK_CUT = 1e-6  # singular values below this share of the largest count as zero


def orthonormal_basis(rows: Tensor, *, against: Tensor | None = None) -> Tensor:
    """Orthonormal basis U [d, r] of the span of `rows` [k, d] (float64), r its numerical rank.

    `against` [d, q]: an orthonormal basis that the result is orthogonal to; the rows are projected off it first.
    Uses an SVD with a relative rank cut: plain QR with small R_ii dropped loses span when rows depend on each
    other. Raises NonFiniteError for NaN rows, SelectionError when nothing is left.
    """
    if not torch.isfinite(rows).all():
        raise NonFiniteError("a decoder row holds NaN or infinity")
    m = rows.detach().cpu().double().T
    scale = float(torch.linalg.matrix_norm(m, 2)) if m.numel() else 0.0
    if against is not None:
        m = _project_off(m, against)
    if m.numel() == 0 or scale == 0:
        raise SelectionError("no directions to span a subspace with")
    u, s, _ = torch.linalg.svd(m, full_matrices=False)
    # Relative to the rows as given: what the projection left of them may be rounding error only.
    u = u[:, s > RANK_CUT * scale]
    if u.shape[1] == 0:
        raise SelectionError("the directions lie inside the subspace they were to be orthogonal to")
    if against is not None:  # once more: the SVD's own rounding
        u, _ = torch.linalg.qr(_project_off(u, against))
    return u


def _project_off(m: Tensor, against: Tensor) -> Tensor:
    a = against.cpu().double()
    for _ in range(2):  # one pass leaves the rounding error of the first
        m = m - a @ (a.T @ m)
    return m


def projector(basis: Tensor) -> Tensor:
    """P = U Uᵀ [d, d] of an orthonormal basis U [d, r]."""
    return basis @ basis.T


def subspaces(w_dec: Tensor, relevant: list[int], irrelevant: list[int]) -> tuple[Tensor, Tensor]:
    """(U_rel [d, r], U_irr [d, q]), float64, orthonormal and orthogonal to each other.

    U_rel spans the relevant decoder rows; U_irr what of the irrelevant rows is orthogonal to them.
    Raises SelectionError when the relevant rows leave no room: rank(U_rel) + 1 > d.
    """
    d = w_dec.shape[1]
    u_rel = orthonormal_basis(w_dec[relevant])
    if u_rel.shape[1] + 1 > d:
        raise SelectionError(
            f"{len(relevant)} relevant features span rank {u_rel.shape[1]} of d = {d}: no direction is left to "
            "steer towards; choose a smaller K"
        )
    return u_rel, orthonormal_basis(w_dec[irrelevant], against=u_rel)


def principal_angles(a: Tensor, b: Tensor) -> np.ndarray:
    """Principal angles (radians, ascending) between the spans of two orthonormal bases [d, r], [d, q]."""
    s = torch.linalg.svdvals(a.double().T @ b.double()).clamp(0, 1)
    return np.arccos(s.numpy())
