"""UniErase's edit: the solve, and what it protects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoints
from toys import FORGET, RETAIN

from saeunlearn.corpus import windows
from saeunlearn.errors import ConfigError, ModelError
from saeunlearn.methods import unierase as u
from saeunlearn.methods.deltas import attached, frozen
from saeunlearn.methods.nullspace import null_space, retain_covariances, solve
from saeunlearn.methods.refusal import learn_token, prompts
from saeunlearn.methods.unierase import UniErase, UniEraseConfig
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

FEW_STEPS: dict[str, Any] = {"token_steps": 4, "token_lr": 0.1, "noise_rounds": 1, "noise_steps": 1, "noise": 0.05,
                             "batch": 10, "z_steps": 25, "z_lr": 0.1, "clamp": 2.0, "cut": 0.1,
                             "max_length": 32}  # fmt: skip


def problem(seed: int = 0, d: int = 24, n: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(retain keys [d, 40] of rank 14, K [d, n], R [9, n], C_prev)."""
    g = np.random.default_rng(seed)
    retain = g.normal(size=(d, 14)) @ g.normal(size=(14, 40))
    earlier = g.normal(size=(d, 3))
    return retain, g.normal(size=(d, n)), g.normal(size=(9, n)), earlier @ earlier.T


def test_solve_is_the_published_formula() -> None:
    retain, k, r, previous = problem()
    v = null_space(torch.tensor(retain @ retain.T / 40), 1e-8)
    values, vectors = np.linalg.eigh(retain @ retain.T)
    q = vectors[:, values < 1e-8 * values.max()]
    p = q @ q.T
    assert v.shape == (24, 10)
    assert np.allclose((v @ v.T).numpy(), p, atol=1e-10)
    lam = 0.3 * np.trace(p @ (k @ k.T + previous)) / 10
    delta = np.linalg.inv(p @ (k @ k.T + previous) + lam * np.eye(24)) @ p @ k @ r.T  # Δᵀ, as printed
    ours = solve(torch.tensor(k), v, torch.tensor(previous), 0.3)
    assert np.allclose(r @ ours.numpy(), delta.T, atol=1e-9)


def test_edit_does_nothing_to_retain_keys_and_little_to_earlier_ones() -> None:
    retain, k, r, _ = problem()
    earlier = np.random.default_rng(9).normal(size=(24, 3))
    v = null_space(torch.tensor(retain @ retain.T), 1e-8)
    assert np.abs(v.T.numpy() @ retain).max() < 1e-9
    protected = r @ solve(torch.tensor(k), v, torch.tensor(1e6 * earlier @ earlier.T), 1e-13).numpy()
    plain = r @ solve(torch.tensor(k), v, torch.zeros(24, 24, dtype=torch.float64), 1e-13).numpy()
    for delta in (protected, plain):
        assert np.abs(delta @ retain).max() < 1e-9
        assert np.allclose(delta @ k, r, atol=1e-4)
    assert np.linalg.norm(protected @ earlier) < 1e-2 * np.linalg.norm(plain @ earlier)


def test_without_constraint_keys_reach_their_residual() -> None:
    _, k, r, _ = problem()
    v = null_space(torch.zeros(24, 24, dtype=torch.float64), 0.02)
    assert v.shape == (24, 24)
    x = solve(torch.tensor(k), v, torch.zeros(24, 24, dtype=torch.float64), 1e-12)
    assert np.allclose(r @ x.numpy() @ k, r, atol=1e-8)


def test_no_room_is_an_error() -> None:
    retain, _, _, previous = problem()
    full = torch.tensor(np.diag(np.linspace(1, 2, 24)))
    with pytest.raises(ConfigError, match="raise the cut"):
        null_space(full, 0.5)
    assert null_space(full, 0.9).shape[1] > 0
    v = null_space(torch.tensor(retain @ retain.T), 1e-8)
    inside = torch.tensor(retain[:, :3])
    with pytest.raises(ConfigError, match="in the span of retain"):
        solve(inside, v, torch.tensor(previous), 0.1)


def keys_of(lm: LanguageModel, ids: tuple[int, ...], block: int) -> torch.Tensor:
    """[positions, d_in], by a hook of the test's own on one text."""
    got = []
    writer = lm.writers([block])[0].module
    handle = writer.register_forward_hook(lambda m, args, out: got.append(args[0][0].double()))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([list(ids)]))
    handle.remove()
    return got[0]


