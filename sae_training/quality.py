"""How good trained SAEs are: what they leave unexplained, how sparse they are, what the model loses through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saeunlearn.corpus import Window, batches
from saeunlearn.features.scores import feature_stats
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

MAX_LOGITS = 2**26  # numbers of one batch's logits


@dataclass(frozen=True)
class Quality:
    """One SAE, on text that it was not trained on.

    `ce_recovered` is 1 where the model predicts as well through the SAE as without it, 0 where as badly as with the
    stream set to zero; `kl` is KL(original ‖ through the SAE). Cross-entropies and KL in nats a token.
    """

    layer: int
    fvu: float  # share of the variance left unexplained
    l0: float  # active features at a position
    dead: float  # share of features that fire nowhere on this text
    ce: float
    ce_through_sae: float
    ce_ablated: float
    ce_recovered: float
    kl: float
    positions: int
    density: list[float]  # share of positions at which each feature fires


@torch.no_grad()
def quality(model: LanguageModel, saes: Mapping[int, Any], items: Sequence[Window], progress: Progress
            ) -> list[Quality]:  # fmt: skip
    """The quality of every SAE on `items`. BOS and padding are neither replaced nor counted.

    Raises SAEMismatchError for SAEs that do not fit, NonFiniteError for NaN or infinity.
    """
    stats = feature_stats(model, saes, items, progress, "SAE quality: reconstruction")
    total: dict[str, float] = defaultdict(float)
    size = max(1, min(4096, MAX_LOGITS // model.d_vocab))
    groups = list(batches(items, model.pad_id, max_tokens=size))
    progress.start("SAE quality: predictions", len(groups))
    for batch in groups:
        b = batch.to(model.device)
        follows = b.mask[:, :-1] & b.mask[:, 1:]  # predicted from a position that counts

        def cross_entropy(logits: Tensor, ids: Tensor = b.ids, follows: Tensor = follows) -> float:
            return float(F.cross_entropy(logits[:, :-1][follows], ids[:, 1:][follows], reduction="sum"))

        logits = model.logits(b.ids, b.attention_mask)
        original = F.log_softmax(logits[b.mask], dim=-1)
        total["ce"] += cross_entropy(logits)
        total["tokens"] += float(follows.sum())
        for layer, sae in saes.items():

            def through(h: Tensor, sae: Any = sae, mask: Tensor = b.mask) -> Tensor:
                return torch.where(mask[..., None], sae.decode(sae.encode(h.to(sae.dtype))).to(h), h)

            with model.patch({layer: through}):
                logits = model.logits(b.ids, b.attention_mask)
            new = F.log_softmax(logits[b.mask], dim=-1)
            total[f"kl{layer}"] += float(F.kl_div(new, original, log_target=True, reduction="sum"))
            total[f"sae{layer}"] += cross_entropy(logits)
            with model.patch({layer: torch.zeros_like}):
                total[f"none{layer}"] += cross_entropy(model.logits(b.ids, b.attention_mask))
        progress.step()
    progress.finish()
    out = []
    for layer, s in stats.items():
        ce, sae_ce, none = (total[n] / max(total["tokens"], 1) for n in ("ce", f"sae{layer}", f"none{layer}"))
        density = s.density
        out.append(
            Quality(
                layer=layer, fvu=s.fvu, l0=float(s.active.sum()) / s.positions,
                dead=float((density == 0).double().mean()), ce=ce, ce_through_sae=sae_ce, ce_ablated=none,
                kl=total[f"kl{layer}"] / s.positions,
                ce_recovered=(none - sae_ce) / (none - ce) if none != ce else 0.0, positions=s.positions,
                density=density.tolist(),
            )
        )  # fmt: skip
    return out
