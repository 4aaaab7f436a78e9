"""Conditional clamping of SAE features (Khoriaty et al., arXiv 2503.11127), the paper's "clamp prime" as we read it.

Relevant features are set to −strength where they are active, but only at flagged positions: those at which at least
`min_active` of them are active at once. `min_active` is the smallest number that the given percentile of retain
positions does not reach (ours). Strength: by a retention budget, as in `clamp`. Positions: all but the first and
padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..corpus import Corpus, Window
from ..erasure import Erasure
from ..errors import ConfigError
from ..features.selection import Selection
from ..guards import Guard
from ..models import LanguageModel
from ..progress import Progress
from .guarding import GuardConfig, activations, check_guard, make_guard


@dataclass(frozen=True)
class ConditionalConfig(GuardConfig):
    """Settings of conditional; those of all guards come first."""

    percentile: float = 99.0  # of retain positions that are not to be flagged (paper: a threshold set by hand)


class Conditional:
    """The method object; see the module's docstring."""

    name = "conditional"
    Config = ConditionalConfig
    needs = frozenset({"saes", "selection"})
    kind: Literal["guard"] = "guard"
    changes = "no weight: the relevant features are clamped where several of them are active at once"
    paper = "Khoriaty et al., arXiv 2503.11127; threshold and strength by retain text: ours"
    cost = "forward passes only: activations on forget and retain text, then a few retain losses"

    def check(self, model: LanguageModel, config: ConditionalConfig) -> None:
        check_guard(config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: ConditionalConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """A guard with its threshold calibrated on retain text; the model is unchanged.

        Raises what `guarding.make_guard` raises.
        """

        def calibrate(guard: Guard, items: Sequence[Window], progress: Progress) -> dict[str, float]:
            return {"min_active": flagging_number(guard, model, items, config.percentile, progress)}

        return make_guard(self.name, model, forget, retain, config, selection, saes, seed, progress, calibrate)


def flagging_number(guard: Guard, model: LanguageModel, items: Sequence[Window], percentile: float,
                    progress: Progress) -> int:  # fmt: skip
    """The smallest number (≥ 1) of active features that at most (100 − percentile) % of the positions reach.

    Raises ConfigError where more positions than that have all features active.
    """
    n = len(guard.runtime.spec["features"])
    found = torch.zeros(n + 1, dtype=torch.long)  # positions by number of active features
    for z in activations(model, guard, items, progress, "activations on retain text"):
        found += torch.bincount((z > 0).sum(-1), minlength=n + 1)
    for number in range(1, n + 1):
        if float(found[number:].sum() / found.sum()) <= 1 - percentile / 100:
            return number
    raise ConfigError(
        f"all {n} relevant features are active at {float(found[n] / found.sum()):.2%} of the retain positions, more "
        f"than the {100 - percentile:g} % that may be flagged: lower percentile, or choose other features"
    )
