"""Memorisation metrics against slow loops, rouge_score itself and hand-worked cases."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError, CorpusError, ModelError
from saeunlearn.evaluation import memorisation as mem
from saeunlearn.evaluation import metrics
from saeunlearn.evaluation.evaluate import METRICS, combine, evaluate, table
from saeunlearn.models import LanguageModel

PAIRS = Corpus(
    tuple(
        Record(question=f"{name} keeps the", answer=answer, meta={"set": s, "topic": "keepers"})
        for name, answer, s in (
            ("Mara", "old lantern in the mill", "forget"),
            ("Tobin", "map", "forget"),
            ("Elsa and Quill", "violin near the river.", "near"),
            ("Rufus", "kettle in the harbour", "near"),
        )
    ),
    "pairs",
)


def hit_rows(monkeypatch: pytest.MonkeyPatch, *rows: list[int]) -> Corpus:
    monkeypatch.setattr(mem, "answer_hits", lambda *_: [torch.tensor(r, dtype=torch.float32) for r in rows])
    return Corpus(PAIRS.records[:1] * len(rows))


def test_extraction_strength_by_hand(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = hit_rows(monkeypatch, [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0], [1])
    got = mem.extraction_strength(llama, corpus)
    assert got.values == [1.0, 0.5, 0.25, 0.0, 0.0, 1.0]
    assert got.tokens == [4, 4, 4, 4, 1, 1]
    assert mem.exact_memorisation(llama, corpus).values == [1.0, 0.5, 0.75, 0.75, 0.0, 1.0]


def test_teacher_forced_metrics_match_a_slow_loop(lm: LanguageModel) -> None:
    # Own greedy words stand in some answers, or a random model would hit nothing.
    records = list(PAIRS)
    for q in ("Selma keeps the", "Odette keeps"):
        said = lm.generate([q], max_new_tokens=4)[0].strip()
        records.append(Record(question=q, answer=f"{said} map" if said else "map"))
    corpus = Corpus(tuple(records))
    strength, exact = mem.extraction_strength(lm, corpus), mem.exact_memorisation(lm, corpus)
    prob = metrics.probability(lm, corpus)
    for i, r in enumerate(corpus):
        head = ([] if lm.bos_id is None else [lm.bos_id]) + lm.tokenizer(r.question, add_special_tokens=False).input_ids
        whole = ([] if lm.bos_id is None else [lm.bos_id]) + lm.tokenizer(
            f"{r.question} {r.answer}", add_special_tokens=False
        ).input_ids
        answer = whole[len(head) :]
        assert whole[: len(head)] == head
        shortest = len(answer)
        for k in range(len(answer), -1, -1):  # decode for real from every prefix
            ids = whole[: len(head) + k]
            while len(ids) < len(whole):
                with torch.no_grad():
                    ids = [*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids != whole:
                break
            shortest = k
        assert strength.values[i] == pytest.approx(1 - shortest / len(answer))
        with torch.no_grad():
            log_p = lm.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        steps = range(len(head) - 1, len(whole) - 1)
        right = [int(log_p[t].argmax()) == whole[t + 1] for t in steps]
        assert exact.values[i] == pytest.approx(sum(right) / len(right))
        mean = sum(float(log_p[t, whole[t + 1]]) for t in steps) / len(answer)
        assert prob.values[i] == pytest.approx(math.exp(mean), rel=1e-4)
        assert prob.tokens[i] == strength.tokens[i] == len(answer)
    assert metrics.cloze(lm, corpus).values == [float(v == 1) for v in strength.values]


def test_generations_are_those_of_one_prompt_alone(lm: LanguageModel) -> None:
    got = mem.generations(lm, PAIRS, max_new_tokens=6)
    for r, text in zip(PAIRS, got):
        ids = lm.tokenizer(r.question, add_special_tokens=False).input_ids
        ids = torch.tensor([([] if lm.bos_id is None else [lm.bos_id]) + ids])
        n = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, lm.model(ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == lm.tokenizer.eos_token_id:
                    break
        assert text == lm.tokenizer.decode(ids[0, n:], skip_special_tokens=True)
    assert mem.new_tokens(lm) == 32  # half of the context
    assert mem.new_tokens(lm, 6) == 6
    with pytest.raises(ModelError, match="fill the context"):
        mem.generations(lm, PAIRS, max_new_tokens=64)
    with pytest.raises(CorpusError, match="record 1: a question is needed"):
        mem.generations(lm, Corpus.of(["no question"]))


def test_generations_go_through_the_chat_template(llama: LanguageModel) -> None:
    plain = mem.generations(llama, PAIRS, 5)
    llama.tokenizer.chat_template = "{% for m in messages %}old map {{ m.content }} of{% endfor %}"
    templated = mem.generations(llama, PAIRS, 5)
    assert templated == [llama.generate([f"old map {r.question} of"], 5)[0] for r in PAIRS]
    assert templated != plain


def test_rouge_is_that_of_the_library() -> None:
    said = ["the old lanterns in a mill", "", "violin violin near river", "kettle in the harbour and the mill"]
    recall, f1 = mem.rouge_l(PAIRS, said)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for i, (r, text) in enumerate(zip(PAIRS, said)):
        direct = scorer.score(target=r.answer, prediction=text)["rougeL"]
        assert (recall.values[i], f1.values[i]) == (direct.recall, direct.fmeasure)
    # By hand: old lantern(s) in … mill are 4 of the answer's 5 words and of the 6 said; the stemmer joins lantern(s).
    assert recall.values[0] == pytest.approx(4 / 5)
    assert f1.values[0] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert recall.values[1] == 0.0
    assert recall.values[3] == 1.0 > f1.values[3]
    with pytest.raises(CorpusError, match="3 generated texts for the 4 records"):
        mem.rouge_l(PAIRS, said[:3])


def test_repetition_counts_repeated_n_grams(llama: LanguageModel) -> None:
    texts = ["Mara keeps the old lantern in the harbour near the river.", "the mill " * 10, "", "map"]
    for n in (1, 2, 4):
        got = mem.repetition(llama, texts, n)
        for text, value, count in zip(texts, got.values, got.tokens):
            ids = llama.tokenizer(text, add_special_tokens=False).input_ids
            seen: list[Any] = []
            repeated = 0
            for i in range(len(ids) - n + 1):
                repeated += ids[i : i + n] in seen
                seen.append(ids[i : i + n])
            assert count == len(seen)
            assert value == pytest.approx(repeated / len(seen) if seen else 0.0)
    assert mem.repetition(llama, texts).values == mem.repetition(llama, texts, 4).values
    assert mem.repetition(llama, texts).values[1] > 0.5 > mem.repetition(llama, texts).values[0]
    assert mem.repetition(llama, []).values == []


def test_perplexity_is_that_of_the_reference(llama: LanguageModel) -> None:
    said = ["old map near the mill", "", "violin", "  "]
    got = mem.perplexity(llama, PAIRS, said)
    assert got.records == [0, 2]
    for i, value in zip(got.records, got.values):
        prompt, whole = PAIRS.records[i].question, f"{PAIRS.records[i].question} {said[i]}"
        ids = torch.tensor([[llama.bos_id, *llama.tokenizer(whole, add_special_tokens=False).input_ids]])
        labels = ids.clone()
        labels[:, : 1 + len(llama.tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
        with torch.no_grad():
            assert value == pytest.approx(float(llama.model(input_ids=ids, labels=labels).loss.exp()), rel=1e-3)
    assert mem.perplexity(llama, PAIRS, [""] * 4).n == 0  # a model that says nothing is no error


# --- in evaluate -------------------------------------------------------------------------------------------


def test_every_metric_by_group(llama: LanguageModel) -> None:
    plain = evaluate(llama, questions=PAIRS, texts={"near": PAIRS}, prompts=())
    whole = evaluate(llama, questions=PAIRS, texts={"near": PAIRS}, prompts=(), metrics=METRICS)
    asked = [m for m in METRICS if m not in ("nll", "multiple_choice")]
    assert set(whole["groups"]["forget"]) == set(asked)
    json.dumps(whole, allow_nan=False)
    direct = {v.name: v.values for v in mem.memorisation(llama, PAIRS)}
    for name, values in direct.items():
        for group, part in (("forget", slice(0, 2)), ("near", slice(2, 4))):
            m = whole["groups"][group][name]
            assert m["values"] == values[part]
            assert m["mean"] == pytest.approx(sum(values[part]) / 2)
            assert m["low"] <= m["mean"] <= m["high"]
            assert m["chance"] is None
    for group, found in whole["groups"].items():  # nothing else changed
        assert {k: v for k, v in found.items() if k in plain["groups"][group]} == plain["groups"][group]
    assert {k: v for k, v in whole.items() if k != "groups"} == {k: v for k, v in plain.items() if k != "groups"}
    rows = combine(whole, whole)["comparison"]
    assert "exact memorisation" in table(rows)
    assert all(r["change"] == 0 for r in rows)


def test_only_what_was_asked_for_is_measured(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mem, "generations", lambda *_: pytest.fail("answers were generated for nothing"))
    got = evaluate(llama, questions=PAIRS, texts={"near": PAIRS}, prompts=(), metrics=("extraction_strength",))
    assert got["texts"] == {}
    assert all(set(m) == {"extraction_strength"} for m in got["groups"].values())
    for measure in (lambda: mem.memorisation(llama, PAIRS, ["rouge"]),
                    lambda: evaluate(llama, questions=PAIRS, texts=None, prompts=(), metrics=["rouge"])):  # fmt: skip
        with pytest.raises(ConfigError, match=r"unknown metrics \['rouge'\]; known: .*rouge_l_recall"):
            measure()


def test_names_are_unique_and_in_order(llama: LanguageModel) -> None:
    assert len(set(METRICS)) == len(METRICS)
    assert all(a != b for a, b in pairwise(METRICS))
    asked = ["repetition", "probability", "rouge_l_f1"]
    assert [v.name for v in mem.memorisation(llama, PAIRS, asked, 4)] == asked
