"""What the tests of guards share: SAEs of every architecture, and a guard's formula written out slowly."""

from __future__ import annotations

from typing import Any

import torch
from conftest import D_MODEL
from torch import Tensor

from saeunlearn.guards import Guard, guard_of
from saeunlearn.models import LanguageModel

LAYER, D_SAE = 1, 64
FEATURES = [3, 41, 17, 8]
KINDS = ("standard", "jumprelu", "topk", "topk-rescaled", "gated", "topk-no-b_dec")
GATES = {"clamp": {}, "conditional": {"min_active": 2}, "dsg": {"threshold": 0.6}}


def random_sae(kind: str = "jumprelu", layer: int = LAYER, d_in: int = D_MODEL, **changes: Any) -> Any:
    """An SAE of that architecture with random weights, decoder rows of different norms among them."""
    import sae_lens as sl
    from sae_lens.saes.sae import SAEMetadata

    name, _, variant = kind.partition("-")
    classes = {
        "standard": (sl.StandardSAE, sl.StandardSAEConfig), "jumprelu": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig),
        "topk": (sl.TopKSAE, sl.TopKSAEConfig), "gated": (sl.GatedSAE, sl.GatedSAEConfig),
    }  # fmt: skip
    cls, config = classes[name]
    settings: dict[str, Any] = {"d_in": d_in, "d_sae": D_SAE, "apply_b_dec_to_input": variant != "no-b_dec"}
    settings |= {"metadata": SAEMetadata(model_name="tiny", hook_name=f"blocks.{layer}.hook_resid_post")}
    if name == "topk":
        settings |= {"k": 12, "rescale_acts_by_decoder_norm": variant == "rescaled"}
    sae = cls(config(**{**settings, **changes}))
    g = torch.Generator().manual_seed(5)
    for p in sae.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=g)
    if name == "jumprelu":
        sae.threshold.data = sae.threshold.data.abs()
    return sae.requires_grad_(False).eval()


def guard(mode: str = "clamp", kind: str = "jumprelu", strength: float = 3.0, features: list[int] = FEATURES,
          layer: int = LAYER) -> Guard:  # fmt: skip
    return guard_of(random_sae(kind, layer), layer, features, mode=mode, strength=strength, **GATES[mode])


def slow_edit(sae: Any, h: Tensor, mode: str, strength: float = 3.0, features: list[int] = FEATURES) -> Tensor:
    """h' [position, d] of ONE sequence h without padding, position by position, through sae_lens and its error term."""
    out, hits = h.clone(), 0
    for t in range(1, len(h)):  # position 0 is BOS, or what stands in its place
        z = sae.encode(h[t])
        on = [j for j in features if z[j] > 0]
        hits += bool(on)
        if mode == "conditional" and len(on) < GATES[mode]["min_active"]:
            continue
        if mode == "dsg":
            if hits / t <= GATES[mode]["threshold"]:
                continue
            on = features if on else []
        edited = z.clone()
        edited[on] = -strength
        out[t] = sae.decode(edited) + (h[t] - sae.decode(z))
    return out


@torch.no_grad()
def slow_generate(lm: LanguageModel, prompt: str, n: int, mode: str, **kwargs: Any) -> list[int]:
    """Greedy tokens without a cache: every step runs the whole prefix, edited by `slow_edit`."""
    sae = random_sae()
    ids = [*([] if lm.bos_id is None else [lm.bos_id]), *lm.tokenizer(prompt, add_special_tokens=False).input_ids]
    start = len(ids)
    for _ in range(n):
        with lm.patch({LAYER: lambda h: slow_edit(sae, h[0], mode, **kwargs)[None]}):
            ids.append(int(lm.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]
