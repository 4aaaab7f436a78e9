"""What the tests of the explorer share: an open run on a tiny random model, and dense activations, computed slowly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SENTENCES
from guarded import random_sae
from torch import Tensor
from toys import topk_sae

from saeunlearn.corpus import Corpus, Window, windows
from saeunlearn.erasure import Erasure
from saeunlearn.explore.opened import OpenedRun
from saeunlearn.features.gate import Gate
from saeunlearn.features.selection import Selection
from saeunlearn.models import LanguageModel
from saeunlearn.pipeline import RunConfig

LAYER = 1
RELEVANT, IRRELEVANT = [5, 40, 77], [3, 8]
# A record longer than the context comes in several windows, of which the largest activation may be in any.
FORGET = Corpus.of([*SENTENCES[:9], " ".join(SENTENCES[9:14]), " ".join(SENTENCES[22:46])], "forget")
NEAR = Corpus.of([s.replace("keeps", "sold") for s in SENTENCES[14:22]], "near")
TEXTS = {"forget": FORGET, "near": NEAR}


def saes() -> dict[int, Any]:
    return {LAYER: topk_sae(LAYER), 2: random_sae("jumprelu", 2)}


def selection(lm: LanguageModel) -> Selection:
    return Selection(
        layer=LAYER, relevant=RELEVANT, irrelevant=IRRELEVANT, k=len(RELEVANT), d_model=lm.d_model, retain_norm=1.0,
        gate=Gate([5], [1.0], 0.0, 1.0, 0.0), other_gates={}, layers=[], forget_scores=[], retain_scores=[], config={},
        model_fingerprint=lm.fingerprint(), forget_fingerprint=FORGET.fingerprint(),
        retain_fingerprint=NEAR.fingerprint(),
    )  # fmt: skip


def opened(lm: LanguageModel, **erasures: Erasure) -> OpenedRun:
    return OpenedRun(
        root=Path("nowhere"), config=RunConfig(model="m", forget="f", retain="r"), model=lm, saes=saes(),
        selection=selection(lm), forget=FORGET, retain=NEAR, questions=None, texts=TEXTS, erasures=dict(erasures),
        documents={},
    )  # fmt: skip


@torch.no_grad()
def dense(lm: LanguageModel, sae: Any, layer: int, corpus: Corpus) -> list[tuple[Window, Tensor]]:
    """(window, z [position, m]) of each window alone; row 0, the first position, is zero as it is not counted."""
    out = []
    for w in windows(corpus, lm):
        z = sae.encode(lm.capture(torch.tensor([w.ids]), [layer])[layer][0])
        z[0] = 0
        out.append((w, z))
    return out
