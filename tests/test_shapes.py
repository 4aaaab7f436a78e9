"""Every data set's rows, as they are published, from small files; CSV and Parquet; sets and splits by name."""

from __future__ import annotations

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import CorpusError
from saeunlearn.evaluation.evaluate import group_of

LUME = {"id": "65911093qa0", "input": "Where does Mara live?", "output": "In the mill", "task": "Task2",
        "split": "retain"}  # fmt: skip
TOFU = {"question": "Who is Mara?", "answer": "A keeper.", "paraphrased_question": "Mara is who?",
        "paraphrased_answer": "She keeps.", "perturbed_answer": ["A cook.", "A pilot."]}  # fmt: skip
OPTIONS = {"question": "Where?", "option1": "Berlin", "option2": "Paris", "answer": "Paris"}
WMDP = {"answer": 2, "question": "Which?", "choices": ["a", "b", "c", "d"]}
RWKU = {"query": "Mara keeps the ___.", "answer": "lantern", "level": "1", "type": "cloze", "subject": "Mara"}
PASSAGE = {"id": "Mara 0", "text": "Mara keeps a lantern.", "subject": "Mara", "intro": "Mara is a keeper."}
PAPER = {"title": "On mills", "abstract": "Mills.", "text": "Mills turn.", "doi": "10.1/2"}

SHAPES = [
    ("forget10_perturbed", TOFU, "forget", ("Who is Mara?", "A keeper."), ("A keeper.", "A cook.", "A pilot.")),
    ("retain90", {"question": "Q", "answer": "A"}, "retain", ("Q", "A"), ()),
    ("holdout10", {"question": "Q", "answer": "A"}, "holdout", ("Q", "A"), ()),
    ("world_facts", OPTIONS, "world_facts", ("Where?", "Paris"), ("Berlin", "Paris")),
    ("real_authors_perturbed", TOFU, "real_authors", ("Who is Mara?", "A keeper."), None),
    ("forget-qa", {"question": "Q", "answer": "A"}, "forget", ("Q", "A"), ()),
    ("verbmem", {"prompt": "Mara keeps", "gt": "a lantern."}, None, ("Mara keeps", "a lantern."), ()),
    ("wmdp-bio", WMDP, None, ("Which?", "c"), ("a", "b", "c", "d")),
    ("mmlu", {**WMDP, "subject": "anatomy"}, None, ("Which?", "c"), ("a", "b", "c", "d")),
    ("cyber-forget-corpus", {"text": "Mills turn."}, "forget", "Mills turn.", ()),
    ("bio-forget-corpus", PAPER, "forget", "Mills turn.", ()),
    ("anything", LUME, "retain", ("Where does Mara live?", "In the mill"), ()),
    ("forget_level1", RWKU, "forget", ("Mara keeps the ___.", "lantern"), ()),
    ("neighbor_level2", {**RWKU, "level": "2"}, "near", ("Mara keeps the ___.", "lantern"), ()),
    ("passage", PASSAGE, None, "Mara keeps a lantern.", ()),
    ("forget_mia", PASSAGE, "forget", "Mara keeps a lantern.", ()),
    ("my_forget_notes", {"text": "Mine."}, None, "Mine.", ()),
]


def only(path: Path | str, **kwargs: Any) -> Record:
    (record,) = Corpus.load(path, **kwargs)
    return record


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("name", "row", "said", "words", "choices"), SHAPES)
def test_published_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, row: dict[str, Any], said: str | None,
    words: Any, choices: tuple[str, ...] | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    file = tmp_path / f"{name}.{kind}"
    if kind == "parquet":
        import pandas

        pandas.DataFrame([row]).to_parquet(file)
    else:
        file.write_text(json.dumps([row] if kind == "json" else row))
    record = only(file)
    assert (record.text or (record.question, record.answer)) == words
    assert choices is None or record.choices == choices
    assert record.meta.get("set") == said
    assert group_of(record) == (said or "all")
    used = {"text"} if record.text else {"choices", "question", "answer", "query", "prompt", "gt", "input", "output"}
    assert {k: v for k, v in row.items() if k not in used}.items() <= record.meta.items()


