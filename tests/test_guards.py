"""Guards edit what the formula says and nothing else, alone, in batches and while generating."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, make, same, weights
from guarded import D_SAE, FEATURES, GATES, KINDS, LAYER, guard, random_sae, slow_edit, slow_generate
from sspu_runs import chosen, sae_for
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, collate, windows
from saeunlearn.deploy import DeployError
from saeunlearn.erasure import Erasure
from saeunlearn.errors import (
    Cancelled,
    ConfigError,
    ErasureError,
    NonFiniteError,
    OverlapError,
    SAEMismatchError,
    SelectionError,
)
from saeunlearn.guards import Guard, guard_of
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.guarding import STEPS, activations, applied
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

PROMPTS = [" ".join(s.split()[:n]) for s, n in zip(SENTENCES[:3], (2, 7, 4))]
NEW = 12  # generated tokens: with the longest prompt more than Gemma-2's window


def hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


# --- against sae_lens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_sae_lens_does(kind: str) -> None:
    sae, h = random_sae(kind), 2 * torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    expected = sae.encode(h)[..., FEATURES]
    got = guard(kind=kind).runtime.encode(h)
    assert 0.02 < float((expected > 0).float().mean()) < 0.98  # zeros and others, so that the gate matters
    assert torch.allclose(got, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(got > 0, expected > 0)


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_as_the_formula_through_sae_lens(kind: str, mode: str) -> None:
    h = 2 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    counted = torch.ones(1, 40, dtype=torch.bool)
    counted[0, 0] = False
    got, _ = guard(mode, kind).runtime.edit(h[None], counted)
    expected = slow_edit(random_sae(kind), h, mode)
    assert torch.allclose(got[0], expected, atol=1e-5, rtol=0)
    moved = (expected != h).any(-1)
    assert moved.any()
    assert not moved.all()
    assert torch.equal(got[0][~moved], h[~moved])


def test_saved_batchtopk_is_jumprelu_and_served(tmp_path: Path) -> None:
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=D_SAE, k=8))
    sae.topk_threshold.fill_(0.3)
    with pytest.raises(SAEMismatchError, match="batchtopk"):
        guard_of(sae, 0, FEATURES, strength=1.0)
    sae.save_inference_model(tmp_path)
    saved: Any = SAE.load_from_disk(tmp_path)
    h = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    got = guard_of(saved, 0, FEATURES, strength=1.0).runtime.encode(h)
    assert torch.allclose(got, saved.encode(h)[:, FEATURES], atol=1e-6)
    assert (got == 0).any()
    assert (got > 0).any()


def test_only_needed_rows_are_kept() -> None:
    sizes = {kind: guard(kind=kind).tensors()["encoder"].shape[0] for kind in ("standard", "jumprelu", "gated", "topk")}
    assert sizes == {"standard": 4, "jumprelu": 4, "gated": 4, "topk": D_SAE}
    assert all(guard(kind=k).tensors()["directions"].shape == (4, 32) for k in KINDS)


# --- on models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GATES)
@torch.no_grad()
def test_applied_seen_and_reverted_bit_for_bit(lm: LanguageModel, mode: str) -> None:
    before, logits, h = weights(lm), lm.logits(IDS), lm.capture(IDS, [LAYER])[LAYER]
    erasure = make(lm, [guard(mode)])
    expected = slow_edit(random_sae(), h[0], mode)
    with erasure.apply(lm):
        seen = lm.capture(IDS, [LAYER, LAYER + 1])
        guarded = lm.logits(IDS)
        assert torch.equal(lm.capture(IDS, [LAYER - 1])[LAYER - 1], lm.capture(IDS, [0])[0])
    assert torch.allclose(seen[LAYER][0], expected, atol=1e-5)
    assert torch.equal(seen[LAYER][:, 0], h[:, 0])  # BOS
    with lm.patch({LAYER: lambda _h: expected[None]}):
        assert torch.allclose(lm.logits(IDS), guarded, atol=1e-4)
    assert float((guarded - logits).abs().max()) > 0.01
    assert torch.equal(lm.logits(IDS), logits)
    assert same(weights(lm), before)
    assert hooks(lm) == 0
    assert erasure.manifest["changed"] == {"parameters": [], "count": 0, "share": 0.0}


@torch.no_grad()
def test_several_stack_and_survive_the_disk(llama: LanguageModel, tmp_path: Path) -> None:
    parts: Any = [guard("clamp"), guard("dsg", "topk-rescaled"), guard("conditional", "gated", layer=3)]
    first, second = make(llama, parts[:1]), None
    with first.apply(llama):
        one = llama.logits(IDS)
        second = make(llama, parts[1:])
        handle = second.apply(llama)
        both = llama.logits(IDS)
        handle.revert()
        assert torch.equal(llama.logits(IDS), one)
    assert not torch.allclose(both, one, atol=1e-3)
    for i, erasure in enumerate((first, second)):
        erasure.save(tmp_path / str(i))
    loaded = [Erasure.load(tmp_path / str(i)) for i in range(2)]
    assert [e.id for e in loaded] == [first.id, second.id]
    with loaded[0].apply(llama):
        assert torch.equal(llama.logits(IDS), one)
        with loaded[1].apply(llama):
            assert torch.equal(llama.logits(IDS), both)
    with pytest.raises(ErasureError, match="guard cannot be merged"):
        first.merge(llama.source, tmp_path / "merged")


@torch.no_grad()
def test_padding_changes_nothing(lm: LanguageModel) -> None:
    items = windows(Corpus.of([SENTENCES[0], SENTENCES[1][:20]]), lm)
    b = collate(items, lm.pad_id)
    with make(lm, [guard("dsg")]).apply(lm):
        together = lm.logits(b.ids, b.attention_mask)
        for row, w in zip(together, items):
            alone = lm.logits(torch.tensor([w.ids]))[0]
            assert torch.allclose(row[: len(w.ids)], alone, atol=1e-4)


# --- generation --------------------------------------------------------------------------------------------


def generated(lm: LanguageModel, prompts: list[str], **kwargs: Any) -> list[list[int]]:
    """Token ids that `generate` adds to left-padded prompts; nothing ends early."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    rows = [bos + lm.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[lm.pad_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    out = lm.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=lm.pad_id, **{**settings, **kwargs})
    return out[:, width:].tolist()


