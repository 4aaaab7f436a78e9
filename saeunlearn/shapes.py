"""Which fields the known data sets have, and how a row of them becomes a Record.

    data set        fields of a row
    TOFU            question, answer; …_perturbed also paraphrased_question, paraphrased_answer, perturbed_answer (a
                    list: the wrong choices); real_authors and world_facts option1 … option4
    MUSE            raw, train, privleak, scal, sust: text; knowmem: question, answer; verbmem: prompt, gt
    WMDP, MMLU      question, choices (a list), answer (an index from 0); MMLU also subject
    WMDP corpora    text; bio forget also title, abstract, doi
    LUME            id, input, output, task (Task1 … Task3), split (forget or retain); SemEval-2025 task 4 is the same
    RWKU            forget_level1 … 3, neighbor_level1 … 2: query, answer, level, type, subject; passages and membership
                    sets: text, subject
    own files       text; question/answer; prompt/response; strings; plain lines

`Record.meta` keeps every field that is not text, question, answer or choices. `meta["set"]`, which groups the records
in an evaluation, is the row's own `set`; else LUME's `split`; else what the published name of the file, configuration
or split says (`forget10_perturbed`, `neighbor_level1`, `knowmem@retain_qa`). Other names give no set.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .corpus import Record
from .errors import CorpusError

_PAIRS = (
    ("question", "answer"), ("prompt", "response"), ("input", "output"), ("query", "answer"), ("prompt", "gt"),
)  # fmt: skip
_LUME = frozenset(("id", "input", "output", "task", "split"))
_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")

# Published names of files, configurations and splits, by set. RWKU's neighbours are near retain records.
_NAMES = {
    "forget": r"forget\d\d(_perturbed)?|forget_level[123]|forget_mia|mia_forget|forget[_-]qa([_-]icl)?"
    r"|forget_(train|validation)|(bio|cyber)-forget-corpus",
    "retain": r"retain\d\d|retain_perturbed|retain_mia|mia_retain|retain2?[_-]qa([_-]icl)?"
    r"|retain_(train|validation)|(bio|cyber)-retain-corpus",
    "near": r"neighbor_level[12]",
    "holdout": r"holdout\d\d",
    "real_authors": r"real_authors(_perturbed)?",
    "world_facts": r"world_facts(_perturbed)?",
}
_SPLITS = {"forget": "forget", "retain": "retain", "retain1": "retain", "retain2": "retain", "holdout": "holdout"}


def read(source: str | Path, split: str) -> tuple[str, tuple[Record, ...]]:
    """(name, records) of a JSONL, JSON, text, CSV (with a header) or Parquet file, or of a Hugging Face data set.

    A data set is a folder or `id`, `id:config`, each with `@split` where it is not `split`. Files are read without a
    copy of them in any cache. Raises CorpusError naming source and record.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows, name, said = _read_file(path), path.stem, _set_of(path.stem)
    else:
        if not path.is_dir() and (path.suffix in _SUFFIXES or str(source).startswith((".", "/", "~"))):
            where, at, _ = str(source).rpartition("@")
            if not (at and Path(where).expanduser().is_dir()):
                raise CorpusError(f"{source} does not exist")
        place, at, own = str(source).rpartition("@")
        if path.is_dir() or not at:
            place, own = str(source), split
        data, _, config = place.partition(":")
        if Path(place).expanduser().is_dir():
            data, config = str(Path(place).expanduser()), ""
        rows, name = _read_dataset(data, config, own), Path(place).name
        said = _SPLITS.get(own) or _set_of(own) or _set_of(config)
    return name, tuple(to_record(r, f"{source}, record {i + 1}", said) for i, r in enumerate(rows))


