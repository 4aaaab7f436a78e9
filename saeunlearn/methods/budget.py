"""The retention budget: how much worse a held-out part of the retain set may get before a run ends.

An edit under a budget is a function: `edit(scale)` is a context within which the model computes with that share of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..corpus import Window
from ..errors import ConfigError, NonFiniteError
from ..losses import mean_loss, token_losses
from ..models import LanguageModel

Edit = Callable[[float], AbstractContextManager[object]]

MAX_TOKENS = 10_000  # of each text that a check reads
MAX_FACTOR = 64.0  # on the retain weight
MAX_SCALE = 1.5  # of what was learned, where an edit may be made stronger
RUINED = 1.0  # relative rise at which a run ends at once


class OverBudgetError(ConfigError):
    """No strength of an edit keeps the limits."""


@dataclass(frozen=True)
class Watch:
    """Text whose loss may rise by `limit` (relative to `base`, nats a token).

    `counted`: which tokens of each window, aligned to `window.ids[1:]`; None: all.
    """

    items: list[Window]
    counted: list[Tensor] | None
    limit: float
    base: float


@dataclass
class Budget:
    """Watches relative rises of losses while an edit is trained, and finds the strength that they allow.

    `check` tightens or relaxes `factor`, by which a method multiplies its retain weight; `settle` finds the scale
    that the limits allow. `watches` holds "retain" and maybe others.
    """

    model: LanguageModel
    watches: dict[str, Watch] = field(default_factory=dict)
    factor: float = 1.0
    spent: bool = False  # far beyond a limit: going on is pointless

    def watch(self, name: str, items: list[Window], limit: float, counted: list[Tensor] | None = None) -> None:
        """Watch a text, unless there is nothing in it to count. Raises ConfigError for a limit that none can keep."""
        if not limit > 0:
            raise ConfigError(f"the limit on the rise of the {name} loss is {limit}; use a positive one (0.02: 2 %)")
        if counted is None or any(bool(c.any()) for c in counted):
            self.watches[name] = Watch(items, counted, limit, _loss(self.model, items, counted))

    def measure_rises(self, edit: Edit, scale: float = 1.0) -> dict[str, float]:
        """Relative rise of each watched loss with that share of the edit; infinite where a loss is not finite."""
        rises = {}
        with edit(scale):
            for name, w in self.watches.items():
                try:
                    rises[name] = _loss(self.model, w.items, w.counted) / w.base - 1
                except NonFiniteError:
                    rises[name] = math.inf
        return rises

    def used(self, rises: dict[str, float]) -> float:
        """The largest rise as a share of its limit."""
        return max(rises[n] / w.limit for n, w in self.watches.items())

    def check(self, edit: Edit) -> dict[str, float]:
        """The present rises. Raises `factor` when one is beyond its limit, and lets it sink when there is room."""
        rises = self.measure_rises(edit)
        if self.used(rises) > 1:
            self.factor = min(self.factor * 1.5, MAX_FACTOR)
        elif self.used(rises) < 0.5:
            self.factor = max(self.factor / 1.25, 1.0)
        self.spent = not max(rises.values()) < RUINED
        return rises

    def settle(self, edit: Edit, most: float = MAX_SCALE) -> dict[str, float]:
        """The largest `scale` (at most `most`) within all limits, and what it costs.

        Raises OverBudgetError where not even a hundredth of the edit keeps the limits.
        """
        scale, rises = most, self.measure_rises(edit, most)
        if not self.used(rises) <= 1:
            scale, high, rises = 0.0, most, dict.fromkeys(self.watches, 0.0)
            for _ in range(7):
                middle = (scale + high) / 2
                there = self.measure_rises(edit, middle)
                if self.used(there) <= 1:
                    scale, rises = middle, there
                else:
                    high = middle
            if scale == 0:
                limits = ", ".join(f"{n} {w.limit:.2%}" for n, w in self.watches.items())
                raise OverBudgetError(
                    f"no strength of this edit keeps the limits ({limits}): raise them, or lower lr where there is one"
                )
        said = {"scale": scale}
        for name, w in self.watches.items():
            said |= {f"{name}_limit": w.limit, f"{name}_rise": rises[name], f"{name}_loss_before": w.base}
        return said


def some(items: Sequence[Window], seed: int) -> list[Window]:
    """Windows drawn at random until MAX_TOKENS are reached."""
    order = list(items)
    random.Random(seed).shuffle(order)
    chosen: list[Window] = []
    while order and sum(len(w.ids) for w in chosen) < MAX_TOKENS:
        chosen.append(order.pop())
    return chosen


def _loss(model: LanguageModel, items: list[Window], counted: list[Tensor] | None) -> float:
    if counted is None:
        return mean_loss(model, items)
    return float(torch.cat([x[c] for x, c in zip(token_losses(model, items), counted)]).double().mean())
