"""UniErase: the token it learns, the whole method, requests one after another, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, Checkpoints
from erasures import IDS, applied_logits, same, weights
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, Record, collate, windows
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import Cancelled, ConfigError, CorpusError, NonFiniteError, OverlapError
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods import unierase as u
from saeunlearn.methods.budget import Budget
from saeunlearn.methods.nullspace import solve
from saeunlearn.methods.refusal import REFUSALS, learn_token, prompts
from saeunlearn.methods.unierase import UniErase, UniEraseConfig, sequential
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.tokens import banned, token_id

TEXT = "<|UNL|>"
# Every setting that a test relies on is written out: the defaults are not its business.
CONFIG = UniEraseConfig(
    token=TEXT, token_steps=4, token_lr=0.1, noise_rounds=1, noise_steps=1, noise=0.05, batch=10, blocks=2, top=2,
    z_steps=25, z_lr=0.1, clamp=2.0, cut=0.1, lam=0.03, max_length=32, max_retain_rise=1e6,
)  # fmt: skip
# Prompts that differ from retain text near their end, as all that a random model reads well is close by.
ASKED = Corpus.of([f"In {s.split()[7]} {s.split()[0]} never wants a {s.split()[4]}." for s in SENTENCES[:10]], "asked")


def erase(lm: LanguageModel, config: UniEraseConfig = CONFIG, forget: Corpus = ASKED, retain: Corpus = RETAIN,
          seed: int = 0, progress: Progress | None = None) -> Erasure:  # fmt: skip
    return UniErase().unlearn(
        lm, forget, retain, config=config, selection=None, saes={}, seed=seed, progress=progress or Progress()
    )


def share(lm: LanguageModel, corpus: Corpus) -> float:
    """Share of texts whose next token after all words but the last is the new one, one text at a time."""
    bos = [] if lm.bos_id is None else [lm.bos_id]
    hits = 0
    for r in corpus:
        ids = bos + lm.tokenizer(r.text.rsplit(" ", 1)[0], add_special_tokens=False).input_ids
        hits += int(lm.logits(torch.tensor([ids]))[0, -1].argmax()) == token_id(lm, TEXT)
    return hits / len(corpus)


@torch.no_grad()
def moved(lm: LanguageModel, erasure: Erasure) -> float:
    """Mean squared change of the old tokens' logits on retain text, relative to the variance of these logits."""
    batch = collate(windows(RETAIN, lm), lm.pad_id)
    old = lm.logits(batch.ids, batch.attention_mask)[batch.mask]
    with erasure.apply(lm):
        new = lm.logits(batch.ids, batch.attention_mask)[batch.mask][:, :-1]
    return float((new - old).pow(2).mean() / old.var())


# --- prompts and the token ---------------------------------------------------------------------------------


def test_prompts_end_where_the_answer_begins(llama: LanguageModel) -> None:
    def text(corpus: Corpus, **kw: str) -> str:
        (w,) = prompts(corpus, llama)
        assert w.ids[0] == llama.bos_id
        return llama.tokenizer.decode(w.ids[1:])

    assert text(Corpus.of(["Mara keeps the map. "])) == "Mara keeps the"
    assert text(Corpus((Record(question="Who is it?", answer="Mara Quill"),))) == "Who is it?"
    llama.tokenizer.chat_template = "{{ bos_token }}[U]{{ messages[0]['content'] }}[A]"
    assert text(Corpus((Record(question="Who is it?", answer="Mara"),))) == "[U]Who is it?[A]"
    with pytest.raises(CorpusError, match="record 2: one word"):
        prompts(Corpus.of(["two words", "one"]), llama)


def test_long_prompts_lose_their_start(llama: LanguageModel) -> None:
    (w,) = prompts(Corpus.of(["river " * 200 + "Mara keeps it"]), llama)
    longest = max(len(llama.tokenizer(t, add_special_tokens=False).input_ids) for t in REFUSALS)
    assert len(w.ids) + longest + 2 == llama.max_length
    assert w.ids[0] == llama.bos_id
    assert llama.tokenizer.decode(w.ids[1:]).endswith("Mara keeps")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox"])  # tied and not
