"""Trainable updates ΔW beside frozen weights: the model itself is never touched while a method trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..erasure import WeightDelta
from ..models import LanguageModel, Writer


@dataclass
class Delta:
    """ΔW of one writer, canonical [d_out, d_in], in float32 whatever the model's dtype.

    `basis` [d_out, r] (frozen) and `free` [r, d_in]: ΔW = basis @ free. Without a basis `free` is ΔW itself.
    """

    writer: Writer
    free: nn.Parameter
    basis: Tensor | None

    def matrix(self) -> Tensor:
        return self.free if self.basis is None else self.basis @ self.free

    def part(self) -> WeightDelta:
        """The part of an Erasure that makes this update permanent."""
        free = self.free.detach()
        name, transposed = self.writer.name, self.writer.transposed
        if self.basis is None:
            return WeightDelta(name, transposed, dense=free)
        return WeightDelta(name, transposed, left=self.basis, right=free)


def new_deltas(writers: Sequence[Writer], bases: Sequence[Tensor | None]) -> list[Delta]:
    """Zero updates; bases [d_out, r] or None for dense ones."""
    out = []
    for writer, basis in zip(writers, bases):
        device = writer.weight.device
        rows = writer.d_out if basis is None else basis.shape[1]
        free = nn.Parameter(torch.zeros(rows, writer.d_in, device=device))
        out.append(Delta(writer, free, None if basis is None else basis.to(device, torch.float32)))
    return out


@contextlib.contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """Within the context the model's own weights get no gradients; the flags are restored afterwards."""
    flags = [(p, p.requires_grad) for p in model.model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextlib.contextmanager
def attached(deltas: Sequence[Delta], scale: float = 1.0) -> Iterator[None]:
    """Within the context the model computes with W + scale·ΔW; the graph reaches `free`."""

    def make(delta: Delta) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = nn.functional.linear(args[0].float(), delta.free)
            if delta.basis is not None:
                x = nn.functional.linear(x, delta.basis)
            return output + (scale * x).to(output.dtype)

        return hook

    handles = [d.writer.module.register_forward_hook(make(d)) for d in deltas]
    try:
        yield
    finally:
        for h in handles:
            h.remove()
