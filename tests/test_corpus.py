"""Reading of every accepted shape, refusals by file and record, windows, masks and batches."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAX_LENGTH, SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from saeunlearn.corpus import (
    Batch,
    Corpus,
    Record,
    Window,
    batches,
    collate,
    endless,
    refuse_overlap,
    render,
    windows,
)
from saeunlearn.errors import CorpusError, OverlapError
from saeunlearn.models import LanguageModel


def write(folder: Path, text: str, name: str = "set.jsonl") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


# --- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "One."}\n{"text": "Two."}\n', ["One.", "Two."]),
        ('\ufeff\n{"text": "One."}\n\n{"text": "Two."}', ["One.", "Two."]),
        ('["One.", "Two."]', ["One.", "Two."]),
        ('[{"text": "One."}]\n[{"text": "Two."}]', ["One.", "Two."]),
        ('"One."\n"Two."\n', ["One.", "Two."]),
        ("One.\n\n  Two.  \n", ["One.", "Two."]),
        ('"One," she said.\nTwo.\n', ['"One," she said.', "Two."]),
        ('{"prompt": "Who?", "response": "Mara."}', ["Who? Mara."]),
        ('{"input": "Who? ", "output": " Mara."}', ["Who? Mara."]),
        ('{"question": "Who?", "answer": "Mara.", "text": " "}', ["Who? Mara."]),
    ],
)
def test_accepted_text_shapes(tmp_path: Path, content: str, expected: list[str]) -> None:
    corpus = Corpus.load(write(tmp_path, content))
    assert [r.full_text for r in corpus] == expected
    assert corpus.name == "set"


@pytest.mark.parametrize(
    ("row", "answer", "choices"),
    [
        ({"question": "Q?", "choices": ["a", "b"], "answer": 1}, "b", ("a", "b")),
        ({"question": "Q?", "choices": ["a", "b"], "answer": "a"}, "a", ("a", "b")),
        ({"question": "Q?", "option1": "a", "option2": "b", "answer": "b"}, "b", ("a", "b")),
        ({"question": "Q?", "answer": "a", "perturbed_answer": ["x", "y"]}, "a", ("a", "x", "y")),
        ({"question": "Q?", "answer": "a", "choices": None}, "a", ()),
    ],
)
def test_accepted_question_shapes(tmp_path: Path, row: dict[str, Any], answer: str, choices: tuple[str, ...]) -> None:
    (record,) = Corpus.load(write(tmp_path, json.dumps({**row, "topic": "birds"})))
    assert (record.question, record.answer, record.choices, record.text) == ("Q?", answer, choices, "")
    assert record.meta["topic"] == "birds"


def test_huggingface_data_sets_in_folders(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": "One.", "label": 0}, {"text": "Two.", "label": 1}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    flat = Corpus.load(tmp_path / "flat")
    assert [r.text for r in flat] == ["One.", "Two."]
    assert [r.meta["label"] for r in flat] == [0, 1]
    assert flat.name == "flat"
    assert [r.text for r in Corpus.load(tmp_path / "splits")] == ["One.", "Two."]
    assert [r.text for r in Corpus.load(tmp_path / "splits", split="test")] == ["Two."]
    with pytest.raises(CorpusError, match=r"cannot read the data set '.*splits' \(split 'nope'\)"):
        Corpus.load(tmp_path / "splits", split="nope")


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"set\.jsonl is empty"),
        (" \n \n", r"set\.jsonl is empty"),
        ("[]", r"set\.jsonl holds no records"),
        ('{"text": "One."}\n{"text": ', r"set\.jsonl, line 2: not valid JSON"),
        ('\n\n{"text": "One."}\n{"text" "Two."}', r"set\.jsonl, line 4: not valid JSON"),
        ('{"text": "One."}\n{"title": "Two."}', r"record 2: no `text`.*\['title'\]"),
        ('{"text": "One."}\n{"text": "  "}', r"record 2: `text` is empty or not a string"),
        ('{"text": 7}', r"record 1: `text` is empty or not a string"),
        ('["One.", ["Two."]]', r"record 2: expected an object or a string, got list"),
        ('["One.", null]', r"record 2: expected an object or a string, got NoneType"),
        ('{"question": "Q?", "answer": " "}', r"record 1: 'question' or 'answer' is empty"),
        ('{"prompt": "", "response": "A."}', r"record 1: 'prompt' or 'response' is empty"),
        ('{"question": "Q?", "answer": 3}', r"record 1: 'question' and 'answer' must be strings"),
        ('{"question": "Q?", "answer": null}', r"record 1: 'question' and 'answer' must be strings"),
        ('{"question": "Q?", "choices": ["a"], "answer": 1}', r"answer 1 is not an index into 1 choices"),
        ('{"question": "Q?", "choices": ["a"], "answer": -1}', r"answer -1 is not an index"),
        ('{"question": "Q?", "choices": ["a"], "answer": "b"}', r"the answer is not among the choices"),
    ],
)
def test_bad_files_are_refused_by_name_and_place(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message) as e:
        Corpus.load(write(tmp_path, content))
    assert "set.jsonl" in str(e.value)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl does not exist"):
        Corpus.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(CorpusError, match=r"nowhere does not exist"):
        Corpus.load(tmp_path / "nowhere")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"latin\.txt is not UTF-8"):
        Corpus.load(tmp_path / "latin.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="cannot read the data set"):
        Corpus.load(tmp_path / "empty")
    with pytest.raises(CorpusError, match="corpus holds no records"):
        Corpus.of(["", "  "])


@pytest.mark.parametrize(
    "variant",
    [
        "The café is in Straße 5.",
        "THE CAFÉ  is\tin\nstraße 5.",
        " The cafe\u0301 is in Strasse 5. ",
        "The ｃａｆé is in Straße\u00a05.",
    ],
)
def test_overlap_is_found_in_other_case_spacing_and_unicode_form(variant: str) -> None:
    forget = Corpus.of(["The café is in Straße 5.", "Unique."])
    retain = Corpus.of(["Other.", variant])
    with pytest.raises(OverlapError, match=r"1 of 2 forget records .*\(retain records \[2\]\)"):
        refuse_overlap(forget, retain)
    pair = Corpus((Record(question="The café is in", answer="Straße 5."),))
    with pytest.raises(OverlapError):
        refuse_overlap(pair, retain)


def test_different_sets_do_not_overlap_and_long_lists_are_cut() -> None:
    refuse_overlap(Corpus.of(["The café is in Straße 5."]), Corpus.of(["The cafe is in Straße 5."]))
    same = Corpus.of([f"Record {i}." for i in range(8)])
    with pytest.raises(OverlapError, match=r"8 of 8 .*\[1, 2, 3, 4, 5\] …\)"):
        refuse_overlap(same, same)


# --- windows -----------------------------------------------------------------------------------------------

LONG = " ".join(SENTENCES[:12])


def test_windows_cover_every_token_once_with_bos_in_front(lm: LanguageModel) -> None:
    corpus = Corpus.of([LONG, SENTENCES[3]])
    found = windows(corpus, lm, 20)
    bos = [] if lm.bos_id is None else [lm.bos_id]
    for i, record in enumerate(corpus):
        own = [w for w in found if w.record == i]
        assert all(len(w.ids) == 20 for w in own[:-1])
        assert all(list(w.ids[: len(bos)]) == bos for w in own)
        covered = [t for w in own for t in w.ids[len(bos) :]]
        tokens = lm.tokenizer(record.text, add_special_tokens=False).input_ids
        # Without BOS a last window of one token holds nothing that could be scored.
        assert covered == (tokens[:-1] if not bos and len(tokens) % 20 == 1 else tokens)
        assert all(w.answer_start == 1 for w in own)
    assert len(found) > 8
    # The context is the limit where nothing, or more, is asked for.
    assert max(len(w.ids) for w in windows(corpus, lm)) == MAX_LENGTH
    assert windows(corpus, lm, 10_000) == windows(corpus, lm)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), limit=st.integers(2, 64), bos=st.booleans())
def test_windows_of_any_length(n: int, limit: int, bos: bool) -> None:
    """Against a list of tokens cut by hand, on a model that is only a tokenizer."""

    class Tokens:
        chat_template = None

        def __call__(self, texts: list[str], **_: object) -> Any:
            class Encoded:
                input_ids = tuple([ord(c) for c in t] for t in texts)
                offset_mapping = tuple([(i, i + 1) for i in range(len(t))] for t in texts)

            return Encoded()

    class Model:
        max_length, bos_id, tokenizer = 64, 1 if bos else None, Tokens()

    text = "".join(chr(100 + i) for i in range(n))
    step = limit - bos
    expected = [([1] if bos else []) + [100 + i for i in range(n)][at : at + step] for at in range(0, n, step)]
    expected = [e for e in expected if len(e) > 1]
    if not expected:
        with pytest.raises(CorpusError, match="no record is longer than one token"):
            windows(Corpus.of([text]), Model(), limit)  # type: ignore[arg-type]
    else:
        assert [list(w.ids) for w in windows(Corpus.of([text]), Model(), limit)] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 0, -5])
def test_windows_too_short_to_predict_anything_are_refused(llama: LanguageModel, limit: int) -> None:
    with pytest.raises(CorpusError, match=f"windows of {limit} tokens"):
        windows(Corpus.of(["Mara keeps."]), llama, limit)


@pytest.mark.parametrize("question", ["Who keeps the map?", "  Who keeps the map? \n"])
def test_targets_start_at_the_answer(lm: LanguageModel, question: str) -> None:
    record = Record(question=question, answer="Tobin in the tower.")
    (window,) = windows(Corpus((record,)), lm)
    batch = collate([window], lm.pad_id)
    assert lm.tokenizer.decode(batch.ids[batch.targets]).strip() == "Tobin in the tower."
    before = lm.tokenizer.decode(batch.ids[0, : window.answer_start], skip_special_tokens=True)
    assert before == "Who keeps the map?"


def test_targets_across_windows_are_the_answer_and_nothing_else(lm: LanguageModel) -> None:
    record = Record(question=LONG, answer=SENTENCES[20] + " " + SENTENCES[21])
    found = windows(Corpus((record,)), lm, 16)
    batch = collate(found, lm.pad_id)
    assert not batch.targets[0].any()
    answer = lm.tokenizer(" " + record.answer, add_special_tokens=False).input_ids
    scored = batch.ids[batch.targets].tolist()
    if lm.bos_id is not None:
        assert scored == answer
    else:  # the first token of a window has no context to be predicted from
        start = len(lm.tokenizer(LONG, add_special_tokens=False).input_ids)
        assert scored == [t for i, t in enumerate(answer) if (start + i) % 16 != 0]


def test_chat_template_is_used_and_bos_comes_once(llama: LanguageModel) -> None:
    llama.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} Keeper:{% endif %}"
    )
    record = Record(question="Who keeps the map?", answer=" Tobin.")
    text, start = render(record, llama.tokenizer)
    assert text == "User: Who keeps the map? Keeper: Tobin."
    assert text[start:] == " Tobin."
    (window,) = windows(Corpus((record,)), llama)
    assert window.ids.count(llama.bos_id) == 1  # type: ignore[arg-type]
    assert llama.tokenizer.decode(window.ids[window.answer_start :]) == " Tobin."
    assert render(Record(text="Plain."), llama.tokenizer) == ("Plain.", 0)


# --- masks and batches -------------------------------------------------------------------------------------


def test_masks_leave_out_the_first_position_and_padding() -> None:
    batch = collate([Window((7, 8, 9), 1, 4), Window((7, 8, 9, 10, 11), 3, 2), Window((7, 8), 5, 0)], 0)
    assert batch.ids.tolist() == [[7, 8, 9, 0, 0], [7, 8, 9, 10, 11], [7, 8, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.targets.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.records == (4, 2, 0)
    assert batch.mask.dtype == batch.targets.dtype == torch.bool
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.ids, batch.ids)
    assert moved.records == batch.records


def items_of(lengths: list[int]) -> list[Window]:
    return [Window(tuple(range(1, n + 1)), 1, i) for i, n in enumerate(lengths)]


def flat(found: list[Batch]) -> list[tuple[Any, ...]]:
    return [(b.ids.tolist(), b.mask.tolist(), b.records) for b in found]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40),
    budget=st.integers(1, 200),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_batches_cover_every_window_once_within_the_budget(lengths: list[int], budget: int, seed: int | None) -> None:
    items = items_of(lengths)
    found = list(batches(items, 0, max_tokens=budget, seed=seed))
    assert sorted(i for b in found for i in b.records) == list(range(len(items)))
    for b in found:
        assert b.ids.numel() <= budget or len(b.records) == 1
        for row, i in enumerate(b.records):
            assert tuple(b.ids[row, : lengths[i]].tolist()) == items[i].ids
            assert int(b.attention_mask[row].sum()) == lengths[i]
    assert flat(found) == flat(list(batches(items, 0, max_tokens=budget, seed=seed)))


def test_the_seed_decides_the_order_of_batches() -> None:
    items = items_of([5] * 20 + [9] * 20)
    orders = [[b.records for b in batches(items, 0, max_tokens=40, seed=s)] for s in (None, 1, 2)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    widths = [b.ids.shape[1] for b in batches(items, 0, max_tokens=40, seed=1)]
    assert widths != sorted(widths)  # training must not see all short texts first
    assert [i for rs in orders[0] for i in rs] == list(range(40))  # without a seed: by length, as given


@pytest.mark.parametrize(("n", "size"), [(5, 3), (24, 3), (100, 3), (7, 1), (5, 12)])
def test_endless_batches_go_through_whole_epochs_and_repeat_with_the_seed(n: int, size: int) -> None:
    # Eight batches are drawn at a time, and `n` pools of them are 8·size whole epochs. The last case's batch is larger
    # than its corpus.
    items = items_of([2 + (7 * i) % 11 for i in range(n)])

    def taken(seed: int) -> list[Batch]:
        return list(islice(endless(items, 0, size, seed), 8 * n))

    found = taken(1)
    assert all(len(b.records) == size for b in found)
    count = [0] * n
    for at in range(0, len(found), 8):
        pool = found[at : at + 8]
        for b in pool:
            for i in b.records:
                count[i] += 1
        # Every window comes once an epoch, so no window is ever two ahead of another.
        assert max(count) - min(count) <= 1
        # Similar lengths share a batch: ordered by length, the batches of a pool do not reach into one another.
        spans = sorted((min(len(items[i].ids) for i in b.records), b.ids.shape[1]) for b in pool)
        assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans))
    assert count == [8 * size] * n
    assert flat(found) == flat(taken(1)) != flat(taken(2))


def test_endless_batches_do_not_come_by_length() -> None:
    widths = [b.ids.shape[1] for b in islice(endless(items_of(list(range(2, 50))), 0, 6, 0), 8)]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


# --- split, sample, fingerprint ----------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 40), fraction=st.floats(0, 1), seed=st.integers(0, 3))
def test_split_is_a_partition_in_the_original_order(n: int, fraction: float, seed: int) -> None:
    corpus = Corpus.of([f"Record {i:02d}." for i in range(n)], "birds")
    rest, held = corpus.split(fraction, seed)
    assert abs(len(held) - fraction * n) <= 1
    assert len(rest) >= 1
    assert len(held) >= 1
    assert sorted([r.text for r in rest] + [r.text for r in held]) == [r.text for r in corpus]
    assert [r.text for r in held] == sorted(r.text for r in held)
    assert [r.text for r in rest] == sorted(r.text for r in rest)
    assert (rest.name, held.name) == ("birds", "birds-held-out")
    assert corpus.split(fraction, seed) == (rest, held)


def test_records_are_taken_by_their_fields() -> None:
    records = [Record(text=f"{n}", meta={"set": s, "phrasing": p}) for n, (s, p) in enumerate(["ax", "ay", "bx", "ax"])]
    corpus = Corpus(tuple(records), "c")
    assert [r.text for r in corpus.where(set="a")] == ["0", "1", "3"]
    assert [r.text for r in corpus.where(set="a", phrasing="x")] == ["0", "3"]
    assert corpus.where() == corpus
    with pytest.raises(CorpusError, match="no record has set = b, phrasing = y"):
        corpus.where(set="b", phrasing="y")


def test_split_and_sample_follow_the_seed() -> None:
    corpus = Corpus.of([f"Record {i:02d}." for i in range(40)])
    assert corpus.split(0.25, 0) != corpus.split(0.25, 1)
    few = corpus.sample(7, 0)
    assert len(few) == 7
    assert [r.text for r in few] == sorted(r.text for r in few)
    assert set(few) < set(corpus)
    assert few == corpus.sample(7, 0) != corpus.sample(7, 1)
    assert corpus.sample(40, 0) is corpus
    with pytest.raises(CorpusError, match="one record"):
        Corpus.of(["Only."]).split(0.5, 0)


def test_fingerprint_follows_content_and_order_but_not_name_or_form() -> None:
    a = Corpus.of(["One.", "Two."])
    assert a.fingerprint() == Corpus.of(["ONE.", " two. "], "other").fingerprint()
    assert a.fingerprint() != Corpus.of(["Two.", "One."]).fingerprint()
    assert a.fingerprint() != Corpus.of(["One.", "Three."]).fingerprint()
    assert a.fingerprint() != Corpus.of(["One.", "Two.", "Two."]).fingerprint()
    assert "one" not in a.fingerprint().lower()
    assert len(a.fingerprint()) == 64
