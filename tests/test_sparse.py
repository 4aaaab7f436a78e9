"""The sparse step against the dense one: values, gradients, updates, on both implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_training.config import SAEConfig
from sae_training.processes import Processes
from sae_training.sparse import Active, CPUOps, TorchOps, adam
from sae_training.topk import SparseSAE
from sae_training.workers import Workers

SHAPES = [(37, 16, 70, 5), (64, 32, 256, 8), (5, 8, 12, 3), (130, 24, 40, 40), (3, 4, 7, 1)]  # n, d, m, k


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(3) as w:
        yield w


@pytest.fixture(params=["cpu", "torch"])
def ops(request: pytest.FixtureRequest, workers: Workers) -> Any:
    return CPUOps(workers) if request.param == "cpu" else TorchOps()


@pytest.fixture(params=["cpu", "torch"])
def narrow(request: pytest.FixtureRequest, workers: Workers) -> Any:
    return CPUOps(workers, torch.bfloat16) if request.param == "cpu" else TorchOps(torch.bfloat16)


def drawn(n: int, d: int, m: int, seed: int = 0) -> tuple[Tensor, ...]:
    """x [n, d], w_enc [m, d], b_enc [m], w_dec [m, d], b_dec [d]"""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (m,), (m, d), (d,))
    return tuple(torch.randn(s, generator=g) * (1 if i == 0 else d**-0.5) for i, s in enumerate(shapes))


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= tolerance * float(expected.norm()) + 1e-7


def dense_top_k(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    values, index = torch.relu(x @ w_enc.T + b_enc).topk(k, dim=-1)
    return torch.zeros(len(x), len(w_enc)).scatter(-1, index, values)


@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_is_that_of_pytorch(ops: Any, shape: tuple[int, ...]) -> None:
    n, d, m, k = shape
    x, w_enc, b_enc, *_ = drawn(n, d, m)
    a = ops.top_k(x, w_enc, b_enc, k)
    assert_near(a.dense(m), dense_top_k(x, w_enc, b_enc, k))
    assert int(a.ptr.diff().max()) <= k
    assert float(a.z.min()) > 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(1, 400), k=st.integers(1, 60), spread=st.floats(0, 3)
)
def test_top_k_of_rows_of_any_kind(workers: Workers, seed: int, n: int, m: int, k: int, spread: float) -> None:
    # Rows of very different sizes defeat the guess that a row resembles the one before; rounded values have ties.
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g) * torch.exp(spread * torch.randn(n, 1, generator=g))
    w = (torch.randn(m, 3, generator=g) * 2).round() / 2
    k = min(k, m)
    a = CPUOps(workers).top_k(x, w, torch.zeros(m), k)
    expected = torch.relu(x @ w.T).topk(k, dim=-1)[0]
    got = torch.zeros(n, k)
    for i in range(n):
        z = a.z[a.ptr[i] : a.ptr[i + 1]].sort(descending=True)[0]
        got[i, : len(z)] = z
        assert len(set(a.idx[a.ptr[i] : a.ptr[i + 1]].tolist())) == len(z)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.5, 50.0])
def test_above_finds_everything_above(ops: Any, floor: float) -> None:
    x, w_enc, b_enc, *_ = drawn(40, 16, 333)
    pre = x @ w_enc.T + b_enc
    assert_near(ops.above(x, w_enc, b_enc, floor).dense(333), torch.where(pre > floor, pre, 0))


def test_a_narrow_encoder_only_selects(narrow: Any) -> None:
    x, w_enc, b_enc, *_ = drawn(64, 32, 256)
    a = narrow.top_k(x, w_enc, b_enc, 8)
    pre = torch.relu(x @ w_enc.T + b_enc)
    mine = a.dense(256)
    assert_near(mine[mine > 0], pre[mine > 0])  # values are those of float32
    kth = pre.topk(8, dim=-1)[0][:, -1:]
    assert float((kth - torch.where(mine > 0, mine, 9e9).min(-1, keepdim=True)[0]).max()) < 0.05
    assert float(mine.sum() / dense_top_k(x, w_enc, b_enc, 8).sum()) > 0.99
    above = narrow.above(x, w_enc, b_enc, 0.5).dense(256)
    assert bool((above[pre > 0.52] > 0).all())


@pytest.mark.parametrize("bounds", [[256], [32, 64, 128, 256], [1, 255, 256]])
@pytest.mark.parametrize("aim", ["x", "other"])
def test_gradients_are_those_of_the_dense_form(ops: Any, bounds: list[int], aim: str) -> None:
    x, w_enc, b_enc, w_dec, b_dec = drawn(50, 16, 256)
    target = x if aim == "x" else drawn(50, 16, 1, seed=9)[0]
    a = ops.top_k(x, w_enc, b_enc, 12)
    leaves = [t.clone().requires_grad_() for t in (w_enc, w_dec, b_enc, b_dec)]
    z = torch.relu(x @ leaves[0].T + leaves[2]) * (a.dense(256) > 0)
    z.retain_grad()
    errors = [z[:, :b] @ leaves[1][:b] + leaves[3] - target for b in bounds]
    (0.7 / 2 * sum(e.pow(2).sum() for e in errors)).backward()
    r, dz, sse = ops.reconstruct(target, a, w_dec, b_dec, bounds, 0.7)
    g_enc, g_dec, g_b = ops.gradients(x, r, a, dz, bounds)
    for got, leaf in zip((g_enc, g_dec, g_b, r[0].sum(0)), leaves):
        assert_near(got, leaf.grad)
    assert_near(sse, torch.stack([e.detach().double().pow(2).sum() for e in errors]))
    assert_near(Active(a.ptr, a.idx, dz).dense(256), z.grad * (a.dense(256) > 0))


def test_unit_form_and_its_chain_rule(ops: Any) -> None:
    x, w_enc, b_enc, w_dec, _ = drawn(20, 16, 70)
    leaves = [t.clone().requires_grad_() for t in (w_enc, b_enc, w_dec)]
    n = leaves[2].norm(dim=-1, keepdim=True)
    form = (n * leaves[0], n.flatten() * leaves[1], leaves[2] / n)
    got = ops.unit_form(w_enc, b_enc, w_dec)
    for a, b in zip(got, form):
        assert_near(a, b.detach())
    z = torch.relu(x @ w_enc.T + b_enc)
    assert_near(torch.relu(x @ got[0].T + got[1]) @ got[2], z @ w_dec)  # the same reconstruction
    grads = [drawn(*f.shape, 1)[0] if f.dim() > 1 else drawn(1, len(f), 1)[0][0] for f in form]
    torch.autograd.backward(form, grads)
    given = [g.clone() for g in grads]
    square = ops.chain(w_enc, b_enc, w_dec, *given)
    for a, leaf in zip(given, leaves):
        assert_near(a, leaf.grad)
    assert abs(square - sum(float(leaf.grad.pow(2).sum()) for leaf in leaves)) < 1e-4 * square


@pytest.mark.parametrize("shape", [(7, 5), (9,)])
def test_adam_is_that_of_pytorch(ops: Any, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=g)
    theirs = torch.nn.Parameter(p.clone())
    optimiser = torch.optim.Adam([theirs], lr=0.01)
    m, v, alone = torch.zeros(shape), torch.zeros(shape), [p.clone(), torch.zeros(shape), torch.zeros(shape)]
    for step in range(1, 12):
        grad = torch.randn(shape, generator=g)
        theirs.grad = grad * 0.3
        optimiser.step()
        ops.adam(p, grad.clone(), m, v, 0.01, step, 0.3)
        adam(alone[0], grad.clone(), alone[1], alone[2], 0.01, step, 0.3)
    assert_near(p, theirs.detach())
    assert_near(alone[0], theirs.detach())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_a_step_is_that_of_sae_lens(ops: Any, architecture: str) -> None:
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    d, m, k = 16, 64, 6
    config = SAEConfig(architecture=architecture, expansion=m // d, k=k, aux=0.0)
    ours = SparseSAE(config, d, torch.device("cpu"), ops, Processes(), seed=3)
    g = torch.Generator().manual_seed(1)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        ours.state[name] += 0.1 * torch.randn(ours.state[name].shape, generator=g)
    name = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}[architecture]
    extra = {"matryoshka_widths": ours.bounds} if architecture == "matryoshka" else {}
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d, d_sae=m, k=k, apply_b_dec_to_input=True, **extra)
    )
    s = ours.state
    theirs.load_state_dict(
        {"W_enc": s["w_enc"].T.contiguous(), "b_enc": s["b_enc"], "W_dec": s["w_dec"], "b_dec": s["b_dec"]},
        strict=False,
    )
    optimiser = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for step in range(4):
        x = torch.randn(48, d, generator=g) * 3
        out = theirs.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=step, is_logging_step=False
            )
        )
        optimiser.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
        mse, active = ours.step(x, 48, 0.01)
        assert abs(mse - out.losses["mse_loss"].item()) < 1e-4 * mse
        assert active == float((out.feature_acts > 0).sum()) / 48
    assert_near(s["w_enc"].T, theirs.W_enc.detach(), 1e-4)
    assert_near(s["w_dec"], theirs.W_dec.detach(), 1e-4)
    assert_near(s["b_enc"], theirs.b_enc.detach(), 1e-3)
    assert_near(s["b_dec"], theirs.b_dec.detach(), 1e-4)


def test_the_number_of_threads_does_not_change_the_result() -> None:
    x, w_enc, b_enc, w_dec, b_dec = drawn(50, 16, 256)
    results = []
    for count in (1, 4):
        with Workers(count) as w:
            ops = CPUOps(w)
            a = ops.top_k(x, w_enc, b_enc, 12)
            r, dz, _ = ops.reconstruct(x, a, w_dec, b_dec, [256], 0.7)
            results.append((a.idx, a.z, r, dz, *ops.gradients(x, r, a, dz, [256])))
    for one, four in zip(*results):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_dead_features_learn_what_the_others_leave(ops: Any) -> None:
    d = 16
    config = SAEConfig(expansion=4, k=2, aux=1.0, dead_after=100)
    sae = SparseSAE(config, d, torch.device("cpu"), ops, Processes(), seed=0)
    sae.state["silent"][:20] = 1e6
    sae.state["w_enc"][:20] *= 1e-3  # too weak to be among the strongest
    sae.state["w_enc"][20:] *= 10
    before = {n: sae.state[n].clone() for n in ("w_enc", "w_dec")}
    x = drawn(64, d, 1)[0]
    sae.step(x, 64, 0.01)
    for n in before:
        assert bool(((sae.state[n] - before[n])[:20].norm(dim=-1) > 0).all())
    without = SparseSAE(SAEConfig(expansion=4, k=2, aux=0.0), d, torch.device("cpu"), ops, Processes(), seed=0)
    without.state |= {n: before[n].clone() for n in before}
    without.step(x, 64, 0.01)
    silent = without.state["silent"] > 0
    assert bool((without.state["w_dec"] - before["w_dec"])[silent].abs().max() == 0)


def test_errors_in_a_thread_reach_the_caller() -> None:
    def fail(_: int, first: int, last: int) -> None:
        raise ValueError(f"{first}-{last}")

    threads = torch.get_num_threads()
    with Workers(2) as w, pytest.raises(ValueError, match="0-5"):
        w.share(10, fail)
    assert torch.get_num_threads() == threads
