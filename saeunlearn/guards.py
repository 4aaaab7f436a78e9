"""Guards: parts of an Erasure that clamp SAE features at inference through hooks and change no weight.

The runtime is `saeunlearn.deploy`, which also works without this library; here it is made from a sae_lens SAE and
becomes a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .deploy.guard import GuardRuntime
from .deploy.layout import DeployError
from .errors import ErasureError, SAEMismatchError
from .models import LanguageModel


@dataclass(frozen=True, eq=False)
class Guard:
    """The part; `runtime` says what it does. Several stack, and later captures at its layer see the edit."""

    kind: ClassVar[str] = "guard"
    runtime: GuardRuntime

    @classmethod
    def from_payload(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Guard:
        try:
            return cls(GuardRuntime(spec, tensors))
        except DeployError as e:
            raise ErasureError(str(e)) from e

    def spec(self) -> dict[str, Any]:
        return self.runtime.spec

    def tensors(self) -> dict[str, Tensor]:
        return self.runtime.tensors

    def check(self, model: LanguageModel) -> None:
        try:
            self.runtime.check(model.model)
        except DeployError as e:
            raise ErasureError(str(e)) from e

    def apply(self, model: LanguageModel) -> Callable[[], None]:
        return self.runtime.attach(model.model)

    def changed(self) -> list[dict[str, Any]]:
        return []

    def with_spec(self, **changes: Any) -> Guard:
        """The same features with another strength, mode or gate."""
        return Guard(GuardRuntime({**self.runtime.spec, **changes}, self.runtime.tensors))


@torch.no_grad()
def guard_of(sae: Any, layer: int, features: Sequence[int], *, mode: str = "clamp", **settings: Any
             ) -> Guard:  # fmt: skip
    """A guard on these features of a sae_lens SAE, which reads the output of block `layer`.

    `settings`: `strength`, with `min_active` for mode conditional and `threshold` for dsg; or `rules` for mode steer
    (GuardRuntime says what they are; DeployError where they are missing). Only the rows that are needed are kept:
    those of the features, and for topk the whole encoder. (BatchTopK and Matryoshka SAEs are JumpReLU once saved by
    sae_lens.)
    Raises SAEMismatchError for an SAE that rescales its input at run time or has another architecture.
    """
    cfg, chosen = sae.cfg, list(features)
    architecture = cfg.architecture()
    if architecture not in ("standard", "jumprelu", "topk", "gated"):
        raise SAEMismatchError(
            f"the SAE for layer {layer} has the architecture {architecture}; a guard needs standard (ReLU), jumprelu, "
            "topk or gated (save BatchTopK and Matryoshka SAEs with sae_lens and load them again: they become jumprelu)"
        )
    if cfg.normalize_activations not in ("none", "expected_average_only_in") or cfg.reshape_activations != "none":
        raise SAEMismatchError(
            f"the SAE for layer {layer} transforms its input at run time (normalize_activations="
            f"{cfg.normalize_activations}, reshape_activations={cfg.reshape_activations}): a guard cannot"
        )
    if not chosen or not all(0 <= j < cfg.d_sae for j in chosen) or len(set(chosen)) < len(chosen):
        raise SAEMismatchError(f"a guard needs distinct features between 0 and {cfg.d_sae - 1}, not {chosen}")
    directions, b_dec = sae.W_dec[chosen].double(), sae.b_dec
    tensors = {"b_in": b_dec if cfg.apply_b_dec_to_input else torch.zeros_like(b_dec)}
    spec = {"layer": layer, "features": chosen, "mode": mode, **settings}
    if architecture == "topk":
        spec |= {"encoder": "topk", "k": cfg.k}
        # Where the SAE compares pre-activations as if decoder rows had norm 1, the norms go into encoder and rows.
        norm = sae.W_dec.double().norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else torch.ones(()).double()
        directions = directions / norm.expand(cfg.d_sae)[chosen, None]
        tensors |= {"encoder": (sae.W_enc.double() * norm).T, "bias": sae.b_enc.double() * norm}
    else:
        tensors["encoder"] = sae.W_enc[:, chosen].T
        if architecture == "gated":
            spec["encoder"] = "gated"
            tensors |= {"b_gate": sae.b_gate[chosen], "b_mag": sae.b_mag[chosen], "gain": sae.r_mag[chosen].exp()}
        else:
            spec["encoder"] = "jumprelu"  # a plain ReLU is one with threshold 0
            bias = sae.b_enc[chosen]
            threshold = sae.threshold[chosen] if architecture == "jumprelu" else torch.zeros_like(bias)
            tensors |= {"bias": bias, "threshold": threshold}
    tensors["directions"] = directions
    # Copies: a view would keep the whole SAE alive, and safetensors stores none.
    plain = {n: t.detach().to("cpu", torch.float32, copy=True).contiguous() for n, t in tensors.items()}
    return Guard(GuardRuntime(spec, plain))
