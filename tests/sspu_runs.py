"""Short SSPU runs that the tests share."""

from __future__ import annotations

from typing import Any

from toys import FORGET, RETAIN, exact_sae, oblique

from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure
from saeunlearn.features.selection import SelectConfig, Selection, select
from saeunlearn.methods.sspu import SSPU, SSPUConfig, SSPURun, prepare
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

LAYER, K = 2, 4
# Every setting that a test relies on is written out: the defaults are not its business.
CONFIG = SSPUConfig(
    form="hard", gated=True, basis="relevant", target="relevant", blocks=3, attention=False, gamma=2.0,
    alpha=1.0, lam=0.1, lr=0.05, swapped=0.0, steps=6, batch=4, max_length=32, max_retain_rise=1e6,
    max_other_rise=1e6, check_every=3,
)  # fmt: skip


def sae_for(layer: int = LAYER) -> Any:
    return exact_sae(layer, oblique(layer))


def chosen(lm: LanguageModel, layer: int = LAYER, k: int = K) -> Selection:
    """Features of an exact SAE; the gate opens at a fifth of the retain positions or so."""
    config = SelectConfig(k=k, percentile=60, gate_percentile=80)
    return select(lm, {layer: sae_for(layer)}, FORGET, RETAIN, config, probe=None, seed=0, progress=Progress())


def erase(lm: LanguageModel, config: SSPUConfig = CONFIG, *, selection: Selection | None = None, seed: int = 0,
          progress: Progress | None = None, forget: Corpus = FORGET, retain: Corpus = RETAIN) -> Erasure:  # fmt: skip
    s = selection or chosen(lm)
    return SSPU().unlearn(
        lm, forget, retain, config=config, selection=s, saes={s.layer: sae_for(s.layer)}, seed=seed,
        progress=progress or Progress(),
    )  # fmt: skip


def prepared(lm: LanguageModel, config: SSPUConfig = CONFIG, seed: int = 0) -> SSPURun:
    return prepare(lm, FORGET, RETAIN, config, chosen(lm), {LAYER: sae_for()}, seed)
