"""ReLU with L1, JumpReLU and Gated SAEs: sae_lens's training classes, with the sparsity weight steered to the aim."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import SAEConfig
from .processes import Processes
from .sparse import adam, clipping

RATE = 0.02  # of the logarithm of the sparsity weight, for each factor e that the active features are off
MEMORY = 0.5  # of the running mean of the number of active features
DESCENT = 0.5  # of the steps until the aim is k
START = 0.1  # sparsity weight
LIMITS = (1e-3, 1e3)


class DenseSAE:
    """One SAE while it is trained on inputs scaled to norm √d.

    A sparsity weight that fits one model, width and layer collapses or saturates the next. Here the weight follows
    the number of active features: it grows while there are more than the aim, and sinks while there are fewer. The
    aim falls from the number at the start to k, geometrically, so that features are not killed by an overshoot.
    """

    def __init__(self, config: SAEConfig, d: int, device: torch.device, processes: Processes, seed: int) -> None:
        self.config, self.processes = config, processes
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(seed)
            self.sae = _training_sae(config, d, device)
        self.parameters = dict(self.sae.named_parameters())
        self.state: dict[str, Tensor] = {n: p.data for n, p in self.parameters.items()} | {
            "silent": torch.zeros(config.expansion * d, device=device), "steps": torch.zeros(()),
            "weight": torch.tensor(START), "active": torch.zeros(()), "first": torch.zeros(()),
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
        limit = clipping(float(sum(g.pow(2).sum() for g in grads)))
        for name, g in zip(self.parameters, grads):
            adam(s[name], g, s[f"{name}.m"], s[f"{name}.v"], lr, int(s["steps"]), limit)
        s["silent"] = torch.where(seen > 0, 0, s["silent"] + count)
        mse, l0 = totals.tolist()
        if s["steps"] == 1:
            s["first"], s["active"] = torch.tensor(max(l0, 1.0)), torch.tensor(l0)
        s["active"] = MEMORY * s["active"] + (1 - MEMORY) * l0
        way = min(1.0, float(s["steps"]) * self.config.batch / (DESCENT * self.config.tokens))
        aim = (1 - way) * math.log(float(s["first"])) + way * math.log(self.config.k)
        off = math.log(max(float(s["active"]), 0.1)) - aim
        s["weight"] = (s["weight"] * math.exp(RATE * off)).clamp(*LIMITS)
        return mse, l0

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
                if isinstance(bias := getattr(done, name, None), Tensor):
                    bias.div_(scale)
        return done


def _training_sae(config: SAEConfig, d: int, device: torch.device) -> Any:
    import sae_lens

    common: dict[str, Any] = {
        "d_in": d, "d_sae": config.expansion * d, "device": str(device),
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
