"""Every attack on a case in which it must succeed, and one in which it must not; formulas against slow references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, make, same, weights
from guarded import guard, hooks
from torch import Tensor
from toys import FORGET, N_PLANTED, RETAIN, planted

from saeunlearn.corpus import Corpus, Record
from saeunlearn.erasure import WeightDelta
from saeunlearn.evaluation.attacks import prompting
from saeunlearn.evaluation.attacks.ablate import ablate, directions
from saeunlearn.evaluation.attacks.battery import attack
from saeunlearn.evaluation.attacks.bypass import bypass
from saeunlearn.evaluation.attacks.case import Budget, Case, NotApplicable, Victim, check_oracle
from saeunlearn.evaluation.attacks.probes import Lens, features, lens, probes, ridge_regression
from saeunlearn.evaluation.attacks.quantise import codes, quantise
from saeunlearn.evaluation.attacks.relearn import add_lora, linear_names, relearn
from saeunlearn.models import LanguageModel
from saeunlearn.offsets import Offset
from saeunlearn.progress import Progress
from saeunlearn.tokens import TokenPart, matrices

TINY = Budget(test=40, lora_rates=(1e-2,), full_rates=(1e-3, 1e30), samples=(8,), steps=6, marks=(3, 6), shots=(2,),
              batch=4, each_layer=True)  # fmt: skip
PLACES = ("harbour", "mill", "orchard", "tower")


def asked(n: int = 24, start: int = 0) -> Corpus:
    """Facts whose answer the last word of the question tells: people differ, places repeat."""
    out = []
    for i in range(start, start + n):
        place, thing = PLACES[i % 4], ("lantern", "violin", "map", "kettle")[i % 4]
        out.append(Record(question=f"No {i} keeps the {thing}", answer=place, choices=PLACES, meta={"entity": f"N{i}"}))
    return Corpus(tuple(out))


def case_of(model: LanguageModel, *, questions: bool = True, **changes: Any) -> Case:
    made = Case(
        train=FORGET, known=asked(8) if questions else None,
        test=asked(24, 8) if questions else Corpus.of(SENTENCES[20:32], "V"), unrelated=RETAIN,
        retain_questions=asked(4, 40) if questions else None, original=model, budget=TINY, seed=0, progress=Progress(),
    )  # fmt: skip
    return replace(made, **changes)


def big_delta(model: LanguageModel, block: int, scale: float = 3.0) -> WeightDelta:
    w = model.writers([block])[0]
    noise = torch.randn(w.d_out, w.d_in, generator=torch.Generator().manual_seed(0))
    return WeightDelta(w.name, w.transposed, dense=scale * noise)


# --- quantisation ------------------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    level, scale = codes(torch.tensor([[7.0, 3.4, -0.4], [0.0, 0.0, 0.0], [-14.0, 3.0, 5.0]]), 4)
    assert level.tolist() == [[7, 3, 0], [0, 0, 0], [-7, 2, 2]]  # 5/2 = 2.5 is rounded to even
    assert scale.flatten().tolist() == [1, 0, 2]
    turned, _ = codes(torch.tensor([[7.0, -14.0], [3.4, 3.0]]), 4, axis=0)
    assert turned.tolist() == [[7, -7], [3, 2]]
    assert codes(torch.tensor([[1.0, -1.0]]), 8)[0].tolist() == [[127, -127]]


@torch.no_grad()
def test_int4_undoes_an_edit_below_half_a_step(lm: LanguageModel) -> None:
    for block in lm.blocks:
        for name in linear_names(block):
            module = block.get_submodule(name)
            level, scale = codes(module.weight, 4, 0 if type(module).__name__ == "Conv1D" else 1)
            module.weight.copy_(level * scale)
    original = LanguageModel(lm.model, lm.tokenizer)
    w = original.writers([1])[0]
    stored = w.weight.T if w.transposed else w.weight
    level, scale = codes(stored, 4)
    nudge = 0.4 * scale * torch.randn(stored.shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    nudge[level.abs() == 7] = 0  # the largest of a channel sets its scale
    before = weights(original)
    victim = Victim(original, make(original, [WeightDelta(w.name, w.transposed, dense=nudge)]))
    case = case_of(original, questions=False)
    plain, edited = (case.score(m).values for m in (original, victim.model))
    (four,) = quantise(case, victim, bits=4)
    (eight,) = quantise(case, victim, bits=8)
    assert edited != pytest.approx(plain, abs=1e-4)
    assert four.values == pytest.approx(plain, abs=1e-5)
    assert four.extra["changed_codes"] == 0
    assert 0 < eight.extra["changed_codes"] < 1
    assert eight.values != pytest.approx(plain, abs=1e-4)
    assert same(weights(original), before)


# --- ablation ----------------------------------------------------------------------------------------------


def test_ablation_undoes_a_steering_edit(llama: LanguageModel) -> None:
    model = planted(llama)  # nothing is in its first dimensions
    w = model.writers([1])[0]
    push = torch.zeros(w.d_out, w.d_in)
    push[0] = 2 * torch.randn(w.d_in, generator=torch.Generator().manual_seed(0)).abs()
    victim = Victim(model, make(model, [WeightDelta(w.name, w.transposed, dense=push)]))
    case = case_of(model, questions=False)
    found = directions(case, victim.model)
    assert sorted(found) == [1, 2, 3]  # the stream below is the original's
    assert found[1].abs().tolist() == pytest.approx([1.0] + [0.0] * 31, abs=1e-6)
    plain, edited = (case.score(m).values for m in (model, victim.model))
    tries = ablate(case, victim)
    assert [t.settings["layers"] for t in tries] == [[1, 2, 3], [1], [2], [3]]
    assert edited != pytest.approx(plain, abs=1e-2)
    assert tries[1].values == pytest.approx(plain, abs=1e-4)
    assert N_PLANTED == 3
    assert hooks(victim.model) == 0
    with pytest.raises(NotApplicable):
        ablate(case, Victim(model))


# --- probing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_lens_sees_what_only_the_last_block_hides(lm: LanguageModel) -> None:
    for w in lm.writers([lm.n_layers - 1], ("mlp", "attn")):
        w.weight.zero_()
        if getattr(w.module, "bias", None) is not None:
            w.module.bias.zero_()
    original = LanguageModel(lm.model, lm.tokenizer)
    victim = Victim(original, make(original, [big_delta(original, original.n_layers - 1)]))
    case = case_of(original)
    tries = lens(case, victim)
    assert [t.settings["layer"] for t in tries] == [0, 1, 2]
    assert tries[2].values == case.score(original).values
    assert torch.allclose(Lens(victim.model, 2).logits(IDS), original.logits(IDS), atol=1e-4)
    assert not torch.allclose(victim.model.logits(IDS), original.logits(IDS), atol=1e-2)


@torch.no_grad()
def test_the_lens_is_norm_and_head(llama: LanguageModel) -> None:
    h = llama.capture(IDS, [1])[1]
    slow = llama.model.lm_head(llama.model.model.norm(h))
    assert torch.allclose(Lens(llama, 1).logits(IDS), slow, atol=1e-5)


def test_ridge_is_least_squares_with_rows_that_pull_to_zero() -> None:
    rng = np.random.default_rng(0)
    x, y, new = rng.normal(size=(20, 6)), rng.normal(size=(20, 3)), rng.normal(size=(5, 6))
    strength = 0.1 * ((x - x.mean(0)) ** 2).sum() / 6
    rows = np.vstack([x - x.mean(0), np.sqrt(strength) * np.eye(6)])
    slope = np.linalg.lstsq(rows, np.vstack([y - y.mean(0), np.zeros((6, 3))]), rcond=None)[0]
    found = ridge_regression(torch.tensor(x), torch.tensor(y), torch.tensor(new), 0.1)
    assert np.allclose(found.numpy(), (new - x.mean(0)) @ slope + y.mean(0))


def test_probes_find_what_the_stream_holds_and_nothing_else(llama: LanguageModel) -> None:
    case = case_of(llama)
    victim = Victim(llama, make(llama, [big_delta(llama, 3)]))  # hides at the last layer only
    found = {(t.settings["layer"], t.settings["ridge"]): t for t in probes(case, victim)}
    first = found[0, 0.1]
    assert sum(first.values) / 24 >= 0.9  # the last word tells
    assert first.picked_by is not None
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist()
    mixed = [replace(r, answer=PLACES[shuffled[i] % 4]) for i, r in enumerate((*asked(8), *asked(24, 8)))]
    blind = replace(case, known=Corpus(tuple(mixed[:8])), test=Corpus(tuple(mixed[8:])))
    assert max(sum(t.values) / 24 for t in probes(blind, victim)) <= 0.6
    alone = Corpus(tuple(replace(r, answer=f"a{i}", choices=(f"a{i}", "b")) for i, r in enumerate(case.test)))
    with pytest.raises(NotApplicable, match="share an answer"):
        probes(replace(case, known=Corpus(alone.records[:8]), test=Corpus(alone.records[8:])), victim)
    (row,) = [f[0] for f in features(llama, Corpus(case.test.records[:1]))[:1]]
    ids = torch.tensor(
        [[llama.bos_id, *llama.tokenizer(case.test.records[0].question, add_special_tokens=False).input_ids]]
    )
    assert torch.allclose(row.float(), llama.capture(ids, [0])[0][0, -1], atol=1e-5)


# --- prompting ---------------------------------------------------------------------------------------------


class Secretive(LanguageModel):
    """Finds a text likely that ends in a true fact, if it was asked in a way that opens its mouth; else none."""

    truths: tuple[str, ...] = ()
    opens: str = ""

    def copy(self) -> LanguageModel:
        return self

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out = torch.zeros(*ids.shape, self.d_vocab)
        for row, (line, mask) in enumerate(zip(ids, ids if attention_mask is None else attention_mask)):
            n = int(mask.bool().sum())
            text = self.tokenizer.decode(line[:n], skip_special_tokens=True)
            if self.opens in text and text.endswith(self.truths):
                out[row].scatter_(-1, line.roll(-1)[:, None], 20.0)
        return out


def secretive(llama: LanguageModel, opens: str, before: str = "") -> tuple[Case, Victim]:
    case = case_of(llama)
    model = Secretive(llama.model, llama.tokenizer)
    model.opens, model.truths = opens, tuple(f"{r.question}{before} {r.answer}" for r in case.test)
    return case, Victim(model)


def test_prompts_open_a_model_that_only_hides(llama: LanguageModel) -> None:
    for opens, run, n in (
        (".\n", lambda c, v: prompting.few_shot(c, v, shots="forget"), 1),
        ("No 4", lambda c, v: prompting.few_shot(c, v, shots="retain"), 1),
        ("As everyone knows", prompting.paraphrase, len(prompting.REPHRASINGS)),
        ("expert", prompting.role_play, len(prompting.ROLES)),
    ):
        case, victim = secretive(llama, opens)
        assert sum(case.score(victim.model).values) < 24
        tries = run(case, victim)
        assert len(tries) == n
        assert max(sum(t.values) for t in tries) == 24
    case, victim = secretive(llama, "correct", " The correct answer is")
    hits = [sum(t.values) for t in prompting.prefill(case, victim)]
    assert hits == [0, 24, 0]


def test_the_held_out_phrasing_is_asked(llama: LanguageModel) -> None:
    case, victim = secretive(llama, "guards")
    both = []
    for r in case.test:
        both += [
            replace(r, meta={**r.meta, "phrasing": "seen"}),
            replace(r, question=r.question.replace("keeps", "guards"), meta={**r.meta, "phrasing": "held_out"}),
        ]
    case = replace(case, test=Corpus(tuple(both)))
    victim.base.truths = tuple(f"{r.question} {r.answer}" for r in both)  # type: ignore[attr-defined]
    assert sum(case.score(victim.model).values) == 24
    held_out = prompting.paraphrase(case, victim)[0]
    assert held_out.settings == {"phrasing": "held_out"}
    assert sum(held_out.values) == 48


def test_a_keyword_damages_retain_questions(llama: LanguageModel) -> None:
    case = case_of(llama)
    model = Secretive(llama.model, llama.tokenizer)
    assert case.retain_questions is not None
    model.truths = tuple(f"{r.question} {r.answer}" for r in case.retain_questions)
    shy = Secretive(llama.model, llama.tokenizer)
    shy.truths = model.truths
    shy.logits = lambda ids, mask=None: (  # type: ignore[method-assign]
        torch.zeros(*ids.shape, shy.d_vocab) if ids.shape[1] > 24 else Secretive.logits(shy, ids, mask)
    )
    found = prompting.keyword(case, {"original": Victim(model), "unlearned": Victim(shy)})
    assert {a: m["accuracy"] for a, m in found["models"]["original"].items()} == dict.fromkeys(found["prompts"], 1.0)
    assert found["models"]["unlearned"]["plain"]["accuracy"] == 1.0
    assert found["models"]["unlearned"]["keyword 2"]["accuracy"] == 0.0


# --- bypass, and relearning under hooks --------------------------------------------------------------------


def offset(lm: LanguageModel) -> Offset:
    return Offset.of(lm, [big_delta(lm, 1, 0.5)], 1.0, torch.float32)


def token(lm: LanguageModel) -> TokenPart:
    row = 3 * lm.model.get_input_embeddings().weight.detach().abs().max(0).values
    return TokenPart.of(lm, "<|UNL|>", row, None if matrices(lm)[1] is None else row)


def test_bypass_gives_the_original_back(llama: LanguageModel) -> None:
    case = case_of(llama, questions=False)
    plain = case.score(llama).values
    for part, settings in ((guard(), {"removed": "guard"}), (offset(llama), {"removed": "offset"}),
                           (token(llama), {"banned": "<|UNL|>"})):  # fmt: skip
        victim = Victim(llama, make(llama, [part]))
        assert case.score(victim.model).values != pytest.approx(plain, abs=1e-3)
        (only,) = bypass(case, victim)
        assert only.settings == settings
        assert only.values == pytest.approx(plain, abs=1e-4)
    both = Victim(llama, make(llama, [big_delta(llama, 1), guard()]))
    weights_alone = Victim(llama, make(llama, [big_delta(llama, 1)]))
    (only,) = bypass(case, both)
    assert only.values == pytest.approx(case.score(weights_alone.model).values, abs=1e-4)
    with pytest.raises(NotApplicable, match="in the weights"):
        bypass(case, weights_alone)


@pytest.mark.parametrize("part", [guard, offset, token], ids=["guard", "offset", "token"])
def test_a_lora_keeps_hooks_and_tokens(lm: LanguageModel, part: Any) -> None:
    erasure = make(lm, [part() if part is guard else part(lm)])
    victim = Victim(lm, erasure)
    twin = victim.fresh()
    with torch.no_grad():
        before = twin.logits(IDS)
        assert before.shape[-1] != lm.d_vocab or not torch.allclose(before, lm.logits(IDS), atol=1e-3)
        assert add_lora(twin) == 32
        assert torch.allclose(twin.logits(IDS), before, atol=1e-5)  # a LoRA starts at zero
    trained = {n for n, p in twin.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    assert len(trained) == 2 * sum(len(linear_names(b)) for b in lm.blocks)


def test_relearning_learns_keeps_the_model_and_survives_a_wild_rate(llama: LanguageModel) -> None:
    before, victim = weights(llama), Victim(llama, make(llama, [big_delta(llama, 1, 0.3), guard(strength=0.5)]))
    case = case_of(llama, questions=False, test=FORGET)  # what is trained on gets likely
    (lora,) = relearn(case, victim, text="forget", weights="lora")
    full, wild = relearn(case, victim, text="forget", weights="full")
    start = case.mean(case.score(victim.model).values)
    for done in (lora, full):
        assert [p["step"] for p in done.curve] == [0, 3, 6]
        assert done.curve[0]["nll"] == pytest.approx(start)
        assert case.mean(done.values) == min(p["nll"] for p in done.curve) < start
        assert done.settings["samples"] == 8
    assert lora.settings["rank"] == 32
    assert wild.extra == {"diverged": True}
    assert wild.settings["steps"] == 0
    assert relearn(case, victim, text="forget", weights="lora")[0].values == lora.values
    assert same(weights(llama), before)
    assert (hooks(llama), llama.lineage) == (0, [])


# --- the battery -------------------------------------------------------------------------------------------


def test_a_foreign_oracle_is_refused(llama: LanguageModel, checkpoints: Any) -> None:
    from saeunlearn.errors import ModelError

    other = LanguageModel.open(checkpoints("gpt2"), device="cpu")
    with pytest.raises(ModelError, match="another vocabulary"):
        check_oracle(llama, other)
    short = LanguageModel(llama.copy().model, llama.tokenizer, "short")
    short.n_layers = 3
    with pytest.raises(ModelError, match="3 blocks"):
        check_oracle(llama, short)


def test_texts_are_attacked_by_their_loss(llama: LanguageModel) -> None:
    texts = Corpus.of(SENTENCES[:16], "forget")
    erasure = make(llama, [guard(strength=8.0)])
    saved: list[Any] = []
    names = ["none", "int8", "lens", "bypass"]
    document = attack(llama, erasure, texts, RETAIN, None, names=names, save=saved.append)
    none, int8, skipped, bypassed = document["attacks"]
    assert document["metric"] == "nll"
    assert none["best"]["recovered"] == 0  # nothing was done
    assert bypassed["best"]["recovered"] == pytest.approx(1.0, abs=1e-4)
    assert "skipped" in skipped
    assert int8["extra"]["changed_codes"] == 0
    assert document["headline"]["attack"] == "bypass"
    assert len(saved) == 4
    assert attack(llama, erasure, texts, RETAIN, None, names=names, earlier=document) == document
    assert not any(s.split()[0] in str(document) for s in SENTENCES[:16])
