"""RMU: its loss and one step against a slow reference, and where it works."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from toys import FORGET, RETAIN

from saeunlearn.corpus import collate, windows
from saeunlearn.errors import ConfigError, ModelError
from saeunlearn.methods.gradient import Task
from saeunlearn.methods.rmu import RMU, RMUConfig, mean_norm
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

CONFIG = RMUConfig(layer=2, blocks=2, steps=8, batch=4, lr=0.1, check_every=4, max_retain_rise=0.2)


def stream(model: Any, lm: LanguageModel, ids: tuple[int, ...], layer: int, first: bool = False) -> torch.Tensor:
    """The input of the next block is the output of this one; the first position, or all others."""
    h = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    return h[:1] if first else h[1:]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_loss_and_step_are_those_of_the_paper(checkpoints: Any, arch: str, adaptive: bool) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    config = replace(CONFIG, adaptive=adaptive, beta=3.0, steering=7.0)
    slow = copy.deepcopy(lm.model)
    f_items, r_items = windows(FORGET, lm)[:3], windows(RETAIN, lm)[:3]
    u = torch.rand(D_MODEL, generator=torch.Generator().manual_seed(5))
    h = torch.cat([stream(slow, lm, w.ids, 2) for w in windows(FORGET, lm)])
    s = 3.0 * h.norm(dim=-1).mean().item() if adaptive else 7.0
    task = Task(lm, FORGET, RETAIN, config, 5, None, {})
    with RMU().training(task) as trained:
        g = torch.Generator().manual_seed(1)
        for p in trained.params:  # away from zero, where the retain loss has no gradient
            p.data = 0.05 * torch.randn(p.shape, generator=g)
        deltas = [p.data.clone() for p in trained.params]
        forget, kept = RMU().objective(task)(trained, collate(f_items, lm.pad_id), collate(r_items, lm.pad_id))
        ours = forget(), kept()
        (ours[0] + config.retain_weight * ours[1]).backward()
        steps = [p.detach() - 1e-3 * p.grad for p in trained.params]  # type: ignore[operator]
    originals = [torch.cat([stream(slow, lm, w.ids, 2, first) for w in r_items]).detach() for first in (False, True)]
    twin = LanguageModel(slow, lm.tokenizer)
    matrices = [w.weight for w in twin.writers([1, 2])]
    starts = [m.detach().clone() for m in matrices]
    transposed = twin.writers([1])[0].transposed
    with torch.no_grad():
        for m, d in zip(matrices, deltas):
            m.add_(d.T if transposed else d)
    h_f = torch.cat([stream(slow, lm, w.ids, 2) for w in f_items])
    h_r, bos = (torch.cat([stream(slow, lm, w.ids, 2, first) for w in r_items]) for first in (False, True))
    usual = originals[0].norm(dim=-1).mean()
    firsts = (bos - originals[1]) * (usual / originals[1].norm(dim=-1))[:, None]
    theirs = ((h_f - s * u / u.norm()) ** 2).mean(), (torch.cat([h_r - originals[0], firsts]) ** 2).mean()
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6, abs=1e-6)
    assert ours[1].item() == pytest.approx(theirs[1].item(), rel=1e-5, abs=1e-6)
    (theirs[0] + config.retain_weight * theirs[1]).backward()
    for m, start, step in zip(matrices, starts, steps):
        after = (m.detach() - 1e-3 * m.grad) - start  # type: ignore[operator]
        torch.testing.assert_close(step, after.T if transposed else after, atol=2e-6, rtol=1e-4)


def test_forget_activations_go_to_the_direction_and_only_the_writers_change(lm: LanguageModel) -> None:
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    erasure = RMU().unlearn(lm, FORGET, RETAIN, config=replace(CONFIG, max_retain_rise=5.0), selection=None,
                            saes={}, seed=0, progress=Progress())  # fmt: skip
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())
    names = [c["name"] for c in erasure.manifest["changed"]["parameters"]]
    assert names == [w.name for w in lm.writers([1, 2])]
    losses = erasure.manifest["losses"]
    assert losses[-1]["forget"] < losses[0]["forget"]
    u = torch.rand(D_MODEL, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([windows(FORGET, lm)[0].ids])
    with torch.no_grad():
        was = lm.capture(ids, [2])[2][0, 1:]
        with erasure.apply(lm):
            now = lm.capture(ids, [2])[2][0, 1:]
    assert float(((now - was) @ u).mean()) > 0


def test_the_norm_is_that_of_all_counted_positions(llama: LanguageModel) -> None:
    items = windows(FORGET, llama)
    by_hand = torch.cat([llama.capture(torch.tensor([w.ids]), [1])[1][0, 1:] for w in items]).norm(dim=-1).mean()
    assert mean_norm(llama, items, 1) == pytest.approx(by_hand.item(), rel=1e-5)


def test_bad_settings(llama: LanguageModel) -> None:
    with pytest.raises(ModelError, match="9"):
        RMU().check(llama, replace(CONFIG, layer=9))
    for name in ("blocks", "steering", "beta"):
        with pytest.raises(ConfigError, match=name):
            RMU().check(llama, replace(CONFIG, **{name: 0}))
