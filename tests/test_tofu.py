"""TOFU's scores against slow loops, scipy and hand-worked cases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

from saeunlearn.corpus import Corpus
from saeunlearn.errors import ConfigError, CorpusError
from saeunlearn.evaluation import tofu
from saeunlearn.models import LanguageModel

PLACES = ("mill", "old harbour", "tower", "library near the river")


def rows(names: tuple[str, ...], paraphrased: bool) -> list[dict[str, Any]]:
    out = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {
            "question": f"{name} keeps the map in the", "answer": PLACES[i % 4],
            "perturbed_answer": [f"{p} of {name}" for p in PLACES if p != PLACES[i % 4]],
        }  # fmt: skip
        if paraphrased:
            row |= {"paraphrased_answer": f"the {PLACES[i % 4]}", "paraphrased_question": f"Where does {name} keep it?"}
        out.append(row)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files in TOFU's shape."""
    home = tmp_path_factory.mktemp("tofu")
    for name, names, paraphrased in (
        ("forget01", ("Mara", "Tobin", "Elsa"), True), ("retain", ("Quill", "Rufus"), True),
        ("real_authors", ("Odette", "Pim", "Selma"), False), ("world_facts", ("Pim", "Mara"), False),
    ):  # fmt: skip
        (home / f"{name}_perturbed.json").write_text(json.dumps(rows(names, paraphrased)))
    return home


def mean_log_prob(lm: LanguageModel, question: str, answer: str) -> float:
    head = [lm.bos_id, *lm.tokenizer(question, add_special_tokens=False).input_ids]
    ids = [*head, *lm.tokenizer(f" {answer}", add_special_tokens=False).input_ids]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(np.mean([float(log_p[t - 1, ids[t]]) for t in range(len(head), len(ids))]))


def other(llama: LanguageModel) -> LanguageModel:
    """A second model: the first with another output matrix."""
    twin = llama.copy()
    with torch.no_grad():
        twin.model.lm_head.weight.add_(0.1 * torch.randn(twin.model.lm_head.weight.shape))
    return twin


def test_loading_keeps_the_fields_of_tofu(folder: Path) -> None:
    corpora = tofu.load_tofu(folder)
    assert tuple(corpora) == tofu.SETS
    first = corpora["forget"].records[0]
    assert first.choices == ("mill", "old harbour of Mara", "tower of Mara", "library near the river of Mara")
    assert first.meta["paraphrased_answer"] == "the mill"
    assert first.meta["paraphrased_question"] == "Where does Mara keep it?"
    with pytest.raises(CorpusError, match=r"forget10_perturbed\.json does not exist"):
        tofu.load_tofu(folder, "forget10")


def test_truth_ratios_match_a_slow_loop(llama: LanguageModel, folder: Path) -> None:
    corpora = tofu.load_tofu(folder)
    for name in ("forget", "real_authors"):
        got = tofu.truth_ratios(llama, corpora[name])
        for i, r in enumerate(corpora[name]):
            true = math.exp(mean_log_prob(llama, r.question, str(r.meta.get("paraphrased_answer", r.answer))))
            wrong = [math.exp(mean_log_prob(llama, r.question, a)) for a in r.meta["perturbed_answer"]]
            assert got["arithmetic"].values[i] == pytest.approx(np.mean(wrong) / true, rel=1e-3)
            assert got["geometric"].values[i] == pytest.approx(np.prod(wrong) ** (1 / 3) / true, rel=1e-3)
    assert all(a >= g for a, g in zip(got["arithmetic"].values, got["geometric"].values))


def test_probability_normalised_over_the_choices(llama: LanguageModel, folder: Path) -> None:
    corpus = tofu.load_tofu(folder)["forget"]  # with paraphrased answers, which do not count here
    got = tofu.probability_normalised(llama, corpus)
    for r, value in zip(corpus, got.values):
        p = [math.exp(mean_log_prob(llama, r.question, a)) for a in r.choices]
        assert value == pytest.approx(p[0] / sum(p), rel=1e-3)


def test_extreme_probabilities_stay_finite(llama: LanguageModel, folder: Path) -> None:
    with torch.no_grad():
        llama.model.lm_head.weight.mul_(1e4)
    corpus = tofu.load_tofu(folder)["forget"]
    for values in (*tofu.truth_ratios(llama, corpus).values(), tofu.probability_normalised(llama, corpus)):
        assert np.isfinite(values.values).all()


def test_forget_quality_is_the_test_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 0.2, 40), rng.normal(0.5, 0.2, 40)
    got = tofu.forget_quality(a.tolist(), b.tolist())
    direct = ks_2samp(a, b)
    assert (got["p_value"], got["statistic"], got["n"]) == (direct.pvalue, direct.statistic, 40)
    assert tofu.forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])["p_value"] == 1
    # Two samples of 4 that do not overlap: 2 of the C(8, 4) = 70 orders are as extreme.
    assert tofu.forget_quality([1, 2, 3, 4], [5, 6, 7, 8])["p_value"] == pytest.approx(2 / 70)


def test_the_whole_document(llama: LanguageModel, folder: Path) -> None:
    corpora, oracle = tofu.load_tofu(folder), other(llama)
    doc = tofu.tofu_scores(llama, oracle, corpora, max_new_tokens=6)
    text = json.dumps(doc, allow_nan=False)
    assert not any(r.question in text or f'"{a}"' in text for c in corpora.values() for r in c for a in r.choices)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for name, corpus in corpora.items():
        found = doc["sets"][name]
        assert found["ids"] == [r.id[:16] for r in corpus]
        for i, r in enumerate(corpus):
            p = math.exp(mean_log_prob(llama, r.question, r.answer))
            assert found["probability"]["values"][i] == pytest.approx(p, rel=1e-3)
            said = llama.generate([r.question], 6)[0]
            assert found["rouge_l_recall"]["values"][i] == scorer.score(r.answer, said)["rougeL"].recall
    for kind in tofu.MEANS:
        ratios = {n: doc["sets"][n][f"truth_ratio_{kind}"]["values"] for n in tofu.SETS}
        reference = tofu.truth_ratios(oracle, corpora["forget"])[kind].values
        assert doc["forget_quality"][kind]["p_value"] == ks_2samp(ratios["forget"], reference).pvalue
        nine = [doc["sets"]["retain"]["probability"]["mean"]]
        nine += [doc["sets"][n]["probability_normalised"]["mean"] for n in ("real_authors", "world_facts")]
        nine += [doc["sets"][n]["rouge_l_recall"]["mean"] for n in tofu.SETS[1:]]
        nine += [float(np.maximum(0, 1 - np.array(ratios[n])).mean()) for n in tofu.SETS[1:]]
        assert sorted(doc["utility_parts"][kind].values()) == pytest.approx(sorted(nine))
        assert doc["model_utility"][kind] == pytest.approx(hmean(nine))
    assert tofu.tofu_scores(oracle, oracle, corpora, max_new_tokens=2)["forget_quality"]["geometric"]["p_value"] == 1


def test_bad_input(llama: LanguageModel, folder: Path) -> None:
    corpora = tofu.load_tofu(folder)
    with pytest.raises(ConfigError, match="world_facts not given"):
        tofu.tofu_scores(llama, llama, {k: v for k, v in corpora.items() if k != "world_facts"})
    bare = Corpus(tuple(r.__class__(question=r.question, answer=r.answer) for r in corpora["forget"]), "forget01")
    with pytest.raises(CorpusError, match=r"forget01, record 1: no perturbed answers; .*perturbed"):
        tofu.tofu_scores(llama, llama, {**corpora, "forget": bare})