@pytest.mark.parametrize("mode", GATES)
def test_generation_with_a_cache_equals_the_slow_reference(lm: LanguageModel, mode: str) -> None:
    strength = 6.0
    expected = [slow_generate(lm, p, NEW, mode, strength=strength) for p in PROMPTS]
    with make(lm, [guard(mode, strength=strength)]).apply(lm):
        assert [generated(lm, [p])[0] for p in PROMPTS] == expected
        assert generated(lm, PROMPTS) == expected  # left-padded
        assert generated(lm, PROMPTS, use_cache=False) == expected
    assert generated(lm, PROMPTS) != expected


def test_the_gate_of_dsg_opens_and_closes_while_generating(lm: LanguageModel) -> None:
    # Otherwise the reference above would not tell a prefix's rate from a sequence's.
    runtime = guard("dsg").runtime
    states: list[Any] = []
    edit = runtime.edit

    def watched(h: torch.Tensor, counted: torch.Tensor, before: Any = None) -> Any:
        out = edit(h, counted, before)
        states.append((h.shape[1], bool((out[0] != h).any()), bool((runtime.encode(h) > 0).any())))
        return out

    object.__setattr__(runtime, "edit", watched)
    undo = runtime.attach(lm.model)
    for p in PROMPTS:
        generated(lm, [p])
    undo()
    single = [s for s in states if s[0] == 1]
    assert {edited for _, edited, active in single if active} == {True, False}


def test_lm_generate_and_two_guards(llama: LanguageModel) -> None:
    plain = llama.generate(PROMPTS, 8)
    with make(llama, [guard("dsg", strength=6.0), guard("clamp", layer=2)]).apply(llama):
        guarded = llama.generate(PROMPTS, 8)
        assert guarded == [llama.generate([p], 8)[0] for p in PROMPTS]
    assert guarded != plain
    assert llama.generate(PROMPTS, 8) == plain


def test_beams_are_refused_where_the_gate_has_a_memory(llama: LanguageModel) -> None:
    with make(llama, [guard("dsg")]).apply(llama), pytest.raises(DeployError, match="num_beams=1"):
        generated(llama, PROMPTS, num_beams=2)
    with make(llama, [guard("clamp", strength=6.0)]).apply(llama):  # no memory: beams are right
        assert generated(llama, PROMPTS, num_beams=2) == [generated(llama, [p], num_beams=2)[0] for p in PROMPTS]


