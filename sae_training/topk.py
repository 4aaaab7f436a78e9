"""TopK, BatchTopK and Matryoshka BatchTopK: explicit gradients, of which every one touches active features only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import LEVELS, SAEConfig
from .processes import Processes
from .sparse import Active, Ops, clipping

START_NORM = 0.1  # of decoder rows
PARAMETERS = ("w_enc", "b_enc", "w_dec", "b_dec")
THRESHOLD_RATE = 0.01  # at least, of the running mean of BatchTopK's threshold
THRESHOLD_SHARE = 0.05  # of all steps that this mean remembers at most: it sinks while the SAE learns
SLACK = 0.8  # of the last threshold: BatchTopK's candidates begin there
MARGIN = 1.02  # a threshold this far above the floor is safe from the rounding of the pass that found candidates


class SparseSAE:
    """One SAE while it is trained on inputs scaled to norm √d: parameters, Adam's moments, dead features.

    The loss is the mean of ‖x − x̂‖² over positions (Matryoshka: its sum over nested widths), and `aux` times that of
    the residual against its reconstruction by dead features. Activations count with the norm of their decoder row
    (sae_lens's `rescale_acts_by_decoder_norm`): rows start short, so that directions are learned fast at first, and
    slower as they grow. `state` is everything that a later step depends on.
    """

    def __init__(
        self, config: SAEConfig, d: int, device: torch.device, ops: Ops, processes: Processes, seed: int
    ) -> None:
        m = config.expansion * d
        self.config, self.ops, self.processes = config, ops, processes
        self.last = 0.0  # threshold of the last batch: a hint, which no result depends on
        self.bounds = [m]
        if config.architecture == "matryoshka":
            self.bounds = sorted({max(1, round(m * level)) for level in LEVELS})
        rows = torch.randn(m, d, generator=torch.Generator().manual_seed(seed)).to(device)
        rows *= START_NORM / rows.norm(dim=-1, keepdim=True)
        zeros = torch.zeros(m, device=device)
        self.state: dict[str, Tensor] = {
            "w_enc": rows, "b_enc": zeros, "w_dec": rows.clone(), "b_dec": torch.zeros(d, device=device),
            "silent": zeros.clone(), "threshold": torch.zeros((), dtype=torch.float64), "steps": torch.zeros(()),
        }  # fmt: skip
        for name in PARAMETERS:
            self.state |= {f"{name}.{moment}": torch.zeros_like(self.state[name]) for moment in ("m", "v")}

    def step(self, x: Tensor, count: int, lr: float) -> tuple[float, float]:
        """Train on this process's part x [n, d] of a batch of `count` positions.

        Returns (mean ‖x − x̂‖², mean number of active features) over the whole batch.
        """
        s, ops = self.state, self.ops
        given = (s["w_enc"], s["b_enc"], s["w_dec"])
        w_enc, b_enc, w_dec = ops.unit_form(*given)
        centred = x - s["b_dec"]
        a = self._select(centred, w_enc, b_enc, count)
        scale = 2 / count
        r, dz, sse = ops.reconstruct(x, a, w_dec, s["b_dec"], self.bounds, scale)
        g_enc, g_dec, g_b = ops.gradients(centred, r, a, dz, self.bounds)
        dead = (s["silent"] > self.config.dead_after).nonzero().flatten()
        if len(dead) and self.config.aux:
            rows = (w_enc[dead], b_enc[dead], w_dec[dead])
            self._revive(dead, rows, centred, -r[-1] / scale, scale, (g_enc, g_dec, g_b))
        g_start = r[0].sum(0) - g_b @ w_enc  # b_dec is taken off the input too
        seen = torch.zeros_like(s["silent"])
        seen[a.idx.long()] = 1
        totals = torch.stack([sse[-1].to(x), torch.tensor(float(len(a.z)), device=x.device)])
        self.processes.sum([g_enc, g_b, g_dec, g_start, seen, totals])
        limit = clipping(ops.chain(*given, g_enc, g_b, g_dec) + float(g_start.pow(2).sum()))
        s["steps"] += 1
        for name, g in zip(PARAMETERS, (g_enc, g_b, g_dec, g_start)):
            m, v = s[f"{name}.m"], s[f"{name}.v"]
            ops.adam(s[name], g, m, v, lr, int(s["steps"]), limit)
        s["silent"] = torch.where(seen > 0, 0, s["silent"] + count)
        mse, active = (totals / count).tolist()
        return mse, active

    def _select(self, x: Tensor, w: Tensor, b: Tensor, count: int) -> Active:
        k = self.config.k
        if self.config.architecture == "topk":
            return self.ops.top_k(x, w, b, k)
        floor = SLACK * self.last if self.last else self._first_floor(x, w, b)
        while True:
            a = self.ops.above(x, w, b, floor)
            values = self.processes.gather(a.z)
            least = float(values.kthvalue(max(1, len(values) - k * count + 1))[0]) if len(values) else 0.0
            if not floor or (len(values) >= k * count and least > MARGIN * floor):
                break
            floor = floor / 2 if floor > 1e-3 else 0.0
        self.last = least
        mean = self.state["threshold"]
        remembered = THRESHOLD_SHARE * self.config.tokens / self.config.batch
        rate = min(1.0, max(THRESHOLD_RATE, 1 / max(remembered, 1.0))) if self.state["steps"] else 1.0
        mean += rate * (least - mean)
        return a.only((a.z >= least) & (a.z > 0))

    def _first_floor(self, x: Tensor, w: Tensor, b: Tensor) -> float:
        """A floor that the first batch's threshold is surely above, from some of its positions."""
        some = torch.addmm(b, x[:256], w.T).relu().flatten()
        wanted = min(len(some), max(1, self.config.k * min(256, len(x))))
        guess = torch.stack([some.topk(wanted)[0][-1] if len(some) else some.new_zeros(())])
        return SLACK * float(self.processes.gather(guess).min())

    def _revive(self, dead: Tensor, rows: tuple[Tensor, Tensor, Tensor], x: Tensor, residual: Tensor, scale: float,
                into: tuple[Tensor, ...]) -> None:  # fmt: skip
        """Add the gradients by which the strongest d/2 dead features learn to reconstruct the residual."""
        k = min(x.shape[1] // 2, len(dead))
        w_enc, b_enc, w_dec = rows
        a = self.ops.top_k(x, w_enc, b_enc, k)
        weight = scale * self.config.aux * min(len(dead) / (x.shape[1] // 2), 1.0)
        r, dz, _ = self.ops.reconstruct(residual, a, w_dec, torch.zeros_like(x[0]), [len(dead)], weight)
        for g, extra in zip(into, self.ops.gradients(x, r, a, dz, [len(dead)])):
            g.index_add_(0, dead, extra)

    def finished(self, scale: float, metadata: Any) -> Any:
        """The sae_lens inference SAE for inputs that are not scaled: TopKSAE, or JumpReLUSAE with the threshold."""
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

        w_enc, b_enc, w_dec = self.ops.unit_form(*(self.state[n] for n in PARAMETERS[:3]))
        (m, d), s = w_enc.shape, self.state
        common = {"d_in": d, "d_sae": m, "device": str(w_enc.device), "metadata": metadata}
        # Trained on s·x. Selection and ReLU scale with their input, so z' = z/s with the same encoder and unit decoder
        # rows reconstructs x itself once biases and thresholds are divided by s.
        weights = {"W_enc": w_enc.T.contiguous(), "b_enc": b_enc / scale, "W_dec": w_dec, "b_dec": s["b_dec"] / scale}
        sae: Any
        if self.config.architecture == "topk":
            sae = TopKSAE(TopKSAEConfig(k=self.config.k, apply_b_dec_to_input=True, **common))
        else:
            sae = JumpReLUSAE(JumpReLUSAEConfig(apply_b_dec_to_input=True, **common))
            weights["threshold"] = torch.full_like(b_enc, float(s["threshold"]) / scale)
        sae.load_state_dict(weights)
        return sae
