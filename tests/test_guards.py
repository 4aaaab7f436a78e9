"""Guards edit what the formula says and nothing else, alone, in batches and while generating."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, make, same, weights
from guarded import (
    D_SAE,
    FEATURES,
    GATES,
    KINDS,
    LAYER,
    NEW,
    PROMPTS,
    fitted_sae,
    generated,
    guard,
    hooks,
    random_sae,
    slow_edit,
    slow_generate,
)

from saeunlearn.corpus import Corpus, collate, windows
from saeunlearn.deploy import DeployError
from saeunlearn.erasure import Erasure
from saeunlearn.errors import (
    ErasureError,
    SAEMismatchError,
)
from saeunlearn.guards import Guard, guard_of
from saeunlearn.models import LanguageModel

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
    sae.requires_grad_(False).W_enc.mul_(500)
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
    assert sizes == {"standard": 5, "jumprelu": 5, "gated": 5, "topk": D_SAE}
    assert all(guard(kind=k).tensors()["directions"].shape == (5, 32) for k in KINDS)


# --- on models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", GATES)
@torch.no_grad()
def test_applied_seen_and_reverted_bit_for_bit(lm: LanguageModel, mode: str) -> None:
    (window,) = windows(Corpus.of([" ".join(SENTENCES[:3])]), lm)
    ids = torch.tensor([window.ids])
    before, logits, h = weights(lm), lm.logits(ids), lm.capture(ids, [LAYER])[LAYER]
    erasure = make(lm, [guard(mode, sae=fitted_sae(lm))])
    expected = slow_edit(fitted_sae(lm), h[0], mode)
    with erasure.apply(lm):
        seen = lm.capture(ids, [LAYER, LAYER + 1])
        guarded = lm.logits(ids)
        assert torch.equal(lm.capture(ids, [LAYER - 1])[LAYER - 1], lm.capture(ids, [0])[0])
    assert torch.allclose(seen[LAYER][0], expected, atol=1e-5)
    assert torch.equal(seen[LAYER][:, 0], h[:, 0])  # BOS
    with lm.patch({LAYER: lambda _h: expected[None]}):
        assert torch.allclose(lm.logits(ids), guarded, atol=1e-4)
    assert float((guarded - logits).abs().max()) > 0.01
    assert torch.equal(lm.logits(ids), logits)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", GATES)
def test_generation_with_a_cache_equals_the_slow_reference(lm: LanguageModel, mode: str) -> None:
    sae = fitted_sae(lm)
    expected = [slow_generate(lm, sae, p, NEW, mode, 20.0) for p in PROMPTS]
    with make(lm, [guard(mode, strength=20.0, sae=sae)]).apply(lm):
        assert [generated(lm, [p])[0] for p in PROMPTS] == expected
        assert generated(lm, PROMPTS) == expected  # left-padded
        assert generated(lm, PROMPTS, use_cache=False) == expected
    assert generated(lm, PROMPTS) != expected


@torch.no_grad()
def test_the_gate_of_dsg_opens_and_closes_along_a_text(lm: LanguageModel) -> None:
    # Otherwise the reference above would not tell the rate of a prefix from that of the whole.
    runtime = guard("dsg", sae=fitted_sae(lm)).runtime
    states = set()
    for w in windows(Corpus.of(SENTENCES[:6]), lm):
        h = lm.capture(torch.tensor([w.ids]), [LAYER])[LAYER]
        counted = torch.arange(len(w.ids))[None] > 0
        edited = (runtime.edit(h, counted)[0] != h).any(-1)
        states |= set(zip((runtime.encode(h) > 0).any(-1)[0, 1:].tolist(), edited[0, 1:].tolist()))
    assert states == {(False, False), (True, False), (True, True)}


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
        caches[0].crop(-6)  # 2 of 8 are left
        again = llama.model(a[:, 2:], past_key_values=caches[0]).logits[:, -1]
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
        ({}, {"bias": torch.zeros(3)}), ({}, {"other": torch.zeros(3)}), ({}, {"directions": torch.zeros(5, 31)}),
    ]  # fmt: skip
    for spec, tensors in wrong:
        with pytest.raises(ErasureError):
            Guard.from_payload({**part.spec(), **spec}, {**part.tensors(), **tensors})
    topk = guard(kind="topk")
    for k in (0, D_SAE + 1):
        with pytest.raises(ErasureError, match="k between"):
            Guard.from_payload({**topk.spec(), "k": k}, topk.tensors())
