"""Closed-form edits of a linear map that leave what it does to retain text alone (AlphaEdit, arXiv 2410.02355).

For a matrix W [d_out, d_in] a key k [d_in] is an input and W k its write. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..corpus import Window, batches
from ..errors import ConfigError, NonFiniteError
from ..models import LanguageModel, Writer
from ..progress import Progress


def wide(t: Tensor) -> Tensor:
    """Float64, on the same device where it knows float64."""
    return (t.cpu() if t.device.type == "mps" else t).detach().double()


@torch.no_grad()
def retain_covariances(
    model: LanguageModel, items: Sequence[Window], writers: Sequence[Writer], progress: Progress
) -> list[Tensor]:
    """C [d_in, d_in] of each writer's keys over the windows, not centred: E[kkᵀ] over all counted positions (never
    padding, never the first) plus that of the first ones, scaled to the same trace.

    The first position is BOS or acts as the attention sink: an edit that reached it would reach every text, and
    unscaled its huge norm would be all that the spectrum shows.
    """
    counted = [torch.zeros(()) for _ in writers]
    first = [torch.zeros(()) for _ in writers]
    keys: list[Tensor] = [torch.empty(0)] * len(writers)

    def hook(i: int) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            keys[i] = args[0]

        return keep

    handles = [w.module.register_forward_hook(hook(i)) for i, w in enumerate(writers)]
    deepest = max(w.block for w in writers)
    progress.start("keys of retain text", len(items))
    try:
        for batch in batches(items, model.pad_id):
            b = batch.to(model.device)
            model.capture(b.ids, [deepest], b.attention_mask)
            for i in range(len(writers)):
                k, k0 = wide(keys[i][b.mask]), wide(keys[i][:, 0])
                counted[i] = counted[i].to(k) + k.T @ k
                first[i] = first[i].to(k) + k0.T @ k0
            progress.step(len(batch.records))
    finally:
        for h in handles:
            h.remove()
    progress.finish()
    n = sum(len(w.ids) - 1 for w in items)
    out = []
    for w, c, f in zip(writers, counted, first):
        if not (c.isfinite().all() and f.isfinite().all()):
            raise NonFiniteError(f"{model.name}: NaN or infinity among the inputs of {w.name} on retain text")
        out.append(c / n + f * (c.trace() / n / f.trace().clamp_min(1e-300)))
    return out


def null_space(covariance: Tensor, cut: float) -> Tensor:
    """V [d_in, r], orthonormal: the eigenvectors of C whose eigenvalue is at most `cut` times the mean one.

    Raises ConfigError when there are none.
    """
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves values of the size of eps · max (of either sign) where they are 0.
    noise = values.abs().max() * torch.finfo(values.dtype).eps * len(values)
    kept = values <= cut * values.mean() + noise
    if not kept.any():
        raise ConfigError(
            f"no input direction is free of retain text: the smallest eigenvalue is "
            f"{float(values[0] / values.mean()):.2g} of the mean one and the cut {cut:.2g}; raise the cut"
        )
    return vectors[:, kept]


def solve(keys: Tensor, v: Tensor, previous: Tensor, lam: float) -> Tensor:
    """X [n, d_in] with ΔW = R X for residuals R [d_out, n] at keys K [d_in, n]: X = ([P(KKᵀ + C_prev) + λI]⁻¹ P K)ᵀ.

    P = VVᵀ; `previous` is C_prev [d_in, d_in], the sum of kkᵀ of earlier edits; λ = `lam` times the mean eigenvalue
    of Vᵀ(KKᵀ + C_prev)V. Solved inside the range of P, where the matrix M = KKᵀ + C_prev is symmetric:
    X = KᵀV(VᵀMV + λI)⁻¹Vᵀ.
    Raises ConfigError when the keys have no part in the range of P.
    """
    inside = v.T @ keys
    gram = inside @ inside.T + v.T @ previous @ v
    lam = lam * float(gram.trace()) / len(gram)
    if not float(inside.norm()) > 1e-6 * float(keys.norm()):
        raise ConfigError("the forget prompts lie in the span of retain text's inputs: raise the cut")
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + lam * eye, inside).T @ v.T
