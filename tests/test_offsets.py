"""Logit offsets: the ensemble's formula, generation, composition, and the way to disk."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import IDS, make, same, trained_twin, weights
from torch import Tensor

from saeunlearn.deploy.offset import OffsetProcessor, added
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import ErasureError, TokenizerMismatchError
from saeunlearn.methods import get_method
from saeunlearn.methods.delta import DeltaConfig
from saeunlearn.models import LanguageModel
from saeunlearn.offsets import Ensemble, Offset, fingerprint_vocabulary

PROMPTS = ["Mara keeps the old", "Tobin", "Odette keeps the old map in the"]
W = 0.7


@pytest.fixture
def small(small_folder: Path) -> LanguageModel:
    return LanguageModel.open(small_folder, device="cpu")


def changes(lm: LanguageModel, seed: int = 0, scale: float = 0.3) -> list[WeightDelta]:
    """Low-rank factors for one matrix, a dense change for another, and one for the embedding (tied or not)."""
    g = torch.Generator().manual_seed(seed)
    a, b = lm.writers([0, 1])
    embedding = next(n for n, p in lm.model.named_parameters() if p is lm.model.get_input_embeddings().weight)
    left, right = torch.randn(a.d_out, 2, generator=g), scale * torch.randn(2, a.d_in, generator=g)
    return [
        WeightDelta(a.name, a.transposed, left, right),
        WeightDelta(b.name, b.transposed, dense=scale * torch.randn(b.d_out, b.d_in, generator=g)),
        WeightDelta(embedding, False, dense=scale * torch.randn(lm.d_vocab, lm.d_model, generator=g)),
    ]


def offset_of(lm: LanguageModel, seed: int = 0, weight: float = W) -> Offset:
    return Offset.of(lm, changes(lm, seed), weight, lm.dtype)


@torch.no_grad()
def by_hand(base: LanguageModel, small: LanguageModel, part: Offset, ids: Tensor) -> Tensor:
    """ℓ_M + w(ℓ_o' − ℓ_o) of rows without padding, from three plain models."""
    twin = trained_twin(small, part)
    logits = [lm.model(input_ids=ids).logits for lm in (base, twin, small)]
    return logits[0] + part.weight * (logits[1] - logits[2])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


# --- the formula -------------------------------------------------------------------------------------------


def test_applied_logits_are_the_formula_and_nothing_in_the_model_changes(lm: LanguageModel) -> None:
    # Every layout as both base and small model.
    before, attributes, hooks = weights(lm), set(vars(lm.model)), len(lm.model._forward_hooks)
    plain = lm.logits(IDS)
    part = offset_of(lm)
    expected = by_hand(lm, lm.copy(), part, IDS)
    erasure = make(lm, [part])
    assert erasure.manifest["changed"] == {"parameters": [], "count": 0, "share": 0.0}
    handle = erasure.apply(lm)
    assert same(weights(lm), before)
    assert close(lm.logits(IDS), expected)
    assert not torch.allclose(expected, plain, atol=0.1)
    handle.revert()
    assert torch.equal(lm.logits(IDS), plain)
    assert set(vars(lm.model)) == attributes
    assert len(lm.model._forward_hooks) == hooks
    assert same(weights(lm), before)


def test_base_and_offset_models_of_different_architectures(llama: LanguageModel, small: LanguageModel) -> None:
    part = offset_of(small)
    expected = by_hand(llama, small, part, IDS)
    with make(llama, [part]).apply(llama):
        assert close(llama.logits(IDS), expected)
        output = llama.model(IDS, None, labels=IDS, logits_to_keep=0)
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], IDS[0, 1:])
        assert math.isclose(output.loss.item(), float(loss), rel_tol=1e-4)  # not the loss that M alone has


def test_padding_on_either_side_changes_nothing(llama: LanguageModel, small: LanguageModel) -> None:
    part = offset_of(small)
    row, pad = IDS[:, :5], torch.full((1, 3), llama.pad_id)
    runtime = part.runtime()
    alone = runtime(row)
    assert close(alone, by_hand(small, small, part, row) - small.logits(row))
    left = runtime(torch.cat([pad, row], 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    right = runtime(torch.cat([row, pad], 1), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]))
    assert close(left[:, 3:], alone)
    assert close(right[:, :5], alone)
    assert not left[:, :3].any()
    assert not right[:, 5:].any()
    assert close(runtime(row, keep=2), alone[:, -2:])


