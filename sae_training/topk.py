"""TopK, BatchTopK and Matryoshka BatchTopK: explicit gradients, of which every one touches active features only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import LEVELS, SAEConfig
from .processes import Processes
from .sparse import Active, Ops

PARAMETERS = ("w_enc", "b_enc", "w_dec", "b_dec")
THRESHOLD_RATE = 0.01  # of the running mean of BatchTopK's threshold
SLACK = 0.8  # of the last threshold: BatchTopK's candidates begin there
MARGIN = 1.02  # a threshold this far above the floor is safe from the rounding of the pass that found candidates


class SparseSAE:
    """One SAE while it is trained on inputs scaled to norm √d: parameters, Adam's moments, dead features.

    The loss is the mean of ‖x − x̂‖² over positions (Matryoshka: its sum over nested widths), and `aux` times that of
    the residual against its reconstruction by dead features. Decoder rows have norm 1. `state` is everything that a
    later step depends on.
    """

    def __init__(self, config: SAEConfig, start: Tensor, ops: Ops, processes: Processes, seed: int) -> None:
        d, m = len(start), config.expansion * len(start)
        self.config, self.ops, self.processes = config, ops, processes
        self.last = 0.0  # threshold of the last batch: a hint, which no result depends on
        self.bounds = [m]
        if config.architecture == "matryoshka":
            self.bounds = sorted({max(1, round(m * level)) for level in LEVELS})
        rows = torch.randn(m, d, generator=torch.Generator().manual_seed(seed)).to(start.device)
        rows /= rows.norm(dim=-1, keepdim=True)
        zeros = torch.zeros(m, device=start.device)
        self.state: dict[str, Tensor] = {
            "w_enc": rows, "b_enc": zeros, "w_dec": rows.clone(), "b_dec": start.clone(),
            "silent": zeros.clone(), "threshold": torch.zeros((), dtype=torch.float64), "steps": torch.zeros(()),
        }  # fmt: skip
        for name in PARAMETERS:
            self.state |= {f"{name}.{moment}": torch.zeros_like(self.state[name]) for moment in ("m", "v")}

    def step(self, x: Tensor, count: int, lr: float) -> tuple[float, float]:
        """Train on this process's part x [n, d] of a batch of `count` positions.

        Returns (mean ‖x − x̂‖², mean number of active features) over the whole batch.
        """
        s, ops = self.state, self.ops
        centred = x - s["b_dec"]
        a = self._select(centred, count)
        scale = 2 / count
        r, dz, sse = ops.reconstruct(x, a, s["w_dec"], s["b_dec"], self.bounds, scale)
        g_enc, g_dec, g_b = ops.gradients(centred, r, a, dz, self.bounds)
        dead = (s["silent"] > self.config.dead_after).nonzero().flatten()
        if len(dead) and self.config.aux:
            self._revive(dead, centred, -r[-1] / scale, scale, (g_enc, g_dec, g_b))
        g_start = r[0].sum(0) - g_b @ s["w_enc"]  # b_dec is taken off the input too
        seen = torch.zeros_like(s["silent"])
        seen[a.idx.long()] = 1
        totals = torch.stack([sse[-1].to(x), torch.tensor(float(len(a.z)), device=x.device)])
        self.processes.sum([g_enc, g_b, g_dec, g_start, seen, totals])
        s["steps"] += 1
        for name, g in zip(PARAMETERS, (g_enc, g_b, g_dec, g_start)):
            m, v = s[f"{name}.m"], s[f"{name}.v"]
            ops.adam(s[name], g, m, v, lr, int(s["steps"]), unit=name == "w_dec")
        s["silent"] = torch.where(seen > 0, 0, s["silent"] + count)
        mse, active = (totals / count).tolist()
        return mse, active

    def _select(self, x: Tensor, count: int) -> Active:
        w, b, k = self.state["w_enc"], self.state["b_enc"], self.config.k
        if self.config.architecture == "topk":
            return self.ops.top_k(x, w, b, k)
        floor = SLACK * self.last if self.last else self._first_floor(x)
        while True:
            a = self.ops.above(x, w, b, floor)
            values = self.processes.gather(a.z)
            least = float(values.kthvalue(max(1, len(values) - k * count + 1))[0]) if len(values) else 0.0
            if not floor or (len(values) >= k * count and least > MARGIN * floor):
                break
            floor = floor / 2 if floor > 1e-3 else 0.0
        self.last = least
        mean = self.state["threshold"]
        mean += (THRESHOLD_RATE if self.state["steps"] else 1.0) * (least - mean)
        return a.only((a.z >= least) & (a.z > 0))

    def _first_floor(self, x: Tensor) -> float:
        """A floor that the first batch's threshold is surely above, from some of its positions."""
        some = torch.addmm(self.state["b_enc"], x[:256], self.state["w_enc"].T).relu().flatten()
        wanted = min(len(some), max(1, self.config.k * min(256, len(x))))
        guess = torch.stack([some.topk(wanted)[0][-1] if len(some) else some.new_zeros(())])
        return SLACK * float(self.processes.gather(guess).min())

    def _revive(self, dead: Tensor, x: Tensor, residual: Tensor, scale: float, into: tuple[Tensor, ...]) -> None:
        """Add the gradients by which the strongest d/2 dead features learn to reconstruct the residual."""
        s, k = self.state, min(x.shape[1] // 2, len(dead))
        w_enc, b_enc, w_dec = (s[n][dead] for n in ("w_enc", "b_enc", "w_dec"))
        a = self.ops.top_k(x, w_enc, b_enc, k)
        weight = scale * self.config.aux * min(len(dead) / (x.shape[1] // 2), 1.0)
        r, dz, _ = self.ops.reconstruct(residual, a, w_dec, torch.zeros_like(s["b_dec"]), [len(dead)], weight)
        for g, extra in zip(into, self.ops.gradients(x, r, a, dz, [len(dead)])):
            g.index_add_(0, dead, extra)

    def finished(self, scale: float, metadata: Any) -> Any:
        """The sae_lens inference SAE for inputs that are not scaled: TopKSAE, or JumpReLUSAE with the threshold."""
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

        s = self.state
        m, d = s["w_enc"].shape
        common = {"d_in": d, "d_sae": m, "device": str(s["w_enc"].device), "metadata": metadata}
        # Trained on s·x. Selection and ReLU scale with their input, so z' = z/s with the same encoder and unit decoder
        # rows reconstructs x itself once biases and thresholds are divided by s.
        weights = {"W_enc": s["w_enc"].T.contiguous(), "b_enc": s["b_enc"] / scale, "W_dec": s["w_dec"],
                   "b_dec": s["b_dec"] / scale}  # fmt: skip
        sae: Any
        if self.config.architecture == "topk":
            sae = TopKSAE(TopKSAEConfig(k=self.config.k, apply_b_dec_to_input=True, **common))
        else:
            sae = JumpReLUSAE(JumpReLUSAEConfig(apply_b_dec_to_input=True, **common))
            weights["threshold"] = torch.full_like(s["b_enc"], float(s["threshold"]) / scale)
        sae.load_state_dict(weights)
        return sae