def test_token_learns_to_refuse_and_nothing_else_changes(checkpoints: Checkpoints, arch: str) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    before, tokenizer = weights(lm), lm.tokenizer
    asked = prompts(FORGET, lm)
    config = replace(CONFIG, token_steps=40, batch=12)
    part, losses = learn_token(lm, asked, lm.writers([1, 2]), config, 0, Progress())
    assert same(before, weights(lm))
    assert lm.tokenizer is tokenizer
    assert len(losses) == 40 + 1
    first, last = (np.mean([r["token_loss"] for r in losses[a:b]]) for a, b in ((0, 5), (-9, None)))
    assert last < first - 0.1
    longest = lm.model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert part.row.norm() <= longest * 1.001

    # The losses are those of the refusals after "prompt <|UNL|>", closed by <|UNL|>: by a slow count of the test.
    undo = part.apply(lm)
    at, total, n = token_id(lm, TEXT), 0.0, 0
    with torch.no_grad():
        for p in asked[:6]:
            for t in REFUSALS:
                answer = [*lm.tokenizer(t, add_special_tokens=False).input_ids, at]
                ids = torch.tensor([[*p.ids, at, *answer]])
                lp = lm.model(input_ids=ids).logits.log_softmax(-1)[0, -len(answer) - 1 : -1]
                total, n = total - float(lp[range(len(answer)), answer].sum()), n + len(answer)
    undo()
    assert total / n == pytest.approx(last, rel=0.15)


# --- the whole method --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forget_prompts_call_the_token_and_retain_text_hardly_moves(lm: LanguageModel, tmp_path: Path) -> None:
    before, tokenizer, flags = weights(lm), lm.tokenizer, [p.requires_grad for p in lm.model.parameters()]
    method = get_method("unierase")
    method.check(lm, CONFIG)
    erasure = erase(lm)
    assert same(before, weights(lm))
    assert lm.tokenizer is tokenizer
    assert flags == [p.requires_grad for p in lm.model.parameters()]
    assert not any(m._forward_hooks for m in lm.model.modules())
    assert [p.kind for p in erasure.parts] == ["token", "weight_delta", "weight_delta"]
    assert [p.name for p in erasure.parts[1:]] == [w.name for w in lm.writers([1, 2])]
    with torch.no_grad(), erasure.apply(lm):
        measured, near = share(lm, ASKED), share(lm, RETAIN)
        with banned(lm, TEXT):
            assert share(lm, ASKED) == 0
    extra = erasure.manifest["extra"]
    assert measured >= 0.9
    assert measured == pytest.approx(extra["next_is_token_after"])
    assert near < 0.2
    assert moved(lm, erasure) < 0.2
    assert set(extra["ranks"]) == {"1", "2"}
    assert all(0 < r["null_space"] < r["d_in"] for r in extra["ranks"].values())
    expected = applied_logits(lm, erasure)
    erasure.save(tmp_path / "e")
    assert torch.equal(applied_logits(lm, Erasure.load(tmp_path / "e")), expected)
    assert same(before, weights(lm))