def test_padded_vocabularies_share_the_common_part() -> None:
    logits, wide, narrow = torch.ones(1, 2, 4), torch.ones(1, 2, 6), torch.ones(1, 2, 3)
    assert added(logits, wide).tolist() == [[[2, 2, 2, 2]] * 2]
    assert added(logits, narrow).tolist() == [[[2, 2, 2, 1]] * 2]


@pytest.mark.slow
def test_bf16_models_are_computed_in_float32(small_folder: Path, checkpoints: Any) -> None:
    base = LanguageModel.open(checkpoints("llama"), device="cpu", dtype="bfloat16")
    small = LanguageModel.open(small_folder, device="cpu", dtype="bfloat16")
    part = offset_of(small)
    assert {t.dtype for t in part.original.values()} == {torch.bfloat16}
    wide = small.copy()
    wide.model.float()
    plain = base.logits(IDS)
    with make(base, [part]).apply(base), torch.no_grad():
        got = base.logits(IDS) - plain
    assert close(got, by_hand(wide, wide, part, IDS) - wide.logits(IDS))


# --- generation --------------------------------------------------------------------------------------------


def prompt_batch(lm: LanguageModel) -> tuple[Tensor, Tensor]:
    rows = [lm.tokenizer(p).input_ids for p in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[lm.pad_id] * (width - len(r)) + r for r in rows])
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


NextLogits = Callable[[list[int]], Tensor]


def slow_greedy(step: NextLogits, ids: list[int], n: int) -> list[int]:
    for _ in range(n):
        ids = [*ids, int(step(ids).argmax())]
    return ids


def slow_beams(step: NextLogits, ids: list[int], n: int, width: int) -> list[int]:
    """Beam search over full prefixes; no sequence may end early."""
    beams = [(0.0, ids)]
    for _ in range(n):
        grown = []
        for score, row in beams:
            log_p = step(row).log_softmax(-1)
            grown += [(score + float(log_p[t]), [*row, t]) for t in log_p.topk(width).indices.tolist()]
        beams = sorted(grown, key=lambda b: -b[0])[:width]
    return beams[0][1]


WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "penalty": {"repetition_penalty": 1.3}, "beams": {"num_beams": 3}}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["apply", "processor"])
def test_generation_is_that_of_full_prefixes(llama: LanguageModel, small: LanguageModel, way: str, by: str) -> None:
    part, n = offset_of(small), 6
    twin, base = trained_twin(small, part), llama.copy()
    penalty = WAYS[way].get("repetition_penalty", 1.0)

    @torch.no_grad()
    def step(ids: list[int]) -> Tensor:
        row = torch.tensor([ids])
        base_logits, offset = base.logits(row)[0, -1], W * (twin.logits(row) - small.logits(row))[0, -1]

        def penalised(x: Tensor) -> Tensor:
            seen = torch.zeros(len(x), dtype=torch.bool)
            seen[ids] = True
            return torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)

        # Applied, `generate` sees the ensemble as its model; a processor comes after the penalty.
        logits = penalised(base_logits + offset) if by == "apply" else penalised(base_logits) + offset
        logits[llama.tokenizer.eos_token_id] = -torch.inf
        return logits

    ids, mask = prompt_batch(llama)
    settings: dict[str, Any] = {
        "input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": n, "pad_token_id": llama.pad_id,
        "suppress_tokens": [llama.tokenizer.eos_token_id], **WAYS[way],
    }  # fmt: skip
    if by == "apply":
        with make(llama, [part]).apply(llama):
            got = llama.model.generate(**settings)
            cacheless = llama.model.generate(**settings, use_cache=False)
        assert torch.equal(got, cacheless)
    else:
        got = llama.model.generate(**settings, logits_processor=[OffsetProcessor([part.runtime()], mask)])
    assert not torch.equal(got, llama.model.generate(**settings))
    for row, shown in zip(got, mask):
        start = [t for t, m in zip(row.tolist(), shown.tolist() + [1] * n) if m][:-n]
        wanted = slow_beams(step, start, n, 3) if way == "beams" else slow_greedy(step, start, n)
        assert [t for t, m in zip(row.tolist(), shown.tolist() + [1] * n) if m] == wanted


