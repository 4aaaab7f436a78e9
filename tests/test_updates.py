"""The restricted gradient: to first order neither loss rises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeunlearn.errors import NonFiniteError
from saeunlearn.updates import EPSILON, SECOND_MOMENT, make_update, restricted


def quadratics(seed: int, n: int) -> tuple[list[Tensor], list[Tensor], nn.Parameter]:
    """Two convex quadratics ½(x − a)ᵀH(x − a): their H, their a, and a point."""
    g = torch.Generator().manual_seed(seed)
    roots = [torch.randn(n, n, generator=g, dtype=torch.float64) for _ in range(2)]
    centres = [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2)]
    return [r @ r.T for r in roots], centres, nn.Parameter(torch.randn(n, generator=g, dtype=torch.float64))


def loss(h: Tensor, a: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (x - a) @ h @ (x - a)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0.1, 10))
def test_a_small_plain_step_raises_neither_loss(seed: int, n: int, weight: float) -> None:
    hs, centres, x = quadratics(seed, n)
    g_f, g_r = hs[0] @ (x.detach() - centres[0]), weight * hs[1] @ (x.detach() - centres[1])
    step = restricted([g_f], [g_r], [1.0])[0]
    # A quadratic changes by −η gᵀδ + η²/2 δᵀHδ: the largest η at which neither rises, exactly.
    bounds = [2 * float(g @ step) / float(step @ h @ step) for g, h in ((g_f, hs[0]), (g_r / weight, hs[1]))]
    before = [loss(h, a, x).item() for h, a in zip(hs, centres)]
    update = make_update("restricted", [{"params": [x], "lr": 0.9 * min(bounds)}], precondition=False)
    said = update(lambda: loss(hs[0], centres[0], x), lambda: weight * loss(hs[1], centres[1], x))
    after = [loss(h, a, x).item() for h, a in zip(hs, centres)]
    assert said == pytest.approx((before[0], weight * before[1]))
    assert all(now < was for now, was in zip(after, before))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_the_step_is_blind_to_the_other_loss_under_the_metric(seed: int, precondition: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    g_f, g_r = ([torch.randn(3, 2, generator=g), torch.randn(4, generator=g)] for _ in range(2))
    sizes: list[Any] = [0.5, 2.0]
    if precondition:
        sizes = [0.1 + torch.rand(3, 2, generator=g), 0.1 + torch.rand(4, generator=g)]

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((s * x * y).sum()) for s, x, y in zip(sizes, a, b))

    only_f = [a - dot(g_f, g_r) / dot(g_r, g_r) * b for a, b in zip(g_f, g_r)]  # δ_f as the paper writes it
    only_r = [b - dot(g_f, g_r) / dot(g_f, g_f) * a for a, b in zip(g_f, g_r)]
    for got, a, b in zip(restricted(g_f, g_r, sizes), only_f, only_r):
        torch.testing.assert_close(got, a + b, atol=1e-5, rtol=1e-4)
    assert abs(dot(only_f, g_r)) < 1e-4
    assert abs(dot(only_r, g_f)) < 1e-4


def test_a_zero_gradient_is_not_projected_on() -> None:
    g, zero = [torch.tensor([1.0, -2.0])], [torch.zeros(2)]
    assert torch.equal(restricted(g, zero, [1.0])[0], g[0])
    assert torch.equal(restricted(zero, g, [1.0])[0], g[0])
    assert torch.equal(restricted(zero, zero, [1.0])[0], zero[0])


def test_the_preconditioner_is_a_running_mean_of_squares() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))
    update = make_update("restricted", [{"params": [x], "lr": 0.1}])
    slow, mean = x.detach().clone(), torch.zeros(3)
    a, b = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.3, 2.0, 1.0])
    for n in range(1, 4):
        g_f, g_r = 2 * slow * a, b.clone()
        update(lambda: (a * x.pow(2)).sum(), lambda: (b * x).sum())
        mean = SECOND_MOMENT * mean + (1 - SECOND_MOMENT) * (g_f + g_r) ** 2
        d = 0.1 / ((mean / (1 - SECOND_MOMENT**n)).sqrt() + EPSILON)
        d_f = g_f - (g_f * d * g_r).sum() / (g_r * d * g_r).sum() * g_r
        d_r = g_r - (g_f * d * g_r).sum() / (g_f * d * g_f).sum() * g_f
        slow = slow - d * (d_f + d_r)
        torch.testing.assert_close(x.detach(), slow)


@pytest.mark.parametrize("joint", [False, True])
def test_the_plain_rule_is_adamw_on_the_sum(joint: bool) -> None:
    torch.manual_seed(0)
    x, y = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    twins = [nn.Parameter(p.detach().clone()) for p in (x, y)]
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.01}]
    update = make_update("plain", groups, joint=joint)
    peer = torch.optim.AdamW([{"params": [t], "lr": g["lr"]} for t, g in zip(twins, groups)], weight_decay=0.0)
    for factor in (1.0, 0.5, 0.1):
        groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.1 * factor
        update(lambda: x.pow(2).sum() + y.sum(), lambda: (x - 1).abs().sum())
        peer.zero_grad()
        (twins[0].pow(2).sum() + twins[1].sum() + (twins[0] - 1).abs().sum()).backward()
        peer.step()
        torch.testing.assert_close([x, y], twins)


@pytest.mark.parametrize("rule", ["plain", "restricted"])
def test_nothing_changes_where_a_loss_is_not_finite(rule: Any) -> None:
    x = nn.Parameter(torch.tensor([1.0]))
    update = make_update(rule, [{"params": [x], "lr": 0.1}])
    with pytest.raises(NonFiniteError, match="nan"):
        update(lambda: x.sum(), lambda: (x * torch.nan).sum())
    assert float(x) == 1.0
    update(lambda: x.sum(), lambda: torch.zeros(()))  # a method without a retain loss
    assert float(x) < 1.0
