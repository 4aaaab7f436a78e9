"""Metrics against slow unbatched references and Hugging Face's own loss; evaluation, comparison, table."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from saeunlearn.corpus import Corpus, Record, windows
from saeunlearn.errors import ConfigError, CorpusError, NonFiniteError
from saeunlearn.evaluation import metrics
from saeunlearn.evaluation.evaluate import (
    bootstrap,
    combine,
    compare,
    evaluate,
    group_of,
    table,
    wilson,
)
from saeunlearn.models import LanguageModel

PLACES = ("mill", "old harbour near the river", "tower", "library")
NAMES = ("Mara", "Tobin", "Elsa", "Quill", "Rufus", "Odette")


def ask(i: int, **meta: Any) -> Record:
    """A four-choice question whose choices differ in length."""
    return Record(
        question=f"{NAMES[i % 6]} keeps the lantern {'and the map ' * (i % 3)}in the",
        answer=PLACES[i % 4],
        choices=PLACES,
        meta=meta,
    )


@pytest.fixture
def questions() -> Corpus:
    """Twelve questions: forget seen/held-out, near seen/untouched."""
    kinds = [("forget", "seen", "used"), ("forget", "held_out", "used")]
    kinds += [("near", "seen", "used"), ("near", "held_out", "untouched")]
    return Corpus(
        tuple(
            ask(i, set=s, phrasing=p, entity_status=e, topic="rivers", attribute=f"a{i % 2}")
            for i in range(12)
            for s, p, e in [kinds[i % 4]]
        ),
        "questions",
    )


def slow_logprob(lm: LanguageModel, question: str, answer: str) -> tuple[float, list[bool]]:
    """(summed log-probability, greedy hits) of an answer: one unpadded pass, question tokens counted apart.

    Byte-level BPE splits before a space, so question and " answer" tokenise separately without loss.
    """
    ids = lm.tokenizer(question, add_special_tokens=False).input_ids
    tail = lm.tokenizer(" " + answer, add_special_tokens=False).input_ids
    head = ([lm.bos_id] if lm.bos_id is not None else []) + ids
    assert lm.tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids == ids + tail
    with torch.no_grad():
        logits = lm.model(torch.tensor([head + tail])).logits[0].double()
    total, hits = 0.0, []
    for i, token in enumerate(tail):
        row = logits[len(head) + i - 1]
        total += float(row[token] - torch.logsumexp(row, 0))
        hits.append(int(row.argmax()) == token)
    return total, hits


def test_answer_logprobs_choice_and_cloze_match_a_slow_loop(lm: LanguageModel, questions: Corpus) -> None:
    got = metrics.answer_logprobs(lm, questions)
    lengths = [len(lm.tokenizer(" " + c, add_special_tokens=False).input_ids) for c in PLACES]
    right, exact = [], []
    for record, row in zip(questions, got):
        slow = [slow_logprob(lm, record.question, c) for c in record.choices]
        assert row == pytest.approx([s for s, _ in slow], abs=2e-4)
        means = [s / n for (s, _), n in zip(slow, lengths)]
        right.append(float(int(np.argmax(means)) == record.choices.index(record.answer)))
        exact.append(float(all(slow[record.choices.index(record.answer)][1])))
    choice = metrics.multiple_choice(lm, questions)
    assert choice.values == right
    assert choice.mean == pytest.approx(np.mean(right))
    assert metrics.cloze(lm, questions).values == exact


def test_choices_are_compared_per_token_and_a_tie_is_wrong(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(tuple(Record(question="q", answer="a", choices=("a", "b", "c")) for _ in range(3)))
    rows = [
        [(-4.0, 4), (-2.0, 1), (-9.0, 3)],  # the sum prefers b, the mean a
        [(-2.0, 2), (-1.0, 1), (-9.0, 3)],  # tie
        [(-2.0, 1), (-1.0, 1), (-9.0, 3)],
    ]
    monkeypatch.setattr(metrics, "_choice_scores", lambda *_: rows)
    assert metrics.multiple_choice(llama, corpus).values == [1.0, 0.0, 0.0]


def test_cloze_counts_what_greedy_decoding_produces(llama: LanguageModel) -> None:
    question = "Mara keeps the"
    ids = torch.tensor([[llama.bos_id, *llama.tokenizer(question, add_special_tokens=False).input_ids]])
    for _ in range(3):
        ids = torch.cat([ids, llama.logits(ids)[:, -1:].argmax(-1)], 1)
    own = llama.tokenizer.decode(ids[0, -3:])
    wrong = llama.tokenizer.decode([*ids[0, -3:-1].tolist(), (int(ids[0, -1]) + 1) % llama.d_vocab])
    # The text of three greedy tokens need not tokenise back into them, so the window is built directly.
    window = metrics.Window(tuple(ids[0].tolist()), ids.shape[1] - 3, 0)
    other = metrics.Window((*window.ids[:-1], (window.ids[-1] + 1) % llama.d_vocab), window.answer_start, 1)
    corpus = Corpus((Record(question=question, answer=own), Record(question=question, answer=wrong)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_answer_windows", lambda *_: [window, other])
        assert metrics.cloze(llama, corpus).values == [1.0, 0.0]


def test_nll_matches_the_hugging_face_loss(lm: LanguageModel) -> None:
    corpus = Corpus(
        (
            Record(text="Mara keeps the old lantern in the harbour near the river."),
            Record(question="Tobin keeps the map in the", answer="old mill"),
            Record(text="Elsa keeps"),
        )
    )
    items = windows(corpus, lm)
    got = metrics.nll(lm, corpus)
    tokens = [len(w.ids) - w.answer_start for w in items]
    assert got.tokens == tokens
    for w, value in zip(items, got.values):
        ids = torch.tensor([w.ids])
        labels = ids.clone()
        labels[:, : w.answer_start] = -100
        with torch.no_grad():
            assert value == pytest.approx(lm.model(input_ids=ids, labels=labels).loss.item(), abs=2e-4)
    assert got.per_token == pytest.approx(np.average(got.values, weights=tokens))
    assert got.mean == pytest.approx(np.mean(got.values))


def test_token_losses_do_not_depend_on_the_batch_and_keep_the_order(lm: LanguageModel) -> None:
    items = windows(Corpus.of(["Mara keeps the old lantern.", "Elsa", "Tobin keeps the map near the mill."]), lm)
    together = metrics.token_losses(lm, items)
    assert [len(t) for t in together] == [len(w.ids) - 1 for w in items]
    for w, losses in zip(items, together):
        torch.testing.assert_close(losses, metrics.token_losses(lm, [w])[0], atol=2e-4, rtol=1e-4)


def test_long_texts_are_scored_whole_and_long_questions_keep_their_answer(llama: LanguageModel) -> None:
    text = "Mara keeps the old lantern in the harbour near the river. " * 12
    n = len(llama.tokenizer(text, add_special_tokens=False).input_ids)
    assert n > 2 * llama.max_length
    assert metrics.nll(llama, Corpus.of([text])).tokens == [n]  # BOS precedes each window, so none is lost
    long = Corpus((Record(question=text.strip(), answer="old mill", choices=("old mill", "tower")),))
    tail = llama.tokenizer(text.strip() + " old mill", add_special_tokens=False).input_ids
    ids = torch.tensor([[llama.bos_id, *tail[-(llama.max_length - 1) :]]])
    logprobs = llama.logits(ids)[0].log_softmax(-1).detach()
    k = len(llama.tokenizer(" old mill", add_special_tokens=False).input_ids)
    want = sum(float(logprobs[i - 1, ids[0, i]]) for i in range(ids.shape[1] - k, ids.shape[1]))
    assert metrics.answer_logprobs(llama, long)[0][0] == pytest.approx(want, abs=2e-4)


def test_records_with_nothing_to_predict_are_left_out(checkpoints: Any) -> None:
    gpt2 = LanguageModel.open(checkpoints("gpt2"), device="cpu")  # no BOS: one token predicts nothing
    scored = metrics.nll(gpt2, Corpus.of(["a", "Mara keeps the map."]))
    assert scored.records == [1]


def test_samples_are_the_greedy_continuations(llama: LanguageModel) -> None:
    prompts = ["Mara keeps", "Tobin keeps the old map in the"]
    for prompt, text in zip(prompts, metrics.samples(llama, prompts, 6)):
        ids = torch.tensor([[llama.bos_id, *llama.tokenizer(prompt, add_special_tokens=False).input_ids]])
        start = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, llama.logits(ids)[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == llama.tokenizer.eos_token_id:
                break
        assert text == llama.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_bad_input_is_refused_by_record(llama: LanguageModel) -> None:
    plain = Corpus((ask(0), Record(text="no question")), "mixed")
    with pytest.raises(CorpusError, match="mixed, record 2"):
        metrics.answer_logprobs(llama, plain)
    with pytest.raises(CorpusError, match="mixed, record 2"):
        metrics.cloze(llama, plain)
    with pytest.raises(CorpusError, match="record 1: the answer is not among"):
        metrics.multiple_choice(llama, Corpus((Record(question="q", answer="x", choices=("a", "b")),)))
    next(llama.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        metrics.nll(llama, Corpus.of(["Mara keeps the map."]))


# --- evaluation and comparison -----------------------------------------------------------------------------


def test_groups() -> None:
    assert group_of(ask(0, set="forget", phrasing="held_out")) == "forget/held_out"
    assert group_of(ask(0, set="near", phrasing="seen", entity_status="untouched")) == "near/untouched"
    assert group_of(ask(0, set="far")) == "far"
    assert group_of(ask(0, topic="x")) == "all"


def test_evaluate_groups_and_stays_free_of_text(llama: LanguageModel, questions: Corpus) -> None:
    texts = {"retain": Corpus.of(["Mara keeps the old lantern.", "Elsa keeps the map."])}
    got = evaluate(llama, questions=questions, texts=texts, prompts=[])
    assert list(got["groups"]) == ["forget/held_out", "forget/seen", "near/seen", "near/untouched"]
    slow = metrics.multiple_choice(llama, questions)
    for group, found in got["groups"].items():
        mine = [i for i, r in enumerate(questions) if group_of(r) == group]
        part = found["multiple_choice"]
        assert part["values"] == [slow.values[i] for i in mine]
        assert part["ids"] == [questions.records[i].id[:16] for i in mine]
        assert part["n"] == 3
        assert part["chance"] == 0.25
        assert part["low"] <= part["mean"] <= part["high"]
    written = json.dumps(got, allow_nan=False)
    assert not any(word in written for word in ("lantern", "keeps", *NAMES))
    assert got["texts"]["retain"]["per_token"] == pytest.approx(metrics.nll(llama, texts["retain"]).per_token)
    quoted = evaluate(llama, questions=None, texts=None, prompts=["Mara keeps"])
    assert quoted["groups"] == {}
    assert quoted["samples"] == [{"prompt": "Mara keeps", "text": metrics.samples(llama, ["Mara keeps"])[0]}]


def test_worst_subgroups_are_best_remembered_where_forgotten(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [ask(i, set=s, topic="t", attribute=f"a{i}") for s in ("forget", "far") for i in range(5)]
    values = [1.0, 0.0, 1.0, 1.0, 0.0] * 2
    monkeypatch.setattr(
        "saeunlearn.evaluation.evaluate.multiple_choice",
        _named(
            "multiple_choice",
            lambda *_, **__: metrics.Values("multiple_choice", values, [*range(10)], [1] * 10),
        ),
    )
    groups = evaluate(llama, questions=Corpus(tuple(records)), texts=None, prompts=[])["groups"]
    labels = {g: [s["label"] for s in m["multiple_choice"]["subgroups"]] for g, m in groups.items()}
    assert labels == {"forget": ["t × a0", "t × a2", "t × a3"], "far": ["t × a1", "t × a4", "t × a0"]}


def test_wilson_solves_its_quadratic_and_bootstrap_nears_the_normal_interval() -> None:
    for k, n in ((0, 10), (3, 10), (10, 10), (57, 200)):
        for bound in wilson(k, n):  # the interval's ends are where (p̂ − p)² = z² p (1 − p) / n
            assert (k / n - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, abs=1e-9)
    values = np.random.default_rng(3).normal(2.0, 1.0, 1000)
    low, high = bootstrap(values.tolist(), [1.0] * 1000)
    half = 1.96 * values.std() / 1000**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert bootstrap([1.0, 5.0], [3.0, 1.0])[1] == 5.0
    assert bootstrap(values.tolist(), [1.0] * 1000) == (low, high)  # seeded


def test_compare_pairs_records_and_the_table_lines_up() -> None:
    before, after = (
        document([1, 1, 1, 1, 1, 1, 0, 1], [2.0, 4.0]),
        document([0, 0, 1, 0, 0, 1, 0, 0], [3.0, 4.5]),
    )
    rows = compare(before, after)
    choice, loss = rows
    assert (choice["before"], choice["after"], choice["change"]) == (0.875, 0.25, -0.625)
    assert choice["ratio"] == pytest.approx(2 / 7)
    assert choice["low"] < -0.625 < choice["high"] <= 0
    assert (loss["before"], loss["after"]) == (pytest.approx(2.5), pytest.approx(3.375))
    lines = table(rows).splitlines()
    assert lines[2].split()[:7] == ["forget/seen", "multiple", "choice", "8", "0.875", "0.250", "-0.625"]
    assert len({line.index(cell) + len(cell) for line, cell in zip(lines[2:], ("0.875", "2.500"))}) == 1
    other = json.loads(json.dumps(after))
    other["groups"]["forget/seen"]["multiple_choice"]["ids"][0] = "z"
    with pytest.raises(ConfigError, match="same records"):
        compare(before, other)
    zero = compare(document([0] * 8, [1.0, 1.0]), after)[0]
    assert zero["ratio"] is None
    assert "–" in table([zero])
    assert json.dumps(combine(before, after), allow_nan=False)
    assert combine(before, after)["samples"] == [{"prompt": "p", "before": "knows", "after": "knows"}]


def document(hits: list[int], losses: list[float]) -> dict[str, Any]:
    """A hand-made result of `evaluate`; the two texts have 3 and 1 tokens."""
    ids = [f"r{i}" for i in range(len(hits))]
    mean = sum(hits) / len(hits)
    choice = {
        "n": len(hits),
        "mean": mean,
        "low": 0.0,
        "high": 1.0,
        "chance": 0.25,
        "ids": ids,
        "values": hits,
    }
    per_token = (3 * losses[0] + losses[1]) / 4
    text = {
        "n": 2,
        "per_token": per_token,
        "low": 0.0,
        "high": 9.0,
        "ids": ["a", "b"],
        "values": losses,
        "tokens": [3, 1],
    }
    return {
        "groups": {"forget/seen": {"multiple_choice": choice}},
        "texts": {"retain": text},
        "samples": [{"prompt": "p", "text": "knows"}],
    }


def _named(name: str, fn: Any) -> Any:
    fn.__name__ = name
    return fn