def test_sampling_draws_from_the_ensemble(llama: LanguageModel, small: LanguageModel) -> None:
    part, base, eos = offset_of(small), llama.copy(), llama.tokenizer.eos_token_id
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 0.8, "max_new_tokens": 5,
                                "num_return_sequences": 3, "suppress_tokens": [eos]}  # fmt: skip
    torch.manual_seed(3)
    wanted = IDS.repeat(3, 1)
    for _ in range(5):
        logits = by_hand(base, small, part, wanted)[:, -1]
        logits[:, eos] = -torch.inf
        wanted = torch.cat([wanted, torch.multinomial((logits / 0.8).softmax(-1), 1)], 1)
    with make(llama, [part]).apply(llama):
        torch.manual_seed(3)
        assert torch.equal(llama.model.generate(IDS, **settings), wanted)
    torch.manual_seed(3)
    processor = OffsetProcessor([part.runtime()])
    assert torch.equal(llama.model.generate(IDS, **settings, logits_processor=[processor]), wanted)
    torch.manual_seed(3)
    assert not torch.equal(llama.model.generate(IDS, **settings), wanted)


def test_language_model_generates_with_adapters_and_offsets(llama: LanguageModel, small: LanguageModel) -> None:
    from peft import LoraConfig, get_peft_model

    part = offset_of(small)
    with make(llama, [part]).apply(llama):
        wanted = llama.generate(PROMPTS, 5)
    assert wanted != llama.generate(PROMPTS, 5)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2)  # B is zero: the same model
    peft = LanguageModel(get_peft_model(llama.model, lora), llama.tokenizer, "peft")
    remove = part.runtime().attach(peft.model)
    assert peft.generate(PROMPTS, 5) == wanted
    remove()
    assert peft.generate(PROMPTS, 5) != wanted


