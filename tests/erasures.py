"""What the tests of Erasures and of checkpoint folders share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saeunlearn import checkpoints as ck
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.models import LanguageModel
from saeunlearn.offsets import Offset

IDS = torch.tensor([[3, 9, 27, 81, 5, 12, 40, 7]])


def deltas(
    lm: LanguageModel, ranks: tuple[int | None, ...] = (2, 3), seed: int = 0, scale: float = 0.1
) -> list[WeightDelta]:
    """One random delta for the MLP writer of each of the first blocks; rank None is dense."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for w, k in zip(lm.writers(range(len(ranks))), ranks):
        if k is None:
            dense = scale * torch.randn(w.d_out, w.d_in, generator=g)
            out.append(WeightDelta(w.name, w.transposed, dense=dense))
        else:
            left, right = torch.randn(w.d_out, k, generator=g), scale * torch.randn(k, w.d_in, generator=g)
            out.append(WeightDelta(w.name, w.transposed, left, right))
    return out


def make(lm: LanguageModel, parts: list[WeightDelta] | None = None, **kwargs: Any) -> Erasure:
    settings = {
        "method": "test",
        "config": {"k": 2, "blocks": (0, 1)},
        "seed": 7,
        "forget_fingerprint": "f" * 64,
        "retain_fingerprint": "r" * 64,
    }
    return Erasure.create(lm, deltas(lm) if parts is None else parts, **{**settings, **kwargs})


def weights(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in lm.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def plain_logits(folder: Path, **kwargs: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@torch.no_grad()
def applied_logits(lm: LanguageModel, *erasures: Erasure) -> torch.Tensor:
    handles = [e.apply(lm) for e in erasures]
    out = lm.logits(IDS)
    for h in reversed(handles):
        h.revert()
    return out


def resave(source: Path, to: Path, *, dtype: str = "float32", shard: str = "50GB") -> Path:
    """The checkpoint in another dtype or sharding."""
    lm = LanguageModel.open(source, device="cpu", dtype=dtype)
    lm.model.save_pretrained(to, max_shard_size=shard)
    lm.tokenizer.save_pretrained(to)
    return to


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ck.PARTIAL in p.name or p.name.endswith(".old")]


def same_logits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)


def trained_twin(lm: LanguageModel, part: Offset) -> LanguageModel:
    """o' by the ordinary way: the changes applied to a copy."""
    twin = lm.copy()
    for change in part.changes:
        change.apply(twin)
    return twin