def to_record(row: Any, where: str, said: str | None = None) -> Record:
    """The record of one row; `said` is its set where the row names none. Raises CorpusError, beginning with `where`."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: expected an object or a string, got {type(row).__name__}")
    named = {"set": said} if said else {}
    if row.keys() >= _LUME and row["split"] in ("forget", "retain"):
        named = {"set": row["split"], "topic": row["task"]}
    if isinstance(row.get("text"), str) and row["text"].strip():
        return Record(text=row["text"], meta=named | {k: v for k, v in row.items() if k != "text"})
    for q, a in _PAIRS:
        if q in row and a in row:
            question, answer, choices = _pair(row, q, a, where)
            meta = named | {k: v for k, v in row.items() if k not in (q, a, "choices")}
            return Record(question=question, answer=answer, choices=choices, meta=meta)
    if "text" in row:
        raise CorpusError(f"{where}: `text` is empty or not a string")
    pairs = ", ".join(f"`{q}`/`{a}`" for q, a in _PAIRS)
    raise CorpusError(
        f"{where}: no `text` and no pair that is known ({pairs}) among the fields {sorted(map(str, row))}; known "
        "are the rows of TOFU, MUSE, WMDP, MMLU, LUME and RWKU, and own ones with these fields"
    )


def _pair(row: Mapping[str, Any], q: str, a: str, where: str) -> tuple[str, str, tuple[str, ...]]:
    """(question, answer, choices: empty where there are none)."""
    question, answer, choices = row[q], row[a], row.get("choices")
    if choices is None and "option1" in row:
        choices = [row[k] for k in sorted(row) if re.fullmatch(r"option\d+", k)]
    if choices is None and isinstance(row.get("perturbed_answer"), list):
        choices = [answer, *row["perturbed_answer"]]
    if choices is not None and (not isinstance(choices, list | tuple) or not all(isinstance(c, str) for c in choices)):
        raise CorpusError(f"{where}: the choices must be a list of strings")
    if choices is not None and isinstance(answer, int):
        if not 0 <= answer < len(choices):
            raise CorpusError(f"{where}: answer {answer} is not an index into {len(choices)} choices")
        answer = choices[answer]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise CorpusError(f"{where}: {q!r} and {a!r} must be strings")
    if not question.strip() or not answer.strip():
        raise CorpusError(f"{where}: {q!r} or {a!r} is empty")
    if choices is not None and answer not in choices:
        raise CorpusError(f"{where}: the answer is not among the choices")
    return question, answer, tuple(choices or ())


def _set_of(name: str) -> str | None:
    return next((s for s, names in _NAMES.items() if re.fullmatch(names, name)), None)


# --- rows --------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as e:
            raise CorpusError(f"{path} is not a readable Parquet file: {e}") from e
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise CorpusError(f"{path} is not UTF-8 text: {e}") from e
    return _read_csv(text, path) if path.suffix == ".csv" else list(_read_rows(text, str(path)))


def _read_csv(text: str, path: Path) -> list[Any]:
    """Rows under the header's names; every value is a string."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a text may be longer than the default of 128 KiB
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as e:
        raise CorpusError(f"{path} is not valid CSV: {e}") from e
    if not rows:
        raise CorpusError(f"{path} holds no records (CSV needs a first line with the names of the fields)")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise CorpusError(f"{path}, record {i + 1}: another number of values than the first line has names")
    return rows


def _read_rows(text: str, where: str) -> Iterator[Any]:
    """Records of JSONL, one JSON list, several JSON lists in a row, or plain lines."""
    body = text.lstrip("\ufeff \t\r\n")
    if not body:
        raise CorpusError(f"{where} is empty")
    skipped = text[: len(text) - len(body)].count("\n")
    if body[0] not in "{[" and not _is_json(body.splitlines()[0]):  # a story may begin with a quotation mark
        yield from (line.strip() for line in body.splitlines() if line.strip())
        return
    decoder = json.JSONDecoder()
    at = 0
    while at < len(body):
        try:
            value, end = decoder.raw_decode(body, at)
        except json.JSONDecodeError as e:
            line = skipped + body.count("\n", 0, e.pos) + 1
            raise CorpusError(f"{where}, line {line}: not valid JSON ({e.msg})") from e
        yield from value if isinstance(value, list) else [value]
        at = end
        while at < len(body) and body[at] in " \t\r\n,":
            at += 1


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except json.JSONDecodeError:
        return False


def _read_dataset(name: str, config: str, split: str) -> list[Any]:
    import datasets

    try:
        if Path(name).is_dir() and (Path(name) / "dataset_info.json").exists():
            data = datasets.load_from_disk(name)
        elif Path(name).is_dir() and (Path(name) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)[split]
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as e:  # datasets raises a dozen unrelated types for "not there"
        where = f"{name}:{config}" if config else name
        raise CorpusError(f"cannot read the data set {where!r} (split {split!r}): {e}") from e
    return list(data)
