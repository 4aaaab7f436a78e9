"""TOFU's own files and a real pretrained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ks_2samp

from saeunlearn.corpus import Corpus
from saeunlearn.evaluation.membership import membership
from saeunlearn.evaluation.tofu import load_tofu, tofu_scores, truth_ratios
from saeunlearn.models import LanguageModel


def test_the_files_hold_what_the_truth_ratio_needs(shared_data: Path) -> None:
    corpora = load_tofu(shared_data / "tofu")
    assert {k: len(v) for k, v in corpora.items()} == {
        "forget": 40, "retain": 400, "real_authors": 100, "world_facts": 117,
    }  # fmt: skip
    for name, wrong in (("forget", 5), ("retain", 5), ("real_authors", 3), ("world_facts", 3)):
        for r in corpora[name]:
            assert len(r.choices) == 1 + wrong
            assert bool(r.meta.get("paraphrased_answer")) == (name in ("forget", "retain"))
    plain = Corpus.load(shared_data / "tofu/forget01.json")
    assert [r.id for r in corpora["forget"]] == [r.id for r in plain]


@pytest.mark.slow
def test_a_pretrained_model_that_never_saw_them(shared_data: Path) -> None:
    model = LanguageModel.open(shared_data / "stories260K", device="cpu")
    corpora = {k: Corpus(v.records[:6], k) for k, v in load_tofu(shared_data / "tofu").items()}
    doc = tofu_scores(model, model, corpora, max_new_tokens=8)
    assert doc["forget_quality"]["arithmetic"]["p_value"] == 1
    # To a model that knows neither author nor facts, a perturbed answer is about as likely as the true one.
    for name in ("forget", "retain"):
        assert 0.5 < doc["sets"][name]["truth_ratio_geometric"]["mean"] < 2
    assert doc["model_utility"]["geometric"] < 0.3
    # Nobody would say this answer: the test has to notice.
    odd = Corpus(tuple(replace(r, meta={"paraphrased_answer": "Zqx vbk!"}) for r in corpora["forget"]))
    ratios = truth_ratios(model, odd)["geometric"].values
    assert min(ratios) > 2
    assert ks_2samp(ratios, doc["oracle_truth_ratio"]["geometric"]).pvalue < 0.01
    # Neither was ever trained on. The two authors of forget01 alone are no match for the twenty of holdout10.
    members, holdout = (
        Corpus.load(shared_data / f"tofu/{name}.json").sample(40, 0) for name in ("forget10", "holdout10")
    )
    attacks = membership(model, members, holdout)["attacks"]
    assert all(a["low"] < 0.5 < a["high"] for a in attacks.values())