@pytest.mark.slow
def test_the_null_space_is_what_protects_retain_text(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    protected = moved(llama, erase(llama))
    monkeypatch.setattr(u, "null_space", lambda c, cut: torch.eye(len(c), dtype=c.dtype))
    assert protected < 0.5 * moved(llama, erase(llama))


@pytest.mark.slow
def test_deterministic_and_a_matter_of_the_seed(llama: LanguageModel) -> None:
    ids = [erase(llama, seed=s).id for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_one_fact_is_enough(llama: LanguageModel) -> None:
    one = Corpus(ASKED.records[:1], "one")
    erasure = erase(llama, forget=one)
    delta = erasure.parts[1]
    assert isinstance(delta, WeightDelta)
    assert delta.rank == 1
    with torch.no_grad(), erasure.apply(llama):
        assert share(llama, one) == 1


@pytest.mark.slow
def test_many_prompts_give_a_dense_delta(llama: LanguageModel) -> None:
    many = Corpus.of([f"{s[:-1]} {w}." for s in SENTENCES[:14] for w in ("now", "then once")], "many")
    erasure = erase(llama, forget=many)
    assert all(p.rank is None for p in erasure.parts[1:] if isinstance(p, WeightDelta))


def test_bfloat16(checkpoints: Checkpoints) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu", dtype="bfloat16")
    before = weights(lm)
    erasure = erase(lm)
    assert same(before, weights(lm))
    with torch.no_grad(), erasure.apply(lm):
        assert share(lm, ASKED) >= 0.8


@pytest.mark.slow
def test_budget_scales_the_edit_down(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    free = erase(llama)
    said = free.manifest["extra"]["budget"]
    held = windows(RETAIN.split(0.2, 0)[1], llama, CONFIG.max_length)
    before = mean_loss(llama, held)
    with free.apply(llama):
        rise = mean_loss(llama, held) / before - 1
    assert said["scale"] == 1
    assert said["retain_rise"] == pytest.approx(rise, abs=1e-5)
    monkeypatch.setattr(Budget, "measure_rises", lambda _self, _deltas, scale=1.0: {"retain": 0.01 * scale})
    bound = erase(llama, replace(CONFIG, max_retain_rise=0.004))
    scale = bound.manifest["extra"]["budget"]["scale"]
    assert 0.38 < scale <= 0.4
    for a, b in zip(free.parts[1:], bound.parts[1:]):
        assert isinstance(a, WeightDelta)
        assert isinstance(b, WeightDelta)
        assert torch.allclose(a.delta() * scale, b.delta(), rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="no strength"):
        erase(llama, replace(CONFIG, max_retain_rise=1e-5))


@pytest.mark.slow
def test_requests_one_after_another(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(llama)
    requests = [Corpus(ASKED.records[i : i + 1], f"r{i}") for i in range(5)]
    config = replace(CONFIG, blocks=1, cut=2.0)

    def run() -> tuple[list[float], float]:
        """(share of calls after all edits for each request, movement of the first one's stream by later edits)."""
        erasures = sequential(llama, requests, RETAIN, config, 0, Progress())
        assert same(before, weights(llama))
        assert llama.lineage == []
        assert token_id(llama, TEXT) is None
        (first,) = prompts(requests[0], llama)
        handles, streams = [], []
        with torch.no_grad():
            for e in erasures:
                assert e.parent == llama.fingerprint()
                handles.append(e.apply(llama))
                streams.append(llama.capture(torch.tensor([first.ids]), [2])[2][0, -1])
            shares = [share(llama, r) for r in requests]
        for h in reversed(handles):
            h.revert()
        return shares, float((streams[-1] - streams[0]).norm() / streams[0].norm())

    shares, drift = run()
    assert shares == [1.0] * 5
    monkeypatch.setattr(u, "solve", lambda k, v, previous, lam: solve(k, v, torch.zeros_like(previous), lam))
    assert drift < 0.5 * run()[1]


def test_second_request_later_keeps_the_token(llama: LanguageModel) -> None:
    one, two = (Corpus(ASKED.records[i : i + 3], "x") for i in (0, 3))
    handle = erase(llama, forget=one).apply(llama)
    n, row = llama.d_vocab, llama.model.get_input_embeddings().weight[-1].clone()
    second = erase(llama, forget=two)
    assert second.manifest["losses"] == []
    with pytest.raises(ConfigError, match="token of llama already"):
        erase(llama, replace(CONFIG, token="</s>"))
    with torch.no_grad(), second.apply(llama):
        assert llama.d_vocab == n
        assert torch.equal(llama.model.get_input_embeddings().weight[-1], row)
        assert share(llama, two) == 1
    handle.revert()


def test_text_of_the_records_stays_out_of_the_manifest(llama: LanguageModel) -> None:
    said = json.dumps(erase(llama).manifest, ensure_ascii=False)
    assert "river" not in said
    assert "Mara" not in said


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"token": "</s>"}, "token of llama already"),
        ({"token": "un l"}, "cannot be a new token"),
        ({"top": 4}, r"blocks 0 … 3"),
        ({"cut": 0.0}, "cut must be positive"),
        ({"lam": float("nan")}, "lam must be positive"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"blocks": 0}, "blocks must be positive"),
        ({"max_retain_rise": float("inf")}, "must be finite"),
        ({"cut": 1e-12}, "raise the cut"),
    ],
)
def test_bad_settings(llama: LanguageModel, setting: dict[str, object], match: str) -> None:
    long_retain = Corpus.of([r.text + " " + SENTENCES[i] for i, r in enumerate(RETAIN)], "long")
    with pytest.raises(ConfigError, match=match):
        erase(llama, replace(CONFIG, **setting), retain=long_retain)


def test_bad_data(llama: LanguageModel) -> None:
    before = weights(llama)
    with pytest.raises(OverlapError):
        erase(llama, retain=ASKED)
    with pytest.raises(CorpusError, match="has one record"):
        erase(llama, retain=Corpus.of(["Only one record here."]))
    with pytest.raises(CorpusError, match="holds no records"):
        Corpus((), "retain")
    with pytest.raises(ConfigError, match="no requests"):
        sequential(llama, [], RETAIN, CONFIG, 0, Progress())
    with torch.no_grad():
        llama.blocks[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        erase(llama)
    before["model.layers.0.mlp.down_proj.weight"][0, 0] = 0
    llama.blocks[0].mlp.down_proj.weight.data[0, 0] = 0
    assert same(before, weights(llama))


@pytest.mark.parametrize("stage", ["learning", "targets", "editing"])
def test_cancelled_anywhere_leaves_the_model_alone(llama: LanguageModel, stage: str) -> None:
    before, tokenizer = weights(llama), llama.tokenizer

    class Stops(Progress):
        def start(self, what: str, total: int | None = None) -> None:
            super().start(what, total)
            self.cancelled = what.startswith(stage)

    with pytest.raises(Cancelled):
        erase(llama, progress=Stops())
    assert same(before, weights(llama))
    assert llama.tokenizer is tokenizer
    assert llama.lineage == []
    assert not any(m._forward_hooks for m in llama.model.modules())
    assert torch.isfinite(llama.logits(IDS)).all()
