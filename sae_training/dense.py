"""ReLU with L1, JumpReLU and Gated SAEs: sae_lens's training classes, with the sparsity weight steered to the aim."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import SAEConfig
from .processes import Processes
from .sparse import BETAS, EPS

RATE = 0.02  # of the logarithm of the sparsity weight, for each factor e that the active features are off
MEMORY = 0.95  # of the running mean of the number of active features
START = {"relu": 1.0, "gated": 1.0, "jumprelu": 1.0}
LIMITS = (1e-3, 1e3)


class DenseSAE:
    """One SAE while it is trained on inputs scaled to norm √d.

    A sparsity weight that fits one model, width and layer collapses or saturates the next. Here the weight follows
    the number of active features: it grows while there are more than k, and sinks while there are fewer.
    """

    def __init__(self, config: SAEConfig, start: Tensor, processes: Processes, seed: int) -> None:
        self.config, self.processes = config, processes
        with torch.random.fork_rng(devices=[] if start.device.type == "cpu" else [start.device]):
            torch.manual_seed(seed)
            self.sae = _training_sae(config, start)
        self.sae.b_dec.data = start.clone()
        self.parameters = dict(self.sae.named_parameters())
        m = config.expansion * len(start)
        self.state: dict[str, Tensor] = {n: p.data for n, p in self.parameters.items()} | {
            "silent": torch.zeros(m, device=start.device), "steps": torch.zeros(()),
            "weight": torch.tensor(START[config.architecture]), "active": torch.tensor(float(config.k)),
        }  # fmt: skip
        for name, p in self.parameters.items():
            self.state |= {f"{name}.{moment}": torch.zeros_like(p) for moment in ("m", "v")}

    def step(self, x: Tensor, count: int, lr: float) -> tuple[float, float]:
        """Train on this process's part x [n, d] of a batch of `count` positions.

        Returns (mean ‖x − x̂‖², mean number of active features) over the whole batch.
        """
        from sae_lens.saes.sae import TrainStepInput

        s = self.state
        for name, p in self.parameters.items():  # a resumed state brings tensors of its own
            p.data, p.grad = s[name], None
        name = "l0" if self.config.architecture == "jumprelu" else "l1"
        dead = s["silent"] > self.config.dead_after
        out = self.sae.training_forward_pass(
            TrainStepInput(sae_in=x, coefficients={name: float(s["weight"])}, dead_neuron_mask=dead,
                           n_training_steps=int(s["steps"]), is_logging_step=False)
        )  # fmt: skip
        share = len(x) / count
        (out.loss * share).backward()
        active = out.feature_acts.detach() > 0
        seen = active.any(0).float()
        totals = torch.stack([out.losses["mse_loss"].detach() * share, active.sum() / count])
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        self.processes.sum([*grads, seen, totals])
        s["steps"] += 1
        self._adam(grads, lr)
        s["silent"] = torch.where(seen > 0, 0, s["silent"] + count)
        mse, l0 = totals.tolist()
        s["active"] = MEMORY * s["active"] + (1 - MEMORY) * l0
        off = math.log(max(float(s["active"]), 0.1) / self.config.k)
        s["weight"] = (s["weight"] * math.exp(RATE * off)).clamp(*LIMITS)
        return mse, l0

    @torch.no_grad()
    def _adam(self, grads: list[Tensor], lr: float) -> None:
        s, steps = self.state, int(self.state["steps"])
        b1, b2 = BETAS
        for name, g in zip(self.parameters, grads):
            m, v = s[f"{name}.m"], s[f"{name}.v"]
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            s[name].addcdiv_(m, v.sqrt().mul_((1 - b2**steps) ** -0.5).add_(EPS), value=-lr / (1 - b1**steps))

    def finished(self, scale: float, metadata: Any) -> Any:
        """The sae_lens inference SAE for inputs that are not scaled, its decoder rows of norm 1."""
        from sae_lens import GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

        kinds: dict[str, tuple[Any, Any]] = {
            "relu": (StandardSAE, StandardSAEConfig), "gated": (GatedSAE, GatedSAEConfig),
            "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
        }  # fmt: skip
        sae, config = kinds[self.config.architecture]
        for name, p in self.parameters.items():
            p.data = self.state[name].clone()
        self.sae.fold_W_dec_norm()
        given = {**self.sae.cfg.get_inference_sae_cfg_dict(), "metadata": metadata}
        done = sae(config.from_dict(given))
        done.load_state_dict(self.sae.state_dict())
        with torch.no_grad():
            for name in ("b_enc", "b_dec", "threshold", "b_gate", "b_mag"):
                if hasattr(done, name):
                    getattr(done, name).div_(scale)
        return done


def _training_sae(config: SAEConfig, start: Tensor) -> Any:
    import sae_lens

    common: dict[str, Any] = {
        "d_in": len(start), "d_sae": config.expansion * len(start), "device": str(start.device),
        "apply_b_dec_to_input": True,
    }  # fmt: skip
    if config.architecture == "relu":
        return sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(**common))
    if config.architecture == "gated":
        return sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**common))
    return sae_lens.JumpReLUTrainingSAE(
        sae_lens.JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="tanh", jumprelu_init_threshold=0.1, jumprelu_bandwidth=2.0,
            jumprelu_ste_to_input=True, pre_act_loss_coefficient=3e-6, **common,
        )
    )  # fmt: skip