@torch.no_grad()
def test_interleaved_and_cropped_sequences(llama: LanguageModel) -> None:
    a, b = IDS, IDS.flip(1)
    with make(llama, [guard("dsg")]).apply(llama):
        whole = [llama.logits(x)[:, -1] for x in (a, b)]
        caches = [llama.model(x[:, :5], use_cache=True).past_key_values for x in (a, b)]
        rest = [llama.model(x[:, 5:], past_key_values=c).logits[:, -1] for x, c in zip((a, b), caches)]
        for got, expected in zip(rest, whole):
            assert torch.allclose(got, expected, atol=1e-4)
        caches[0].crop(3)  # the last three positions
        again = llama.model(a[:, 5:], past_key_values=caches[0]).logits[:, -1]
        assert torch.allclose(again, whole[0], atol=1e-4)
    cache = llama.model(a[:, :5], use_cache=True).past_key_values
    with make(llama, [guard("dsg")]).apply(llama), pytest.raises(DeployError, match="did not see the beginning"):
        llama.model(a[:, 5:], past_key_values=cache)
    with make(llama, [guard("clamp")]).apply(llama), pytest.raises(DeployError, match="attention mask of shape"):
        llama.model(a, attention_mask=torch.ones(1, 1, 8, 8))


@torch.no_grad()
def test_peft_bfloat16_and_copies(checkpoints: Any) -> None:
    from peft import LoraConfig, get_peft_model

    lm = LanguageModel.open(checkpoints("llama"), device="cpu", dtype="bfloat16")
    tuned = LanguageModel(
        get_peft_model(lm.model, LoraConfig(r=2, target_modules=["down_proj"])), lm.tokenizer, "tuned"
    )
    plain = tuned.logits(IDS)
    with make(tuned, [guard("dsg")]).apply(tuned):
        guarded = tuned.logits(IDS)
        assert tuned.capture(IDS, [LAYER])[LAYER].dtype == torch.bfloat16
        twin = tuned.copy()
        tuned.generate(PROMPTS[:1], 4)
    assert float((guarded - plain).abs().max()) > 0.01
    assert torch.equal(tuned.logits(IDS), plain)
    assert torch.equal(twin.logits(IDS), guarded)  # a copy of a guarded model is guarded


# --- methods -----------------------------------------------------------------------------------------------

METHODS = ("clamp", "conditional", "dsg")
SETTINGS = {"clamp": {}, "conditional": {"percentile": 80.0}, "dsg": {"percentile": 60.0}}