def test_covariance_counts_each_position_and_the_first_ones_apart(lm: LanguageModel) -> None:
    items = windows(RETAIN, lm, 20)
    assert len({len(w.ids) for w in items}) > 1  # padding must not count
    covariances = retain_covariances(lm, items, lm.writers([0, 2]), Progress())
    for block, c in zip((0, 2), covariances):
        keys = [keys_of(lm, w.ids, block) for w in items]
        rest, first = torch.cat([k[1:] for k in keys]), torch.stack([k[0] for k in keys])
        a, b = rest.T @ rest / len(rest), first.T @ first / len(first)
        assert torch.allclose(c, a + b * a.trace() / b.trace(), atol=1e-5 * float(a.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_stream_reaches_its_target_exactly_without_constraint(checkpoints: Checkpoints, arch: str) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    config = UniEraseConfig(**FEW_STEPS, blocks=1, lam=1e-13)
    asked, writers = prompts(FORGET, lm), u.edited(lm, config)
    eye, zero = (f(writers[0].d_in, dtype=torch.float64) for f in (torch.eye, lambda n, dtype: torch.zeros(n, n)))
    part, _ = learn_token(lm, asked, writers, config, 0, Progress())
    undo = part.apply(lm)
    with frozen(lm):
        z = u.targets(lm, asked, 2, config, Progress())
        h = u.read(lm, asked, writers[0], 2, config)[2]
        deltas, keys, _ = u.edit(lm, asked, [], writers, [eye], [zero.double()], config, Progress())
        with attached(deltas):
            reached = u.read(lm, asked, writers[0], 2, config)[2]
    undo()
    assert keys[0].shape == (writers[0].d_in, len(FORGET))
    assert float((z - h).norm()) > 1.0
    assert float((z - reached).norm()) < 1e-3 * float((z - h).norm())


@pytest.mark.slow
def test_held_prompts_weigh_like_ridge_regression_says(checkpoints: Checkpoints) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    config = UniEraseConfig(**FEW_STEPS, blocks=1, lam=0.1, hold=2.0)
    asked, beside, writers = prompts(FORGET, lm), prompts(RETAIN, lm), u.edited(lm, config)
    eye, zero = (f(writers[0].d_in, dtype=torch.float64) for f in (torch.eye, lambda n, dtype: torch.zeros(n, n)))
    part, _ = learn_token(lm, asked, writers, config, 0, Progress())
    undo = part.apply(lm)
    with frozen(lm):
        z = u.targets(lm, asked, 2, config, Progress())
        k, _, h = u.read(lm, asked, writers[0], 2, config)
        held = u.read(lm, beside, writers[0], 2, config)[0]
        (free,), _, _ = u.edit(lm, asked, [], writers, [eye], [zero.double()], config, Progress())
        (delta,), _, _ = u.edit(lm, asked, beside, writers, [eye], [zero.double()], config, Progress())
    undo()
    # min ‖ΔK − R‖² + 2 (n/m) ‖ΔH‖² + λ‖Δ‖², as least squares over stacked rows
    weight = 2.0 * len(asked) / len(beside)
    lam = 0.1 * float((k.T @ k + weight * held.T @ held).trace()) / k.shape[1]
    rows = torch.cat([k, weight**0.5 * held, lam**0.5 * eye])
    goal = torch.cat([z - h, torch.zeros(len(rows) - len(k), h.shape[1], dtype=torch.float64)])
    want = torch.linalg.lstsq(rows, goal).solution.T
    torch.testing.assert_close(delta.matrix().double(), want, atol=1e-4 * float(want.abs().max()), rtol=0)
    assert float((held @ delta.matrix().detach().double().T).norm()) < 0.5 * float(
        (held @ free.matrix().detach().double().T).norm()
    )


def test_change_before_gemmas_norm_gives_the_direction_asked_for(checkpoints: Checkpoints) -> None:
    lm = LanguageModel.open(checkpoints("gemma2"), device="cpu")
    (writer,) = lm.writers([1])
    g = torch.Generator().manual_seed(0)
    y, change = (torch.randn(6, lm.d_model, generator=g).double() for _ in range(2))
    norm = lm.blocks[1].post_feedforward_layernorm.double()
    with torch.no_grad():
        wanted = norm(y) + change
        got = norm(y + u.before_norm(writer, y, change))
    assert torch.allclose(torch.cosine_similarity(got, wanted), torch.ones(6).double(), atol=1e-4)
    with torch.no_grad():
        norm.weight[3] = -1.0
    with pytest.raises(ModelError, match="gains of zero"):
        UniErase().unlearn(
            lm, FORGET, RETAIN, config=UniEraseConfig(**FEW_STEPS), selection=None, saes={}, seed=0, progress=Progress()
        )
