"""What the tests of guards share: SAEs of every architecture, and a guard's formula written out slowly."""

from __future__ import annotations

from typing import Any

import torch
from conftest import D_MODEL, SENTENCES
from torch import Tensor

from saeunlearn.corpus import Corpus, windows
from saeunlearn.guards import Guard, guard_of
from saeunlearn.models import LanguageModel

LAYER, D_SAE = 1, 64
FEATURES = [49, 53, 5, 33, 62]
KINDS = ("standard", "jumprelu", "topk", "topk-rescaled", "gated", "topk-no-b_dec")
GATES = {"clamp": {}, "conditional": {"min_active": 2}, "dsg": {"threshold": 0.6}}

PROMPTS = [" ".join(s.split()[:n]) for s, n in zip(SENTENCES[:3], (2, 7, 4))]
NEW = 12  # generated tokens: with the longest prompt more than Gemma-2's window


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


@torch.no_grad()
def fitted_sae(lm: LanguageModel) -> Any:
    """A JumpReLU SAE whose features are each active at a fifth of the model's positions: gates open and close."""
    sae = random_sae()
    h = [lm.capture(torch.tensor([w.ids]), [LAYER])[LAYER][0, 1:] for w in windows(Corpus.of(SENTENCES[:12]), lm)]
    pre = (torch.cat(h) - sae.b_dec) @ sae.W_enc + sae.b_enc
    # Not at any position's own value, where rounding would decide.
    sae.threshold.data = pre.quantile(0.8, dim=0).clamp_min(0) + 0.03
    return sae


def guard(mode: str = "clamp", kind: str = "jumprelu", strength: float = 3.0, layer: int = LAYER, sae: Any = None
          ) -> Guard:  # fmt: skip
    return guard_of(sae or random_sae(kind, layer), layer, FEATURES, mode=mode, strength=strength, **GATES[mode])


def slow_edit(sae: Any, h: Tensor, mode: str, strength: float = 3.0) -> Tensor:
    """h' [position, d] of ONE sequence h without padding, position by position, through sae_lens and its error term."""
    out, hits = h.clone(), 0
    for t in range(1, len(h)):  # position 0 is BOS, or what stands in its place
        z = sae.encode(h[t])
        on = [j for j in FEATURES if z[j] > 0]
        hits += bool(on)
        if mode == "conditional" and len(on) < GATES[mode]["min_active"]:
            continue
        if mode == "dsg":
            if hits / t <= GATES[mode]["threshold"]:
                continue
            on = FEATURES if on else []
        edited = z.clone()
        edited[on] = -strength
        out[t] = sae.decode(edited) + (h[t] - sae.decode(z))
    return out


@torch.no_grad()
def slow_generate(lm: LanguageModel, sae: Any, prompt: str, n: int, mode: str, strength: float) -> list[int]:
    """Greedy tokens without a cache: every step runs the whole prefix, edited by `slow_edit`."""
    ids = [*([] if lm.bos_id is None else [lm.bos_id]), *lm.tokenizer(prompt, add_special_tokens=False).input_ids]
    start = len(ids)
    for _ in range(n):
        with lm.patch({LAYER: lambda h: slow_edit(sae, h[0], mode, strength)[None]}):
            ids.append(int(lm.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def generated(lm: LanguageModel, prompts: list[str], **kwargs: Any) -> list[list[int]]:
    """Token ids that `generate` adds to left-padded prompts; nothing ends early."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    rows = [bos + lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[lm.pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    out = lm.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=lm.pad_id, **{**settings, **kwargs})
    return out[:, width:].tolist()


def hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
