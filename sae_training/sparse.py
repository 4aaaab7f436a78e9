"""Sparse activations and what a step computes with them: on CPUs by compiled kernels, elsewhere by PyTorch alone.

Both do the same and agree with the dense form; only the encoder's forward pass is dense. Shapes: x, target [n, d];
w_enc, w_dec [m, d] (one feature a row); b_enc [m]; b_dec [d]; all float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .workers import Workers

CHUNK_NUMBERS = 2**22  # pre-activations that one thread holds at a time
GATHERED = 2**26  # numbers of decoder rows that the PyTorch form holds at a time
BETAS, EPS = (0.9, 0.999), 1e-8
CLIP = 1.0  # norm of the whole gradient: Adam's slow second moment would else remember the first steps for long


@dataclass(frozen=True)
class Active:
    """Sparse activations in CSR form: row i owns entries ptr[i] … ptr[i + 1] of `idx` (features) and `z` ≥ 0."""

    ptr: Tensor  # [n + 1] int64
    idx: Tensor  # [entries] int32
    z: Tensor  # [entries] float32

    @property
    def rows(self) -> Tensor:
        """The row of each entry [entries]."""
        return torch.repeat_interleave(torch.arange(len(self.ptr) - 1, device=self.ptr.device), self.ptr.diff())

    def only(self, keep: Tensor) -> Active:
        """The entries where `keep` [entries] is true."""
        before = F.pad(keep.long().cumsum(0), (1, 0))
        return Active(before[self.ptr], self.idx[keep], self.z[keep])

    def dense(self, m: int) -> Tensor:
        """[n, m] with zeros."""
        out = torch.zeros(len(self.ptr) - 1, m, device=self.z.device)
        out[self.rows, self.idx.long()] = self.z
        return out


class Ops(Protocol):
    """What a step needs. `dtype` is that of the encoder's dense pass, which only selects: z is always float32."""

    dtype: torch.dtype

    def top_k(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Active:
        """The k largest positive pre-activations of each row (ties: one of them)."""

    def above(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, floor: float) -> Active:
        """All pre-activations above `floor` ≥ 0."""

    def reconstruct(self, target: Tensor, a: Active, w_dec: Tensor, b_dec: Tensor, bounds: list[int], scale: float
                    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(r [levels, n, d], dz [entries], sse [levels]) of scale/2 · Σ_s ‖x̂_s − target‖².

        x̂_s uses the features below bounds[s]. r[s] is the sum of ∂/∂x̂ over levels s and above, which is what a
        feature of level s sees; dz the gradient of each activation.
        """

    def gradients(self, x: Tensor, r: Tensor, a: Active, dz: Tensor, bounds: list[int]) -> tuple[Tensor, ...]:
        """Gradients (W_enc [m, d], W_dec [m, d], b_enc [m]); m is bounds[-1]."""

    def unit_form(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n w_enc, n b_enc, w_dec/n) with n = ‖w_dec‖ of each row: the same reconstruction from unit decoder rows."""

    def chain(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, g_enc: Tensor, g_b: Tensor, g_dec: Tensor) -> float:
        """Gradients for the unit form become those of the parameters, in place; returns the sum of their squares."""

    def adam(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, step: int, scale: float) -> None:
        """One Adam step (from 1) with the gradient scale · g, in place."""


class CPUOps:
    """`Ops` by the compiled kernels, its rows and features shared among threads."""

    def __init__(self, workers: Workers, dtype: torch.dtype = torch.float32) -> None:
        self.workers, self.dtype = workers, dtype
        self.bits: Any = np.int16 if dtype == torch.bfloat16 else np.int32
        self.drop = round(kernels.DROP * 2.0 ** (7 if dtype == torch.bfloat16 else 23))

    def top_k(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Active:
        m = len(w_enc)
        size = k + kernels.ROOM

        def scratch() -> Any:
            value, place, work = (np.empty(size, t) for t in (self.bits, np.int32, self.bits))
            peak = np.empty(m // kernels.GROUP + 1, self.bits)
            return lambda pre, idx, counts: kernels.top_k(pre, k, self.drop, idx, counts, value, place, work, peak)

        found = self._select(x, w_enc, b_enc, scratch, lambda rows: rows * k)
        assert found is not None
        return found

    def above(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, floor: float) -> Active:
        m = len(w_enc)
        least = torch.tensor(floor, dtype=self.dtype).view(torch.int16 if self.bits is np.int16 else torch.int32)

        def scratch() -> Any:
            peak = np.empty(m // kernels.GROUP + 1, self.bits)
            return lambda pre, idx, counts: kernels.all_above(pre, self.bits(int(least)), idx, counts, peak)

        each = max(64, m // 64)
        while (found := self._select(x, w_enc, b_enc, scratch, lambda rows, each=each: rows * each + m)) is None:
            each *= 4
        return found

    def _select(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, scratch: Any, room: Any) -> Active | None:
        """Encode in chunks, select entries in each, and compute their activations while the chunk is in cache."""
        m = len(w_enc)
        rows_at_once = max(16, CHUNK_NUMBERS // m)
        narrow = self.dtype == torch.bfloat16
        weights, bias, inputs = (t.to(self.dtype) for t in (w_enc, b_enc, x))
        counts = np.empty(len(x), np.int32)
        x_np, w_np, b_np = x.numpy(), w_enc.numpy(), b_enc.numpy()

        def part(_worker: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray] | None:
            select, n = scratch(), 0
            idx = np.empty(room(last - first), np.int32)
            z = np.empty(len(idx), np.float32)
            buffer = torch.empty(min(rows_at_once, last - first), m, dtype=self.dtype)
            for at in range(first, last, rows_at_once):
                end = min(at + rows_at_once, last)
                pre = buffer[: end - at]
                torch.addmm(bias, inputs[at:end], weights.T, out=pre)
                bits = pre.view(torch.int16 if narrow else torch.int32).numpy()
                found = select(bits, idx[n:], counts[at:end])
                if found < 0:
                    return None
                kernels.activations(x_np[at:end], counts[at:end], idx[n:], w_np, b_np, z[n:])
                n += found
            return idx[:n], z[:n]

        parts = self.workers.share(len(x), part)
        whole = [p for p in parts if p is not None]
        if len(whole) < len(parts):
            return None
        ptr = torch.zeros(len(x) + 1, dtype=torch.int64)
        torch.cumsum(torch.from_numpy(counts), 0, out=ptr[1:])
        idx, z = (torch.from_numpy(np.concatenate([p[i] for p in whole])) for i in (0, 1))
        return Active(ptr, idx, z)

    def reconstruct(self, target: Tensor, a: Active, w_dec: Tensor, b_dec: Tensor, bounds: list[int], scale: float
                    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        r, dz = torch.empty(len(bounds), *target.shape), torch.empty_like(a.z)
        given = [t.numpy() for t in (target, a.ptr, a.idx, a.z, w_dec, b_dec)]
        out, ends = (r.numpy(), dz.numpy()), np.array(bounds)

        def part(_worker: int, first: int, last: int) -> np.ndarray:
            sse = np.zeros(len(bounds))
            kernels.reconstruct(*given, ends, np.float32(scale), first, last, *out, sse)
            return sse

        return r, dz, torch.from_numpy(np.sum(self.workers.share(len(target), part), axis=0))

    def gradients(self, x: Tensor, r: Tensor, a: Active, dz: Tensor, bounds: list[int]) -> tuple[Tensor, ...]:
        m = bounds[-1]
        g_enc, g_dec, g_b = torch.empty(m, x.shape[1]), torch.empty(m, x.shape[1]), torch.empty(m)
        given = [t.numpy() for t in (x, r, a.ptr, a.idx, a.z, dz)]
        out, ends = [t.numpy() for t in (g_enc, g_dec, g_b)], np.array(bounds)

        def part(_worker: int, first: int, last: int) -> None:
            start, row, entry = np.empty(m + 1, np.int64), *np.empty((2, len(a.idx)), np.int32)
            kernels.gradients(*given, ends, first, last, *out, start, row, entry)

        self.workers.share(m, part)
        return g_enc, g_dec, g_b

    def unit_form(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given, out = (w_enc, b_enc, w_dec), [torch.empty_like(t) for t in (w_enc, b_enc, w_dec)]
        a, b = [t.numpy() for t in given], [t.numpy() for t in out]
        self.workers.share(len(w_enc), lambda _, first, last: kernels.unit_form(*a, first, last, *b))
        return out[0], out[1], out[2]

    def chain(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, g_enc: Tensor, g_b: Tensor, g_dec: Tensor) -> float:
        a, g = [t.numpy() for t in (w_enc, b_enc, w_dec)], [t.numpy() for t in (g_enc, g_dec, g_b)]
        return sum(self.workers.share(len(w_enc), lambda _, first, last: kernels.chain(*a, first, last, *g)))

    def adam(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, step: int, scale: float) -> None:
        arrays = [t.view(len(t), -1).numpy() for t in (p, g, m, v)]
        b1, b2 = BETAS
        settings = [np.float32(s) for s in (scale, lr / (1 - b1**step), b1, b2, (1 - b2**step) ** -0.5, EPS)]
        self.workers.share(len(p), lambda _, first, last: kernels.adam(*arrays, *settings, first, last))


class TorchOps:
    """`Ops` on any device."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def _pre(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
        return torch.addmm(b_enc.to(self.dtype), x.to(self.dtype), w_enc.to(self.dtype).T)

    def _active(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, ptr: Tensor, idx: Tensor) -> Active:
        a = Active(ptr, idx.int(), torch.empty(0))
        z = _dots(x, a.rows, w_enc, idx)
        return Active(ptr, a.idx, F.relu(z + b_enc[idx]))

    def top_k(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Active:
        idx = torch.cat([self._pre(part, w_enc, b_enc).topk(k, sorted=False)[1] for part in _chunks(x, len(w_enc))])
        ptr = torch.arange(0, idx.numel() + 1, k, device=x.device)
        a = self._active(x, w_enc, b_enc, ptr, idx.flatten())
        return a.only(a.z > 0)

    def above(self, x: Tensor, w_enc: Tensor, b_enc: Tensor, floor: float) -> Active:
        masks = [self._pre(part, w_enc, b_enc) > floor for part in _chunks(x, len(w_enc))]
        counts = torch.cat([m.sum(-1) for m in masks])
        idx = torch.cat([m.nonzero()[:, 1] for m in masks])
        return self._active(x, w_enc, b_enc, F.pad(counts.cumsum(0), (1, 0)), idx)

    def reconstruct(self, target: Tensor, a: Active, w_dec: Tensor, b_dec: Tensor, bounds: list[int], scale: float
                    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        idx, errors = a.idx.long(), []
        for bound in bounds:
            z = a.z if bound == bounds[-1] else torch.where(idx < bound, a.z, 0)
            errors.append(_bags(idx, a.ptr, w_dec, z) + b_dec - target)
        e = torch.stack(errors)
        r = scale * e.flip(0).cumsum(0).flip(0)
        level = torch.bucketize(idx, torch.tensor(bounds, device=idx.device), right=True)
        dz = _dots(r.flatten(0, 1), level * len(target) + a.rows, w_dec, idx)
        return r, torch.where(a.z != 0, dz, 0), e.double().pow(2).sum((1, 2))

    def gradients(self, x: Tensor, r: Tensor, a: Active, dz: Tensor, bounds: list[int]) -> tuple[Tensor, ...]:
        m, idx = bounds[-1], a.idx.long()
        order = idx.argsort(stable=True)
        starts = torch.searchsorted(idx[order], torch.arange(m + 1, device=x.device))
        rows = a.rows[order]
        level = torch.bucketize(idx[order], torch.tensor(bounds, device=idx.device), right=True)
        g_enc = _bags(rows, starts, x, dz[order])
        g_dec = _bags(level * len(x) + rows, starts, r.flatten(0, 1), a.z[order])
        return g_enc, g_dec, torch.zeros(m, device=x.device).index_add_(0, idx[order], dz[order])

    def unit_form(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = w_dec.norm(dim=-1, keepdim=True)
        return n * w_enc, n.flatten() * b_enc, w_dec / n

    def chain(self, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, g_enc: Tensor, g_b: Tensor, g_dec: Tensor) -> float:
        n = w_dec.norm(dim=-1, keepdim=True)
        radial = (g_enc * w_enc).sum(-1, keepdim=True) + (g_b * b_enc)[:, None]
        along = (g_dec * w_dec).sum(-1, keepdim=True)
        g_dec.add_((radial - along / n**2) * w_dec).div_(n)
        g_enc.mul_(n)
        g_b.mul_(n.flatten())
        return float(sum(g.pow(2).sum() for g in (g_enc, g_b, g_dec)))

    def adam(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, step: int, scale: float) -> None:
        adam(p, g, m, v, lr, step, scale)


def clipping(square: float) -> float:
    """What to scale gradients by whose squares sum to `square`."""
    return min(1.0, CLIP / max(math.sqrt(square), 1e-12))


def adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, step: int, scale: float) -> None:
    """One Adam step (arXiv 1412.6980; from step 1) with the gradient scale · g, in place."""
    b1, b2 = BETAS
    m.mul_(b1).add_(g, alpha=(1 - b1) * scale)
    v.mul_(b2).addcmul_(g, g, value=(1 - b2) * scale**2)
    p.addcdiv_(m, v.sqrt().mul_((1 - b2**step) ** -0.5).add_(EPS), value=-lr / (1 - b1**step))


def _chunks(x: Tensor, m: int) -> tuple[Tensor, ...]:
    return x.split(max(16, 8 * CHUNK_NUMBERS // m))


def _bags(idx: Tensor, ptr: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Σ weights[p] table[idx[p]] over each bag ptr[i] … ptr[i + 1]: [bags, d]."""
    return F.embedding_bag(idx, table, ptr, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _dots(left: Tensor, at: Tensor, right: Tensor, idx: Tensor) -> Tensor:
    """left[at[p]] · right[idx[p]] for every p, a bounded number of gathered rows at a time."""
    step = max(1, GATHERED // left.shape[1])
    pairs = zip(at.split(step), idx.split(step))
    return torch.cat([(left[i] * right[j]).sum(-1) for i, j in pairs]) if len(idx) else left.new_zeros(0)
