"""Forget records turned into matched retain records."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeunlearn.cli import main
from saeunlearn.corpus import Corpus, Record, refuse_overlap
from saeunlearn.diversify import diversify
from saeunlearn.errors import ConfigError, CorpusError

FORGET = Corpus(
    (
        Record(text="Aspirin thins the blood; ASPIRIN is old.", meta={"set": "forget", "topic": "drugs"}),
        Record(question="Who found acetylsalicylic acid or aspirin?", answer="Aspirin was found by Mara.",
               choices=("Aspirin was found by Mara.", "Nobody found aspirin.")),
        Record(text="Aspirins are sold everywhere."),
    ),
    "drugs",
)  # fmt: skip


def test_the_concept_is_swapped_and_the_template_stays() -> None:
    made = diversify(FORGET, ["aspirin", "acetylsalicylic acid"], ["sugar", "tea"], seed=0)
    refuse_overlap(FORGET, made)
    text, pair = made.records  # "Aspirins" is another word
    assert text.text in ("Sugar thins the blood; Sugar is old.", "Tea thins the blood; Tea is old.")
    assert text.meta == {"set": "near", "topic": "drugs"}
    swapped = {"sugar": "tea", "tea": "sugar"}
    drug = next(w for w in swapped if f"or {w}?" in pair.question)  # two concepts become two others
    assert pair.question == f"Who found {swapped[drug]} or {drug}?"
    assert pair.answer == f"{drug.capitalize()} was found by Mara."
    assert pair.answer in pair.choices
    assert pair.choices[1] == f"Nobody found {drug}."


def test_the_concept_is_removed() -> None:
    made = diversify(Corpus.of(["The old Aspirin works.", "Aspirin works well.", "Aspirin"]), ["aspirin"], [], seed=0)
    assert [r.text for r in made] == ["The old works.", "Works well."]


def test_copies_differ_and_the_seed_decides() -> None:
    corpus = Corpus.of([f"{n} likes aspirin." for n in "ABCDEFGH"])
    others = ["tea", "milk", "rain", "snow", "wind"]
    three = diversify(corpus, ["aspirin"], others, seed=1, copies=3)
    assert len({r.id for r in three}) == len(three) > len(corpus)
    assert three == diversify(corpus, ["aspirin"], others, seed=1, copies=3)
    assert three != diversify(corpus, ["aspirin"], others, seed=2, copies=3)


@pytest.mark.parametrize(
    ("concepts", "others", "error", "message"),
    [
        ([], ["tea"], ConfigError, "at least one"),
        (["Tea"], ["tea"], ConfigError, "tea"),
        (["ibuprofen"], ["tea"], CorpusError, "ibuprofen"),
    ],
)
def test_bad_input(concepts: list[str], others: list[str], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        diversify(FORGET, concepts, others, seed=0)


@pytest.mark.slow
def test_the_command_writes_a_retain_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forget.txt").write_text("The aspirin is white.\nMara sells aspirin.\n")
    (tmp_path / "retain.txt").write_text("The tea is white.\nThe sky is blue.\n")
    out = tmp_path / "more.jsonl"
    command = ["diversify", "--forget", str(tmp_path / "forget.txt"), "--concept", "aspirin", "--swap", "tea"]
    assert main([*command, "--retain", str(tmp_path / "retain.txt"), "--out", str(out)]) == 0
    assert [r.text for r in Corpus.load(out)] == ["The tea is white.", "The sky is blue.", "Mara sells tea."]
    assert "3 retain records" in capsys.readouterr().out
    assert main([*command, "--copies", "0", "--out", str(out)]) == 1
    assert "--copies" in capsys.readouterr().err
