"""The retention budget: how much worse a held-out part of the retain set may get before a run ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..corpus import Window
from ..errors import ConfigError
from ..losses import mean_loss
from ..models import LanguageModel
from .deltas import Delta, attached

MAX_TOKENS = 20_000  # of the held-out retain text that a check reads
MAX_FACTOR = 64.0  # on the retain weight
RUINED = 1.0  # relative rise at which a run ends at once


@dataclass
class Budget:
    """Watches the relative rise of the held-out retain loss while deltas train, and finds the strength it allows.

    `check` tightens or relaxes `factor`, by which a method multiplies its retain weight; `settle` scales what was
    learned down until it is within the limit.
    """

    model: LanguageModel
    items: list[Window]
    limit: float
    base: float
    factor: float = 1.0
    spent: bool = False  # far beyond the limit: going on is pointless

    @classmethod
    def measure(cls, model: LanguageModel, items: Sequence[Window], limit: float, seed: int) -> Budget:
        """Raises ConfigError for a limit that no run could keep."""
        if limit <= 0:
            raise ConfigError(f"the retention budget is {limit}; it must be positive (0.02 allows a rise of 2 %)")
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
        """The present rise. Raises `factor` when it is beyond the limit, and lets it sink when there is room."""
        rise = self.measure_rise(deltas)
        if rise > self.limit:
            self.factor = min(self.factor * 1.5, MAX_FACTOR)
        elif rise < self.limit / 2:
            self.factor = max(self.factor / 1.25, 1.0)
        self.spent = not rise < RUINED
        return rise

    @torch.no_grad()
    def settle(self, deltas: Sequence[Delta]) -> dict[str, float]:
        """Scale the deltas in place to the strongest share (at most 1) within the limit; says what that costs."""
        scale, rise = 1.0, self.measure_rise(deltas)
        if not rise <= self.limit:
            scale, high, rise = 0.0, 1.0, 0.0
            for _ in range(7):
                middle = (scale + high) / 2
                there = self.measure_rise(deltas, middle)
                if there <= self.limit:
                    scale, rise = middle, there
                else:
                    high = middle
            for d in deltas:
                d.free.mul_(scale)
        return {"limit": self.limit, "retain_rise": rise, "retain_loss_before": self.base, "scale": scale}
