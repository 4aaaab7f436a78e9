"""The retention budget: how much worse a held-out part of the retain set may get before a run ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..corpus import Window
from ..errors import ConfigError
from ..losses import mean_loss
from ..models import LanguageModel
from .deltas import Delta, attached

MAX_TOKENS = 20_000  # of the held-out retain text that a check reads


@dataclass
class Budget:
    """Watches the relative rise of the held-out retain loss while deltas train.

    `check` keeps the last state within the limit; once a check exceeds it, `spent` is set, and `settle` goes
    back as far as needed and no further.
    """

    model: LanguageModel
    items: list[Window]
    limit: float
    base: float
    good: list[Tensor] = field(default_factory=list)
    rise: float = 0.0  # at `good`
    spent: bool = False

    @classmethod
    def measure(cls, model: LanguageModel, items: Sequence[Window], limit: float, seed: int) -> Budget:
        """Raises ConfigError for a limit that no run could keep."""
        if limit <= 0:
            raise ConfigError(
                f"the retention budget is {limit}; it must be positive (0.02 allows a rise of 2 %)"
            )
        order = list(items)
        random.Random(seed).shuffle(order)
        chosen: list[Window] = []
        while order and sum(len(w.ids) for w in chosen) < MAX_TOKENS:
            chosen.append(order.pop())
        return cls(model, chosen, limit, mean_loss(model, chosen))

    def measure_rise(self, deltas: Sequence[Delta], scale: float = 1.0) -> float:
        """Relative rise of the held-out retain loss with the deltas attached."""
        with attached(deltas, scale):
            return mean_loss(self.model, self.items) / self.base - 1

    def check(self, deltas: Sequence[Delta]) -> float:
        """The present rise; keeps the state when it is within the budget."""
        rise = self.measure_rise(deltas)
        if rise <= self.limit:
            self.good, self.rise = [d.free.detach().clone() for d in deltas], rise
        else:
            self.spent = True
        return rise

    @torch.no_grad()
    def settle(self, deltas: Sequence[Delta]) -> dict[str, float | int]:
        """Leave the deltas at the strongest state found within the budget; returns what it costs."""
        if self.spent:
            bad = [d.free.detach().clone() for d in deltas]
            good = self.good or [torch.zeros_like(b) for b in bad]
            low, high = 0.0, 1.0
            for _ in range(6):  # between the last state within the budget and the first beyond it
                share = (low + high) / 2
                for d, a, b in zip(deltas, good, bad):
                    d.free.copy_(a + share * (b - a))
                rise = self.measure_rise(deltas)
                if rise <= self.limit:
                    low, self.rise = share, rise
                else:
                    high = share
            for d, a, b in zip(deltas, good, bad):
                d.free.copy_(a + low * (b - a))
        return {"limit": self.limit, "retain_rise": self.rise, "retain_loss_before": self.base,
                "spent": int(self.spent)}  # fmt: skip
