"""The retention budget, and the short runs that show how far it reaches at a layer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from erasures import IDS, same, weights
from sspu_runs import CONFIG, LAYER, chosen, erase, prepared, sae_for
from torch import Tensor
from toys import FORGET, RETAIN

from saeunlearn.corpus import endless, windows
from saeunlearn.errors import ConfigError
from saeunlearn.losses import mean_loss, token_losses
from saeunlearn.methods import sspu
from saeunlearn.methods.budget import Budget
from saeunlearn.methods.deltas import attached, new_deltas
from saeunlearn.methods.sspu import fit, prepare, probe_layer, read_off
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.training import TrainConfig, train

LIMIT = 0.01


def retain_rise(budget: Budget, deltas: list[Any], scale: float = 1.0) -> float:
    return budget.measure_rises(partial(attached, deltas), scale)["retain"]


def test_attached_scales_the_update(lm: LanguageModel) -> None:
    writers = lm.writers([0, 1])
    g = torch.Generator().manual_seed(0)
    deltas = new_deltas(writers, [torch.randn(32, 3, generator=g), None])
    for d in deltas:
        d.free.data = 0.05 * torch.randn(d.free.shape, generator=g)
    for scale in (0.0, 0.5, 2.0):
        with torch.no_grad(), attached(deltas, scale):
            got = lm.logits(IDS)
        originals = [w.weight.detach().clone() for w in writers]
        with torch.no_grad():
            for w, d in zip(writers, deltas):
                m = scale * d.matrix()
                w.weight.add_(m.T if w.transposed else m)
            assert torch.allclose(lm.logits(IDS), got, atol=1e-4, rtol=1e-4)
            for w, original in zip(writers, originals):
                w.weight.copy_(original)


@pytest.fixture
def trained(llama: LanguageModel) -> LanguageModel:
    """A Llama that has learnt the retain texts, so that edits make it worse (a random one may get better)."""
    rows = endless(windows(RETAIN, llama), llama.pad_id, 8, 0)
    train(llama, rows, TrainConfig(steps=40, lr=5e-3), Progress())
    return LanguageModel(llama.model, llama.tokenizer, "trained")


def test_the_budget_is_kept_on_records_that_were_not_trained_on(trained: LanguageModel) -> None:
    limit = 0.01
    erasure = erase(trained, replace(CONFIG, lr=0.3, steps=30, alpha=0.0, max_retain_rise=limit), seed=4)
    said = erasure.manifest["extra"]["budget"]
    assert erasure.manifest["losses"][-1]["retain_rise"] > limit  # the run itself overshoots
    assert 0 < said["scale"] < 1
    held = windows(RETAIN.split(0.2, 4)[1], trained, CONFIG.max_length)
    base = mean_loss(trained, held)
    with erasure.apply(trained):
        rise = mean_loss(trained, held) / base - 1
    assert rise <= limit + 1e-5
    assert math.isclose(rise, said["retain_rise"], abs_tol=1e-5)
    assert math.isclose(base, said["retain_loss_before"], rel_tol=1e-6)
    run = prepared(trained, seed=4)
    assert {w.ids for w in run.budget.watches["retain"].items} == {w.ids for w in held}
    assert not {w.ids for w in run.budget.watches["retain"].items} & {w.ids for w in run.retain}


@pytest.fixture
def watched(trained: LanguageModel) -> tuple[Budget, list[Any], Tensor]:
    """(a budget of 1 %, one dense delta, a direction in which the loss rises steadily)."""
    budget = Budget(trained)
    budget.watch("retain", windows(RETAIN, trained), LIMIT)
    deltas = new_deltas(trained.writers([1]), [None])
    direction = torch.randn(deltas[0].free.shape, generator=torch.Generator().manual_seed(1))
    return budget, deltas, direction


def test_settle_finds_the_strongest_share_within_the_budget(watched: tuple[Budget, list[Any], Tensor]) -> None:
    budget, deltas, direction = watched
    (delta,) = deltas
    delta.free.data = direction.clone()
    assert retain_rise(budget, deltas, 0.0) == 0
    edge = 1e-3
    while retain_rise(budget, deltas, edge) <= LIMIT:
        edge *= 1.5
    strong = 1.2 * edge
    delta.free.data = strong * direction
    said = budget.settle(partial(attached, deltas))
    delta.free.data *= said["scale"]
    assert 0 < said["scale"] < 1
    assert math.isclose(retain_rise(budget, deltas), said["retain_rise"], abs_tol=1e-6)
    assert said["retain_rise"] <= LIMIT
    delta.free.data = strong * direction
    assert retain_rise(budget, deltas, said["scale"] + 1 / 64) > LIMIT


def test_settle_strengthens_an_update_far_within_the_budget_by_half(
    watched: tuple[Budget, list[Any], Tensor],
) -> None:
    budget, deltas, direction = watched
    deltas[0].free.data = 1e-4 * direction
    said = budget.settle(partial(attached, deltas))
    assert said["scale"] == 1.5
    deltas[0].free.data *= 1.5
    assert math.isclose(said["retain_rise"], retain_rise(budget, deltas), abs_tol=1e-6)


def test_check_steers_the_retain_weight(watched: tuple[Budget, list[Any], Tensor]) -> None:
    budget, deltas, direction = watched
    deltas[0].free.data = direction.clone()
    assert budget.check(partial(attached, deltas))["retain"] > LIMIT
    assert budget.factor == 1.5
    deltas[0].free.data = 1e-4 * direction
    budget.check(partial(attached, deltas))
    assert budget.factor == 1.5 / 1.25
    budget.check(partial(attached, deltas))
    assert budget.factor == 1.0  # never below what the method asked for
    assert not budget.spent
    deltas[0].free.data = 1e4 * direction
    budget.check(partial(attached, deltas))
    assert budget.spent


def test_strengths_without_a_finite_loss_are_beyond_every_limit(watched: tuple[Budget, list[Any], Tensor]) -> None:
    # What a half-precision model does when its activations overflow: the run is scaled back, not lost.
    budget, deltas, direction = watched
    deltas[0].free.data = 1e-4 * direction
    deltas[0].free.data[0, 0] = 3e38  # finite, and infinite when scaled by 1.5
    assert budget.measure_rises(partial(attached, deltas), 1.5) == {"retain": math.inf}
    deltas[0].free.data[0, 0] = torch.inf
    assert budget.check(partial(attached, deltas)) == {"retain": math.inf}
    assert budget.spent
    deltas[0].free.data = direction.clone()
    deltas[0].free.data[0, 0] = 3e38
    with pytest.raises(ConfigError, match="retain"):  # not even a hundredth of it keeps the limit
        budget.settle(partial(attached, deltas))


def test_every_watched_text_keeps_its_own_limit(watched: tuple[Budget, list[Any], Tensor]) -> None:
    budget, deltas, direction = watched
    items = windows(FORGET, budget.model)
    odd = [torch.arange(len(w.ids) - 1) % 2 == 1 for w in items]
    budget.watch("nothing", items, 0.1, [torch.zeros_like(o) for o in odd])
    assert set(budget.watches) == {"retain"}
    budget.watch("other", items, 0.02, odd)
    deltas[0].free.data = direction.clone()
    rises = budget.measure_rises(partial(attached, deltas))
    with attached(deltas):
        by_hand = torch.cat([x[o] for x, o in zip(token_losses(budget.model, items), odd)]).mean()
    base = torch.cat([x[o] for x, o in zip(token_losses(budget.model, items), odd)]).mean()
    assert math.isclose(rises["other"], float(by_hand / base) - 1, abs_tol=1e-5)
    assert budget.used(rises) == max(rises["retain"] / LIMIT, rises["other"] / 0.02)
    assert budget.used({"retain": 0.0, "other": math.inf}) == math.inf
    said = budget.settle(partial(attached, deltas))
    assert said["retain_rise"] <= LIMIT
    assert said["other_rise"] <= 0.02
    assert max(said["retain_rise"] / LIMIT, said["other_rise"] / 0.02) > 0.5  # the strength that is left is used


def test_a_gated_run_watches_the_other_words_of_forget_texts(llama: LanguageModel) -> None:
    selection = chosen(llama)  # whose gate opens almost everywhere
    with torch.no_grad():
        h = torch.cat([llama.capture(torch.tensor([w.ids]), [LAYER])[LAYER][0, 1:] for w in windows(FORGET, llama)])
    middle = float(selection.gate.activity(sae_for(), h).median())
    selection = replace(selection, gate=replace(selection.gate, threshold=middle))
    config = replace(CONFIG, gated=True, max_other_rise=0.5)
    run = prepare(llama, FORGET, RETAIN, config, selection, {LAYER: sae_for()}, 0)
    watch = run.budget.watches["other"]
    assert watch.limit == 0.5
    assert {w.ids for w in watch.items} == {w.ids for w in run.forget}
    gate, sae = run.selection.gate, run.sae
    for w, counted in zip(watch.items, watch.counted or []):
        h = llama.capture(torch.tensor([w.ids]), [LAYER])[LAYER][0]
        assert counted.tolist() == [not is_open for is_open in gate.open(sae, h)[1:].tolist()]
    assert set(prepared(llama, replace(CONFIG, gated=False)).budget.watches) == {"retain"}


# --- probes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.02, 0.2),  # half way between the first two points
        (0.01, 0.1),  # the first point itself
        (0.005, 0.05),  # half way to it from (0, 0)
        (0.065, 0.55),  # half way between the last two
        (0.5, 0.8),  # never reached: the last point
    ],
)
def test_read_off_by_hand(limit: float, expected: float) -> None:
    curve = [(0.25, 0.1, 0.01), (0.5, 0.3, 0.03), (1.0, 0.8, 0.1)]
    assert math.isclose(read_off(curve, limit), expected, rel_tol=1e-12)


def test_read_off_takes_the_first_crossing() -> None:
    assert math.isclose(read_off([(1, 0.4, 0.04), (2, 9.0, 0.01)], 0.02), 0.2)
    assert math.isclose(read_off([(1, 0.1, -0.02), (2, 0.3, 0.02)], 0.01), 0.25)  # retention improved at first
    assert read_off([], 0.02) == 0.0


def test_probe_measures_the_curve_of_the_scaled_update(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sspu, "PROBE_STEPS", 4)
    monkeypatch.setattr(sspu, "PROBE_SCALES", (0.5, 1.0, 2.0))
    selection, before = chosen(llama), weights(llama)
    config = replace(CONFIG, gated=False, max_retain_rise=0.05)
    got = probe_layer(llama, FORGET, RETAIN, config, selection, {LAYER: sae_for()}, 0, Progress())
    assert same(weights(llama), before)
    assert got.layer == LAYER
    assert [s for s, _, _ in got.curve] == [0.5, 1.0, 2.0]
    assert got.forget_rise == read_off(got.curve, 0.05)
    # The same short run by hand, its weights edited in place.
    run = prepared(llama, replace(config, steps=4, check_every=4, max_retain_rise=1e6))
    fit(run, Progress())
    f, r = windows(FORGET, llama, 32), windows(RETAIN.split(0.2, 0)[1], llama, 32)
    f0, r0 = mean_loss(llama, f), mean_loss(llama, r)
    for scale, forget_rise, retain_rise in got.curve:
        with torch.no_grad():
            for d in run.deltas:
                d.writer.weight.copy_(before[d.writer.name] + scale * d.matrix())
        assert math.isclose(mean_loss(llama, f) - f0, forget_rise, abs_tol=1e-4)
        assert math.isclose(mean_loss(llama, r) / r0 - 1, retain_rise, abs_tol=1e-4)