def unlearn(lm: LanguageModel, name: str, *, forget: Corpus = FORGET, retain: Corpus = RETAIN, saes: Any = None,
            selection: Any = "", progress: Progress | None = None, seed: int = 0, **settings: Any) -> Erasure:  # fmt: skip
    method = get_method(name)
    config = method.Config(**{"strength": 4.0, "max_retain_rise": 0.2, **SETTINGS[name], **settings})
    return method.unlearn(
        lm, forget, retain, config=config, selection=chosen(lm) if selection == "" else selection,
        saes=saes or {2: sae_for()}, seed=seed, progress=progress or Progress(),
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_the_budget_and_leave_the_model_alone(lm: LanguageModel, name: str) -> None:
    before, fingerprint, logits = weights(lm), lm.fingerprint(), lm.logits(IDS)
    selection = chosen(lm)
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
    selection = chosen(llama)
    said = unlearn(llama, "clamp", selection=selection, max_retain_rise=1e9).manifest["extra"]["guard"]
    z = []
    for r in FORGET:
        ids = torch.tensor([[llama.bos_id, *llama.tokenizer(r.text, add_special_tokens=False).input_ids]])
        z.append(sae_for().encode(llama.capture(ids, [2])[2][0, 1:])[:, selection.relevant].detach())
    values = torch.cat(z)
    assert said["mean_activation"] == pytest.approx(float(values[values > 0].mean()), rel=1e-5)
    assert said["strength"] == pytest.approx(4.0 * said["mean_activation"])


def test_gates_are_calibrated_on_retain_text(llama: LanguageModel) -> None:
    selection = chosen(llama)
    rest, sae = RETAIN.split(0.2, 0)[0], sae_for()
    on = []
    for r in rest:
        ids = torch.tensor([[llama.bos_id, *llama.tokenizer(r.text, add_special_tokens=False).input_ids]])
        on.append((sae.encode(llama.capture(ids, [2])[2][0, 1:])[:, selection.relevant] > 0).detach())
    rates = torch.stack([x.any(-1).float().mean() for x in on])
    dsg = unlearn(llama, "dsg", selection=selection).parts[0].spec()
    assert dsg["threshold"] == pytest.approx(float(torch.quantile(rates, 0.6)), abs=1e-6)
    number = unlearn(llama, "conditional", selection=selection).parts[0].spec()["min_active"]
    counts = torch.cat(on).sum(-1)
    assert float((counts >= number).float().mean()) <= 0.2
    assert number == 1 or float((counts >= number - 1).float().mean()) > 0.2


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


def test_what_cannot_work_is_refused(llama: LanguageModel) -> None:
    selection = chosen(llama)
    with pytest.raises(ConfigError, match="needs a selection"):
        unlearn(llama, "dsg", selection=None)
    with pytest.raises(OverlapError):
        unlearn(llama, "clamp", selection=selection, retain=Corpus((*RETAIN.records, FORGET.records[0])))
    with pytest.raises(SelectionError, match="layer 2"):
        unlearn(llama, "clamp", selection=selection, saes={1: sae_for(1)})
    with pytest.raises(ConfigError, match="no strength"):
        unlearn(llama, "clamp", selection=selection, max_retain_rise=1e-9, strength=1e4)
    dead = sae_for()
    dead.W_enc.data[:, selection.relevant] = 0
    dead.b_enc.data[selection.relevant] = -1
    with pytest.raises(SelectionError, match="none of the relevant"):
        unlearn(llama, "clamp", selection=selection, saes={2: dead})
    always = random_sae("standard", 2)
    always.b_enc.data += 1e3
    with pytest.raises(ConfigError, match="at 100.00%"):
        unlearn(llama, "conditional", selection=selection, saes={2: always}, percentile=99.0)
    with pytest.raises(ConfigError, match="changes nothing on forget text"):
        unlearn(llama, "dsg", selection=selection, saes={2: always})  # the rate is 1 everywhere, and none exceeds it
    assert hooks(llama) == 0


def test_cancelled_and_non_finite_runs_leave_no_hooks(llama: LanguageModel) -> None:
    selection = chosen(llama)
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", "strength" in e.get("what", ""))
    with pytest.raises(Cancelled):
        unlearn(llama, "clamp", selection=selection, progress=progress)
    assert hooks(llama) == 0
    with torch.no_grad():
        llama.writers([1])[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        unlearn(llama, "clamp", selection=selection)
    assert hooks(llama) == 0


@pytest.mark.parametrize("changes", [{"normalize_activations": "layer_norm"},
                                     {"normalize_activations": "constant_norm_rescale"}], ids=str)  # fmt: skip
def test_saes_that_rescale_at_run_time_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SAEMismatchError, match="at run time"):
        guard_of(random_sae("standard", **changes), LAYER, FEATURES, strength=1.0)


def test_unfit_guards_are_refused(llama: LanguageModel) -> None:
    for features in ([], [D_SAE], [1, 1], [-1]):
        with pytest.raises(SAEMismatchError, match="distinct features"):
            guard_of(random_sae(), LAYER, features, strength=1.0)
    with pytest.raises(ErasureError, match="4 blocks of width 32"):
        make(llama, [guard(layer=4)])
    with pytest.raises(ErasureError, match="of width 16"):
        make(llama, [guard_of(random_sae(d_in=16), LAYER, FEATURES, strength=1.0)])
    part = guard("dsg")
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"mode": "melt"}, {}), ({"encoder": "abs"}, {}), ({"threshold": None}, {}), ({"strength": math.nan}, {}),
        ({"layer": 1.5}, {}), ({"features": [1, 2]}, {}), ({"features": []}, {}), ({"encoder": "topk"}, {}),
        ({}, {"bias": torch.zeros(3)}), ({}, {"other": torch.zeros(3)}), ({}, {"directions": torch.zeros(4, 31)}),
    ]  # fmt: skip
    for spec, tensors in wrong:
        with pytest.raises(ErasureError):
            Guard.from_payload({**part.spec(), **spec}, {**part.tensors(), **tensors})
    topk = guard(kind="topk")
    for k in (0, D_SAE + 1):
        with pytest.raises(ErasureError, match="k between"):
            Guard.from_payload({**topk.spec(), "k": k}, topk.tensors())


def test_activations_are_those_of_every_position_but_the_first(llama: LanguageModel) -> None:
    items = windows(FORGET, llama)
    got = sorted(len(z) for z in activations(llama, guard(), items, Progress(), "z"))
    assert got == sorted(len(w.ids) - 1 for w in items)
    assert replace(items[0], record=3).ids == items[0].ids
