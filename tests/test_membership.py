"""Membership inference against slow references, scikit-learn and the published scores' definitions."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from scipy.stats import hmean, mannwhitneyu
from sklearn.metrics import roc_auc_score

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError, CorpusError, OverlapError
from saeunlearn.evaluation import membership as mia
from saeunlearn.models import LanguageModel

TEXTS = Corpus(
    (
        *(Record(text=t) for t in SENTENCES[:3]),
        Record(question="Tobin keeps the map in the", answer="old mill near the river"),
        Record(text="Elsa keeps"),
    ),
    "texts",
)


def slow_scores(lm: LanguageModel, record: Record, k: float) -> tuple[float, float, float]:
    """(loss, min-k, min-k++) of one record, token by token in float64."""
    ids = lm.tokenizer(record.full_text, add_special_tokens=False).input_ids
    start = len(lm.tokenizer(record.question, add_special_tokens=False).input_ids) if record.question else 0
    if lm.bos_id is not None:
        ids, start = [lm.bos_id, *ids], start + 1
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0].double().numpy()
    plain, standard = [], []
    for t in range(max(1, start), len(ids)):
        row = logits[t - 1]
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        mean = sum(np.exp(v) * v for v in log_p)
        variance = sum(np.exp(v) * (v - mean) ** 2 for v in log_p)
        plain.append(log_p[ids[t]])
        standard.append((log_p[ids[t]] - mean) / variance**0.5)
    n = max(1, int(k * len(plain)))
    return statistics.mean(plain), statistics.mean(sorted(plain)[:n]), statistics.mean(sorted(standard)[:n])


@pytest.mark.parametrize("k", [0.2, 0.4, 1.0])
def test_scores_match_a_slow_loop(lm: LanguageModel, k: float) -> None:
    got = mia.membership_scores(lm, TEXTS, k)
    assert tuple(got) == mia.ATTACKS
    for i, r in enumerate(TEXTS):
        slow = slow_scores(lm, r, k)
        assert [got[name].values[i] for name in mia.ATTACKS] == pytest.approx(slow, abs=5e-4)
    if k == 1:
        assert got["min_k"].values == pytest.approx(got["loss"].values)


def test_a_model_that_is_sure_gives_finite_scores(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.lm_head.weight.mul_(1e4)
    for values in mia.membership_scores(llama, TEXTS).values():
        assert np.isfinite(values.values).all()


def test_long_texts_are_scored_over_all_their_windows(llama: LanguageModel) -> None:
    long = Record(text=" ".join(SENTENCES[:8]))
    got = mia.membership_scores(llama, Corpus((long,)))["loss"]
    n = len(llama.tokenizer(long.text, add_special_tokens=False).input_ids)
    assert n > llama.max_length
    assert got.tokens == [n]


def test_auc_is_that_of_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.integers(0, 8, rng.integers(1, 30)).astype(float)  # many ties
        b = rng.integers(0, 6, rng.integers(1, 30)).astype(float)
        got = mia.auc(a, b)
        labels = [1] * len(a) + [0] * len(b)
        assert got == pytest.approx(roc_auc_score(labels, [*a, *b]))
        assert got == pytest.approx(mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    assert mia.auc([1.0], [1.0]) == 0.5
    with pytest.raises(CorpusError, match="needs members and holdout"):
        mia.auc([], [1.0])
    with pytest.raises(ConfigError, match="not a number"):
        mia.auc([float("nan")], [1.0])


def test_the_interval_of_an_auc_covers() -> None:
    rng = np.random.default_rng(1)
    shift = 1.2  # two unit normals: AUC = Φ(1.2 / √2) = .802
    true, inside, runs = 0.80193, 0, 600
    for _ in range(runs):
        area = mia.auc(rng.normal(shift, 1, 30), rng.normal(0, 1, 40))
        low, high = mia.auc_interval(area, 30, 40)
        assert low < area < high
        inside += low <= true <= high
    assert 0.92 < inside / runs < 0.99
    low, high = mia.auc_interval(1.0, 20, 20)
    assert 0.7 < low < 0.99
    assert high == 1.0
    assert mia.auc_interval(0.0, 20, 20) == pytest.approx((0.0, 1 - low))


def test_membership_document(llama: LanguageModel) -> None:
    members, holdout = Corpus.of(SENTENCES[:6], "members"), Corpus.of(SENTENCES[6:13], "holdout")
    doc = mia.membership(llama, members, holdout, k=0.4)
    json.dumps(doc, allow_nan=False)
    scores = [mia.membership_scores(llama, c, 0.4) for c in (members, holdout)]
    for name in mia.ATTACKS:
        found = doc["attacks"][name]
        assert (found["members"], found["holdout"]) == (scores[0][name].values, scores[1][name].values)
        assert found["auc"] == pytest.approx(roc_auc_score([1] * 6 + [0] * 7, found["members"] + found["holdout"]))
    assert doc["members"]["ids"] == [r.id[:16] for r in members]
    assert not any(s in json.dumps(doc) for s in SENTENCES[:13])
    with pytest.raises(OverlapError, match="1 of 6 records of members are also in holdout"):
        mia.membership(llama, members, Corpus.of([SENTENCES[0].upper(), SENTENCES[9]], "holdout"))
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        mia.membership_scores(llama, members, k=0.0)


def test_priv_leak_has_the_orientation_of_muse() -> None:
    assert mia.priv_leak(0.5, 0.5) == 0
    assert mia.priv_leak(1.0, 0.5) == -100  # every forget record still looks like a member
    assert mia.priv_leak(0.0, 0.5) == 100  # over-unlearned
    assert mia.priv_leak(0.7, 0.6) == pytest.approx(-25)
    with pytest.raises(ConfigError, match="AUC 1"):
        mia.priv_leak(0.5, 1.0)


def test_the_mia_score_of_semeval() -> None:
    for area, score in ((0.5, 1), (1.0, 0), (0.0, 0), (0.75, 0.5), (0.25, 0.5)):
        assert mia.mia_score(area) == pytest.approx(score)


def subtask(forget: tuple[float, float], retain: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {s: dict(zip(("regurgitation", "knowledge"), v)) for s, v in (("forget", forget), ("retain", retain))}


def test_the_task_aggregate_is_a_harmonic_mean_of_twelve() -> None:
    scores = {
        "creative": subtask((0.2, 0.1), (0.9, 0.8)),
        "biographies": subtask((0.5, 0.0), (1.0, 0.7)),
        "documents": subtask((0.3, 0.4), (0.6, 0.95)),
    }
    flat = [0.8, 0.9, 0.9, 0.8, 0.5, 1.0, 1.0, 0.7, 0.7, 0.6, 0.6, 0.95]
    assert mia.task_aggregate(scores) == pytest.approx(hmean(flat))
    scores["creative"] = subtask((1.0, 0.0), (0.9, 0.9))  # all of one forget set is still said
    assert mia.task_aggregate(scores) == 0
    for bad in ({"creative": {"forget": {"regurgitation": 0.2}}}, {"creative": subtask((0.2, 1.2), (0, 0))}):
        with pytest.raises(ConfigError, match="creative, forget: knowledge must be between 0 and 1"):
            mia.task_aggregate(bad)
    with pytest.raises(ConfigError, match="no subtask"):
        mia.task_aggregate({})
