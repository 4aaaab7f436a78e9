"""Methods that return guards: calibrated on retain text, as strong as the budget allows, the model untouched."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from erasures import IDS, same, weights
from guarded import guard, hooks, random_sae
from sspu_runs import K, chosen
from toys import FORGET, RETAIN, topk_sae

from saeunlearn.corpus import Corpus, windows
from saeunlearn.erasure import Erasure
from saeunlearn.errors import Cancelled, ConfigError, NonFiniteError, OverlapError, SelectionError
from saeunlearn.features.selection import Selection
from saeunlearn.guards import Guard
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.budget import Budget
from saeunlearn.methods.guarding import STEPS, activations, applied
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

METHODS = ("clamp", "conditional", "dsg")
SETTINGS = {"clamp": {}, "conditional": {"percentile": 60.0}, "dsg": {"percentile": 60.0}}


def sparse(lm: LanguageModel) -> Selection:
    """A selection of features that are active at some positions of both texts, but not at most."""
    sae, z = topk_sae(2, k=12), []
    for r in (*FORGET, *RETAIN):
        z.append(sae.encode(stream(lm, r.text)).detach())
    density = (torch.cat(z) > 0).double().mean(0)
    relevant = density.masked_fill(density > 0.3, 0).topk(K).indices.tolist()
    return dataclasses.replace(chosen(lm), relevant=relevant)


def stream(lm: LanguageModel, text: str) -> torch.Tensor:
    """[position, d] after block 2, without the first position."""
    ids = [*([] if lm.bos_id is None else [lm.bos_id]), *lm.tokenizer(text, add_special_tokens=False).input_ids]
    return lm.capture(torch.tensor([ids]), [2])[2][0, 1:].detach()


def unlearn(lm: LanguageModel, name: str, *, forget: Corpus = FORGET, retain: Corpus = RETAIN, saes: Any = None,
            selection: Any = "", progress: Progress | None = None, **settings: Any) -> Erasure:  # fmt: skip
    method = get_method(name)
    config = method.Config(**{"strength": 4.0, "max_retain_rise": 0.2, **SETTINGS[name], **settings})
    return method.unlearn(
        lm, forget, retain, config=config, selection=sparse(lm) if selection == "" else selection,
        saes=saes or {2: topk_sae(2, k=12)}, seed=0, progress=progress or Progress(),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_the_budget_and_leave_the_model_alone(lm: LanguageModel, name: str) -> None:
    before, fingerprint, logits = weights(lm), lm.fingerprint(), lm.logits(IDS)
    selection = sparse(lm)
    erasure = unlearn(lm, name, selection=selection)
    assert same(weights(lm), before)
    assert lm.fingerprint() == fingerprint
    assert torch.equal(lm.logits(IDS), logits)
    assert hooks(lm) == 0
    assert not lm.model.training
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())

    (part,) = erasure.parts
    assert isinstance(part, Guard)
    spec, said = part.spec(), erasure.manifest["extra"]["guard"]
    assert (spec["mode"], spec["layer"], spec["features"]) == (name, 2, selection.relevant)
    assert erasure.manifest["selection"]["relevant"] == selection.relevant
    held = windows(RETAIN.split(0.2, 0)[1], lm)
    base = mean_loss(lm, held)
    with erasure.apply(lm):
        rise = mean_loss(lm, held) / base - 1
        assert mean_loss(lm, windows(FORGET, lm)) != pytest.approx(said["forget_loss_before"], rel=1e-6)
    assert rise == pytest.approx(said["retain_rise"], abs=1e-6)
    assert rise <= 0.2
    # One step of the series more would break the budget, unless this is the strongest.
    most = 4.0 * said["mean_activation"]
    step = round(2 * math.log2(most / spec["strength"]))
    assert spec["strength"] == pytest.approx(most * 2 ** (-step / 2))
    assert 0 <= step <= STEPS
    if step:
        with applied(lm, part.with_spec(strength=spec["strength"] * 2**0.5)):
            assert mean_loss(lm, held) / base - 1 > 0.2
    assert unlearn(lm, name, selection=selection).id == erasure.id
    text = json.dumps(erasure.manifest)
    assert not any(r.text[:25] in text for r in (*FORGET, *RETAIN))


def test_strength_is_relative_to_forget_activations(llama: LanguageModel) -> None:
    selection = sparse(llama)
    said = unlearn(llama, "clamp", selection=selection, max_retain_rise=1e9).manifest["extra"]["guard"]
    sae = topk_sae(2, k=12)
    values = torch.cat([sae.encode(stream(llama, r.text))[:, selection.relevant] for r in FORGET])
    assert said["mean_activation"] == pytest.approx(float(values[values > 0].mean()), rel=1e-5)
    assert said["strength"] == pytest.approx(4.0 * said["mean_activation"])


def test_gates_are_calibrated_on_retain_text(llama: LanguageModel) -> None:
    selection = sparse(llama)
    sae = topk_sae(2, k=12)
    on = [sae.encode(stream(llama, r.text))[:, selection.relevant] > 0 for r in RETAIN.split(0.2, 0)[0]]
    rates = torch.stack([x.any(-1).float().mean() for x in on])
    dsg = unlearn(llama, "dsg", selection=selection).parts[0].spec()
    assert dsg["threshold"] == pytest.approx(float(torch.quantile(rates, 0.6)), abs=1e-6)
    number = unlearn(llama, "conditional", selection=selection).parts[0].spec()["min_active"]
    counts = torch.cat(on).sum(-1)
    assert float((counts >= number).float().mean()) <= 0.4
    assert number == 1 or float((counts >= number - 1).float().mean()) > 0.4


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("clamp", {"strength": 0.0}, "strength"), ("clamp", {"strength": math.inf}, "strength"),
        ("clamp", {"max_retain_rise": 0.0}, "max_retain_rise"), ("dsg", {"max_retain_rise": math.nan}, "max_retain"),
        ("dsg", {"percentile": 100.0}, "percentile"), ("conditional", {"percentile": 0.0}, "percentile"),
        ("clamp", {"max_length": 1}, "max_length"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(llama: LanguageModel, name: str, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_method(name).check(llama, get_method(name).Config(**bad))
    with pytest.raises(ConfigError, match=said):
        unlearn(llama, name, progress=Progress(lambda _e: pytest.fail("it began")), selection=None, **bad)


def test_what_cannot_work_is_refused(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = sparse(llama)
    with pytest.raises(ConfigError, match="needs a selection"):
        unlearn(llama, "dsg", selection=None)
    with pytest.raises(OverlapError):
        unlearn(llama, "clamp", selection=selection, retain=Corpus((*RETAIN.records, FORGET.records[0])))
    with pytest.raises(SelectionError, match="layer 2"):
        unlearn(llama, "clamp", selection=selection, saes={1: topk_sae(1)})
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "measure_rises", lambda *_args: {"retain": math.inf})
        with pytest.raises(ConfigError, match="no strength"):
            unlearn(llama, "clamp", selection=selection)
    dead = topk_sae(2, k=12)
    dead.W_enc.data[:, selection.relevant] = 0
    dead.b_enc.data[selection.relevant] = -1e3
    with pytest.raises(SelectionError, match="none of the relevant"):
        unlearn(llama, "clamp", selection=selection, saes={2: dead})
    always = random_sae("standard", 2, d_sae=96)
    always.b_enc.data += 1e3
    with pytest.raises(ConfigError, match=r"at 100\.00%"):
        unlearn(llama, "conditional", selection=selection, saes={2: always}, percentile=99.0)
    with pytest.raises(ConfigError, match="changes nothing on forget text"):
        unlearn(llama, "dsg", selection=selection, saes={2: always})  # the rate is 1 everywhere, and none exceeds it
    assert hooks(llama) == 0


def test_cancelled_and_non_finite_runs_leave_no_hooks(llama: LanguageModel) -> None:
    selection = sparse(llama)
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", "strength" in e.get("what", ""))
    with pytest.raises(Cancelled):
        unlearn(llama, "clamp", selection=selection, progress=progress)
    assert hooks(llama) == 0
    with torch.no_grad():
        llama.writers([1])[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        unlearn(llama, "clamp", selection=selection)
    assert hooks(llama) == 0


def test_activations_are_those_of_every_position_but_the_first(llama: LanguageModel) -> None:
    items = windows(FORGET, llama)
    got = sorted(len(z) for z in activations(llama, guard(), items, Progress(), "z"))
    assert got == sorted(len(w.ids) - 1 for w in items)
