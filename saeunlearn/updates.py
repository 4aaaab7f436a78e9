"""Update rules for a forget loss and a retain loss: their sum, or the restricted gradient.

Restricted gradient (Ko et al., NeurIPS 2024, arXiv 2412.07808): each gradient keeps only what does not raise the other
loss to first order, δ_f = g_f − (g_fᵀDg_r / g_rᵀDg_r) g_r and δ_r likewise, and the step is −D(δ_f + δ_r). D is the
step size (`precondition=False`, the paper's formula) or that over the root of a running mean of squared gradients, as
in Adam. Momentum and weight decay would break the first-order property, so there are none; the authors' code projects
only where g_f·g_r < 0 and hands the result to Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import NonFiniteError

Rule = Literal["plain", "restricted"]
SECOND_MOMENT = 0.99  # decay of the running mean of squared gradients
EPSILON = 1e-8

Loss = Callable[[], Tensor]
Step = Callable[[Loss, Loss], tuple[float, float]]
"""step(forget_loss, kept): one update for the loss to lower and for the (weighted) loss of what is kept; their values.

Each is computed when it is needed and freed before the next, unless both hang on one graph (`joint`).
"""


def make_update(rule: Rule, groups: Sequence[dict[str, Any]], precondition: bool = True, joint: bool = False) -> Step:
    """The rule over parameter groups as in torch.optim: {"params": […], "lr": …}; `lr` may change between steps.

    A step raises NonFiniteError, before anything changes, where a loss is not finite.
    """
    if rule == "plain":
        return _plain(groups, joint)
    return _restricted(groups, precondition, joint)


def _plain(groups: Sequence[dict[str, Any]], joint: bool) -> Step:
    optimiser = torch.optim.AdamW(list(groups), weight_decay=0.0)

    def step(forget_loss: Loss, kept: Loss) -> tuple[float, float]:
        for mine, given in zip(optimiser.param_groups, groups):
            mine["lr"] = given["lr"]
        optimiser.zero_grad(set_to_none=True)
        if joint:
            pair = forget_loss(), kept()
            said = finite(pair[0]), finite(pair[1])
            (pair[0] + pair[1]).backward()
        else:
            said = _descend(forget_loss), _descend(kept)
        optimiser.step()
        return said

    return step


def _descend(loss: Loss) -> float:
    """Add the gradients of one loss to those of its parameters."""
    value = loss()
    said = finite(value)
    if value.requires_grad:
        value.backward()
    return said


def _restricted(groups: Sequence[dict[str, Any]], precondition: bool, joint: bool) -> Step:
    params = [p for g in groups for p in g["params"]]
    squares = [torch.zeros_like(p) for p in params]
    count = 0

    def step(forget_loss: Loss, kept: Loss) -> tuple[float, float]:
        nonlocal count
        value, g_f = _value_and_gradients(forget_loss, params, joint)
        kept_value, g_r = _value_and_gradients(kept, params, False)
        count += 1
        sizes: list[Tensor | float] = []
        rates = [g["lr"] for g in groups for _ in g["params"]]
        for rate, square, f, r in zip(rates, squares, g_f, g_r):
            if precondition:
                square.mul_(SECOND_MOMENT).add_((f + r) ** 2, alpha=1 - SECOND_MOMENT)
                sizes.append(rate / ((square / (1 - SECOND_MOMENT**count)).sqrt() + EPSILON))
            else:
                sizes.append(rate)
        with torch.no_grad():
            for p, size, d in zip(params, sizes, restricted(g_f, g_r, sizes)):
                p.sub_(size * d)
        return value, kept_value

    return step


def restricted(g_f: Sequence[Tensor], g_r: Sequence[Tensor], sizes: Sequence[Tensor | float]) -> list[Tensor]:
    """δ_f + δ_r under the metric of `sizes` (the diagonal of D, a number or a tensor a parameter).

    Where one gradient is zero there is nothing to project on, and the other stays as it is.
    """

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float((size * x * y).double().sum()) for size, x, y in zip(sizes, a, b))

    ff, rr, fr = dot(g_f, g_f), dot(g_r, g_r), dot(g_f, g_r)
    on_r = fr / rr if rr > 0 else 0.0
    on_f = fr / ff if ff > 0 else 0.0
    return [(1 - on_f) * f + (1 - on_r) * r for f, r in zip(g_f, g_r)]


def _value_and_gradients(loss: Loss, params: Sequence[Tensor], retain_graph: bool) -> tuple[float, list[Tensor]]:
    """The loss and its gradients, zeros where it does not depend on a parameter."""
    value = loss()
    said = finite(value)
    if not value.requires_grad:
        return said, [torch.zeros_like(p) for p in params]
    found = torch.autograd.grad(value, list(params), retain_graph=retain_graph, allow_unused=True)
    return said, [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def finite(loss: Tensor) -> float:
    """The loss as a number. Raises NonFiniteError for NaN or infinity."""
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss is {value}; lower lr or the strength of the forget loss")
    return value
