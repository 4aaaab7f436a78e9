"""DSG: dynamic SAE guardrails (Muhamed et al., arXiv 2504.08192).

A sequence's rate is the share of its tokens with any relevant feature active. Above the 95th percentile of the rates of
retain sequences the guard acts: wherever a relevant feature is active, all of them are set to −strength (as the
authors' code does it; the SAE's error term is kept). Ours: the gate is causal, so at each position it reads the prefix
up to there only and generation with a cache gives what one pass over the whole text would (short prefixes have noisier
rates than the whole sequences that the threshold comes from); the strength is the strongest that a retention budget
allows. The paper ranks features by squared activations, as the selection here does. Positions: all but the first and
padding; neither is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..corpus import Corpus, Window
from ..erasure import Erasure
from ..features.selection import Selection
from ..guards import Guard
from ..models import LanguageModel
from ..progress import Progress
from .guarding import GuardConfig, activations, check_guard, make_guard


@dataclass(frozen=True)
class DSGConfig(GuardConfig):
    """Settings of dsg; those of all guards come first."""

    percentile: float = 95.0  # of retain sequences' rates, above which the guard acts (paper: 95)


class DSG:
    """The method object; see the module's docstring."""

    name = "dsg"
    Config = DSGConfig
    needs = frozenset({"saes", "selection"})
    kind: Literal["guard"] = "guard"
    changes = "no weight: the relevant features are clamped in sequences where they are active often"
    paper = "Muhamed et al., COLM 2025, arXiv 2504.08192; causal gate, strength by a retention budget: ours"
    cost = "forward passes only: activations on forget and retain text, then a few retain losses"

    def check(self, model: LanguageModel, config: DSGConfig) -> None:
        check_guard(config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: DSGConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """A guard with its threshold calibrated on retain text; the model is unchanged.

        Raises what `guarding.make_guard` raises.
        """

        def calibrate(guard: Guard, items: Sequence[Window], progress: Progress) -> dict[str, float]:
            rates = sequence_rates(guard, model, items, progress)
            return {"threshold": float(torch.quantile(rates, config.percentile / 100))}

        return make_guard(self.name, model, forget, retain, config, selection, saes, seed, progress, calibrate)


def sequence_rates(guard: Guard, model: LanguageModel, items: Sequence[Window], progress: Progress) -> Tensor:
    """Share of the positions of each window with any feature of the guard active, [windows]."""
    seen = activations(model, guard, items, progress, "activations on retain text")
    return torch.stack([(z > 0).any(-1).float().mean() for z in seen])