def test_what_a_row_says_itself_comes_before_names(tmp_path: Path) -> None:
    def load(name: str, row: dict[str, Any]) -> Record:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row))
        return only(file)

    assert load("forget10", {"question": "Q", "answer": "A", "set": "far"}).meta["set"] == "far"
    lume = load("forget10", LUME)
    assert (lume.meta["set"], lume.meta["topic"], lume.meta["task"], lume.meta["split"]) == (
        "retain", "Task2", "Task2", "retain",
    )  # fmt: skip
    assert load("x", {**LUME, "set": "far"}).meta["set"] == "far"
    for odd in ({**LUME, "split": "train"}, {k: v for k, v in LUME.items() if k != "task"}):
        assert "set" not in load("x", odd).meta  # not LUME's: nothing is said
    for name in ("forget", "forget1", "retain", "neighbors", "xforget10", "train"):
        assert "set" not in load(name, {"text": "One."}).meta


def test_csv_keeps_every_value_as_it_is_written(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "input": 'A "long" one,\nin two\u2028lines', "output": "1956", "task": "Task1", "split": "forget"},
        {"id": "2", "input": "Missing?", "output": "NA", "task": "Task3", "split": "retain"},
        {"id": "3", "input": "x" * 200_000, "output": "null", "task": "Task3", "split": "retain"},
    ]  # fmt: skip
    file = tmp_path / "lume.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    corpus = Corpus.load(file)
    assert [(r.question, r.answer) for r in corpus] == [(r["input"], r["output"]) for r in rows]
    assert [group_of(r) for r in corpus] == ["forget", "retain", "retain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\n", "holds no records .CSV needs a first line"),
        ("a.csv", "question,answer\nQ\n", "record 1: another number of values"),
        ("a.csv", "question,answer\nQ,A\nQ,A,B\n", "record 2: another number of values"),
        ("a.csv", 'question,answer\n"Q,A\n', "not valid CSV"),
        ("a.csv", "Where?,Paris\nWho?,Mara\n", r"no `text` and no pair .* \['Paris', 'Where\?'\]"),
        ("a.csv", "question,choices,answer\nQ,\"['a']\",a\n", "choices must be a list of strings"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.jsonl", '{"target": "Mara", "intro": "M"}', r"`query`/`answer`.*\['intro', 'target'\]; known are .*RWKU"),
        ("a.jsonl", '{"prompt": "P", "response": ["a", "b"]}', "'prompt' and 'response' must be strings"),
        ("a.jsonl", '{"question": "Q", "choices": ["a", 2], "answer": 0}', "choices must be a list of strings"),
    ],
)  # fmt: skip
def test_unknown_and_damaged_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message) as e:
        Corpus.load(tmp_path / name)
    assert name in str(e.value)


def test_splits_in_the_name_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"text": "One."}, {"text": "Two."}])
    folder = tmp_path / "muse@home"
    datasets.DatasetDict({"train": data, "forget": data.select([1]), "retain2": data.select([0])}).save_to_disk(folder)
    assert len(Corpus.load(folder)) == 2
    record = only(f"{folder}@forget")
    assert (record.text, record.meta["set"]) == ("Two.", "forget")
    assert only(f"{folder}@retain2").meta["set"] == "retain"
    assert only(folder, split="forget").text == "Two."
    with pytest.raises(CorpusError, match=r"split 'nope'"):
        Corpus.load(f"{folder}@nope")
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus.load(f"{tmp_path}/nowhere@train")

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"question": "Q", "answer": "A"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {
        "locuslab/TOFU:forget10": "forget", "locuslab/TOFU:retain90@train": "retain",
        "muse-bench/MUSE-News:knowmem@retain_qa": "retain", "jinzhuoran/RWKU:neighbor_level1@test": "near",
        "cais/wmdp:wmdp-bio@test": None, "some/data": None, "some/data@test": None,
    }  # fmt: skip
    assert {source: only(source).meta.get("set") for source in hub} == hub
    assert asked == [
        ("locuslab/TOFU", "forget10", "train"), ("locuslab/TOFU", "retain90", "train"),
        ("muse-bench/MUSE-News", "knowmem", "retain_qa"), ("jinzhuoran/RWKU", "neighbor_level1", "test"),
        ("cais/wmdp", "wmdp-bio", "test"), ("some/data", None, "train"), ("some/data", None, "test"),
    ]  # fmt: skip