def test_calls_that_hide_the_prefix_are_refused(llama: LanguageModel, small: LanguageModel) -> None:
    cache = llama.model(IDS, use_cache=True).past_key_values
    undo = offset_of(small).apply(llama)
    with pytest.raises(ValueError, match="whole sequences"):
        llama.model(IDS[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="embeddings"):
        llama.model(inputs_embeds=llama.model.get_input_embeddings()(IDS))
    with pytest.raises(ValueError, match="return_dict"):
        llama.model(IDS, return_dict=False)
    with pytest.raises(ValueError, match="indices"):
        llama.model(IDS, logits_to_keep=torch.tensor([0]))
    with pytest.raises(ValueError, match="at most 64"):
        llama.model(torch.ones(1, 65, dtype=torch.long))
    undo()


# --- one request, one version ------------------------------------------------------------------------------


def test_offsets_add_up_and_go_in_any_order(llama: LanguageModel, small: LanguageModel) -> None:
    first, second = offset_of(small, 1), offset_of(llama, 2, weight=0.5)
    twin = llama.copy()
    plain, attributes = llama.logits(IDS), set(vars(llama.model))
    a, b = by_hand(twin, small, first, IDS), by_hand(twin, twin, second, IDS)
    remove_second = second.runtime().attach(llama.model)
    only_second = llama.logits(IDS)
    text_of_second = llama.generate(PROMPTS, 5)
    remove_first = first.runtime().attach(llama.model)
    assert close(llama.logits(IDS), a + b - plain)
    remove_second()
    assert close(llama.logits(IDS), a)
    remove_second()  # done already
    assert close(llama.logits(IDS), a)
    again = second.runtime().attach(llama.model)
    remove_first()
    assert torch.equal(llama.logits(IDS), only_second)  # exactly the other one
    assert llama.generate(PROMPTS, 5) == text_of_second
    assert close(only_second, b)
    again()
    assert torch.equal(llama.logits(IDS), plain)
    assert set(vars(llama.model)) == attributes


def test_erasures_stack_and_a_copy_has_offsets_of_its_own(llama: LanguageModel, small: LanguageModel) -> None:
    plain = llama.logits(IDS)
    outer = make(llama, [offset_of(small, 1)]).apply(llama)
    one = llama.logits(IDS)
    inner = make(llama, [offset_of(small, 2)]).apply(llama)
    both, text = llama.logits(IDS), llama.generate(PROMPTS, 4)
    twin = llama.copy()
    with pytest.raises(ErasureError, match="not the last"):
        outer.revert()
    inner.revert()
    assert torch.equal(llama.logits(IDS), one)
    outer.revert()
    assert torch.equal(llama.logits(IDS), plain)
    assert torch.equal(twin.logits(IDS), both)
    assert twin.generate(PROMPTS, 4) == text


# --- disk, and what does not fit ---------------------------------------------------------------------------


def test_save_and_load(lm: LanguageModel, tmp_path: Path) -> None:
    erasure = make(lm, [offset_of(lm)])
    with erasure.apply(lm):
        wanted = lm.logits(IDS)
    erasure.save(tmp_path / "e")
    state = torch.random.get_rng_state()
    loaded = Erasure.load(tmp_path / "e")
    assert loaded.id == erasure.id
    with loaded.apply(lm):
        assert torch.equal(lm.logits(IDS), wanted)
    assert torch.equal(torch.random.get_rng_state(), state)  # building models draws nothing from the user's numbers
    assert str(tmp_path.parent.parent) not in json.dumps(loaded.parts[0].spec())
    with pytest.raises(ErasureError, match="cannot be merged"):
        erasure.merge(tmp_path / "e", tmp_path / "out")


def test_the_payload_holds_o_once(small: LanguageModel) -> None:
    part = offset_of(small)
    o = sum(p.numel() for p in small.model.parameters())
    delta = sum(t.numel() for c in changes(small) for t in c.tensors().values())
    assert sum(t.numel() for t in part.tensors().values()) == o + delta


def test_damaged_parts_are_refused(small: LanguageModel) -> None:
    part = offset_of(small)
    spec, tensors = part.spec(), part.tensors()
    name = next(iter(part.original))
    with pytest.raises(ErasureError, match="other tensors"):
        Offset.from_payload(spec, {**tensors, "stray": torch.zeros(1)})
    with pytest.raises(ErasureError, match="no parameter"):
        Offset.from_payload(spec, {k: v for k, v in tensors.items() if k != f"original.{part.changes[0].name}"})
    unchanged = next(n for n in part.original if n not in {c.name for c in part.changes})
    with pytest.raises(ErasureError, match="lacks"):
        Offset.from_payload(spec, {k: v for k, v in tensors.items() if k != f"original.{unchanged}"}).runtime()
    with pytest.raises(ErasureError, match="does not know"):
        Offset.from_payload(spec, {**tensors, "original.stray": torch.zeros(1)}).runtime()
    with pytest.raises(ErasureError, match="cannot be built"):
        Offset.from_payload({**spec, "config": {**spec["config"], "model_type": "nonsense"}}, tensors).runtime()
    with pytest.raises(ErasureError, match="finite"):
        Offset.from_payload({**spec, "weight": math.nan}, tensors)
    wrong = WeightDelta(name, False, dense=torch.zeros(3, 3))
    with pytest.raises(ErasureError, match="shape"):
        Offset.of(small, [wrong], 1.0, torch.float32)


def test_other_vocabularies_are_refused(checkpoints: Any, llama: LanguageModel, small: LanguageModel) -> None:
    gpt2 = LanguageModel.open(checkpoints("gpt2"), device="cpu")
    with pytest.raises(TokenizerMismatchError, match="llama"):
        make(llama, [offset_of(gpt2)])
    with pytest.raises(TokenizerMismatchError, match=r"tokens differ, such as"):
        Ensemble(llama, gpt2)
    with pytest.raises(TokenizerMismatchError, match="tokens differ"):
        get_method("delta").check(llama, DeltaConfig(offset_model=str(checkpoints("gpt2"))))
    swapped = dict(llama.vocabulary)
    a, b = list(swapped)[:2]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    assert fingerprint_vocabulary(swapped) != fingerprint_vocabulary(llama.vocabulary)
    assert fingerprint_vocabulary(dict(reversed(llama.vocabulary.items()))) == fingerprint_vocabulary(llama.vocabulary)
    narrow = copy.deepcopy(llama.model)
    narrow.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="100 logits"):
        offset_of(small).runtime().attach(narrow)
