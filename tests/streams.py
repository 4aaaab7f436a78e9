"""Texts and their activations, computed slowly: what the tests of SAE training compare with."""

from __future__ import annotations

import torch
from conftest import SENTENCES
from torch import Tensor

from saeunlearn.corpus import Corpus, Window
from saeunlearn.models import LanguageModel

TEXTS = Corpus.of(SENTENCES, "texts")
# Texts that differ from the first letter on: no two positions have the same stream.
DISTINCT = Corpus.of([c + s[2 : 12 + 2 * i] for i, (c, s) in enumerate(zip("abcdefghijkl", SENTENCES))], "distinct")


@torch.no_grad()
def slow_positions(lm: LanguageModel, items: list[Window], layers: list[int]) -> Tensor:
    """[n, layers, d]: one window at a time, so without padding, and without the first position."""
    rows = []
    for w in items:
        streams = lm.capture(torch.tensor([list(w.ids)]), layers)
        rows.append(torch.stack([streams[i][0, 1:] for i in layers], dim=1))
    return torch.cat(rows)
