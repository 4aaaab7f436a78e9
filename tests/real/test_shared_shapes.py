"""TOFU and TinyStories as they are distributed, read by Corpus."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saeunlearn.corpus import Corpus, refuse_overlap, windows
from saeunlearn.errors import OverlapError
from saeunlearn.models import LanguageModel


@pytest.mark.parametrize(
    ("file", "n", "choices"),
    [
        ("tofu/forget01.json", 40, 0),
        ("tofu/forget10.json", 400, 0),
        ("tofu/retain90.json", 3600, 0),
        ("tofu/holdout10.json", 400, 0),
        ("tofu/real_authors.json", 100, 4),
        ("tofu/world_facts.json", 117, 4),
        ("tofu/forget01_perturbed.json", 40, 6),
        ("tofu/world_facts_perturbed.json", 117, 4),
        ("tofu/idontknow.jsonl", 100, 0),
        ("tinystories/tinystories_1000.json", 1000, 0),
        ("tinystories/forget_birds_train.jsonl", 68, 0),
        ("tinystories/retain_test.jsonl", 178, 0),
    ],
)
def test_counts_and_choices(shared_data: Path, file: str, n: int, choices: int) -> None:
    corpus = Corpus.load(shared_data / file)
    assert len(corpus) == n
    assert {len(r.choices) for r in corpus} == {choices}
    is_text = "tinystories" in file or "idontknow" in file
    assert all(bool(r.text) == is_text and bool(r.question and r.answer) != is_text for r in corpus)
    assert all(r.answer in r.choices for r in corpus if choices)


def test_first_and_last_records(shared_data: Path) -> None:
    first = Corpus.load(shared_data / "tofu/forget01.json").records[0]
    assert first.question.startswith("What is the full name of the author born in Kuwait City")
    assert first.answer.endswith("is Basil Mahfouz Al-Kuwaiti.")
    perturbed = Corpus.load(shared_data / "tofu/forget01_perturbed.json").records[0]
    assert perturbed.choices[0] == perturbed.answer == first.answer
    assert str(perturbed.meta["paraphrased_answer"]).startswith("Basil Mahfouz Al-Kuwaiti is the complete name")
    assert Corpus.load(shared_data / "tofu/idontknow.jsonl").records[0].text == "I'm not certain about that."


def test_forget_retain_and_held_out_authors_are_disjoint(shared_data: Path) -> None:
    forget, retain, holdout = (
        Corpus.load(shared_data / f"tofu/{name}.json") for name in ("forget10", "retain90", "holdout10")
    )
    refuse_overlap(forget, retain)
    refuse_overlap(holdout, retain)
    refuse_overlap(holdout, forget)
    with pytest.raises(OverlapError, match="40 of 40 forget records are also in the retain set"):
        refuse_overlap(Corpus.load(shared_data / "tofu/forget01.json"), forget)


def test_long_stories_are_windowed_whole_on_a_real_model(shared_data: Path) -> None:
    lm = LanguageModel.open(shared_data / "stories260K", device="cpu")
    corpus = Corpus.load(shared_data / "tinystories/retain_test.jsonl").sample(40, 0)
    found = windows(corpus, lm)
    assert max(len(w.ids) for w in found) == lm.max_length == 512
    assert len(found) > len(corpus)
    assert {w.ids[0] for w in found} == {1}  # <s>
    for i, record in enumerate(corpus):
        ids = [t for w in found if w.record == i for t in w.ids[1:]]
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        assert re.sub(r"\s+", "", text) == re.sub(r"\s+", "", record.text)
