"""Negative clamping of SAE features at inference (Farrell et al., arXiv 2410.19278).

Wherever a relevant feature is active, z_j > 0, it is set to −strength; the SAE's error term is kept:
h' = dec(z') + (h − dec(z)). Setting it to zero instead does not unlearn, as the paper found. Ours: the strength is not
set by hand but the strongest that a retention budget allows. Positions: all but the first (BOS, or what stands in its
place) and padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..corpus import Corpus
from ..erasure import Erasure
from ..features.selection import Selection
from ..models import LanguageModel
from ..progress import Progress
from .guarding import GuardConfig, check_guard, make_guard


@dataclass(frozen=True)
class ClampConfig(GuardConfig):
    """Settings of clamp; those of all guards come first."""


class Clamp:
    """The method object; see the module's docstring."""

    name = "clamp"
    Config = ClampConfig
    needs = frozenset({"saes", "selection"})
    kind: Literal["guard"] = "guard"
    changes = "no weight: the relevant features are clamped wherever they are active"
    paper = "Farrell et al., arXiv 2410.19278; strength by a retention budget: ours"
    cost = "forward passes only: the relevant features' activations, then a few retain losses"

    def check(self, model: LanguageModel, config: ClampConfig) -> None:
        check_guard(config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: ClampConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """A guard that clamps the relevant features; the model is unchanged.

        Raises what `guarding.make_guard` raises.
        """
        return make_guard(self.name, model, forget, retain, config, selection, saes, seed, progress)
