"""Quantisation: rounding the weights can round a small edit away (Zhang et al., ICLR 2025, arXiv 2410.16454).

Round-to-nearest, weight-only, symmetric, one scale per output channel, on every matrix of the blocks; embeddings,
output matrix, norms and what a hook carries stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import LanguageModel
from .case import Case, Try, Victim
from .relearn import linear_names


def quantise(case: Case, victim: Victim, *, bits: int) -> list[Try]:
    """One try; `extra` says which share of the codes differs from those of the original, Q(W + ΔW) ≠ Q(W)."""
    model = victim.fresh()
    changed = total = 0
    for weight, before, axis in zip(*(_matrices(m) for m in (model, case.original)), _axes(model)):
        level, scale = codes(weight, bits, axis)
        changed += int((level != codes(before, bits, axis)[0]).sum())
        total += level.numel()
        weight.copy_((level * scale).to(weight.dtype))
    return [Try({"bits": bits}, case.score(model).values, extra={"changed_codes": changed / total})]


def codes(weight: Tensor, bits: int, axis: int = 1) -> tuple[Tensor, Tensor]:
    """(codes from −(2^(bits−1) − 1) to 2^(bits−1) − 1 in float32, scale of each output channel).

    `axis`: the one that is summed over, of the inputs. weight ≈ codes · scale.
    """
    top = 2 ** (bits - 1) - 1
    w = weight.detach().float()
    scale = w.abs().amax(axis, keepdim=True) / top
    return (w / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top), scale


def _matrices(model: LanguageModel) -> list[Tensor]:
    return [block.get_submodule(n).weight.data for block in model.blocks for n in linear_names(block)]  # type: ignore[misc]


def _axes(model: LanguageModel) -> list[int]:
    modules = [block.get_submodule(n) for block in model.blocks for n in linear_names(block)]
    return [0 if type(m).__name__ == "Conv1D" else 1 for m in modules]
