"""Opening a run directory, and one model for many."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, deltas, make, same, weights
from explored import FORGET, opened
from guarded import guard
from micro import Finished, read
from test_tokens import TEXT, new_token

from saeunlearn.corpus import windows
from saeunlearn.errors import ConfigError, ErasureError, RunError, SAEMismatchError, SelectionError
from saeunlearn.explore.opened import OpenedRun, open_run
from saeunlearn.models import LanguageModel

pytestmark = pytest.mark.slow  # a whole run


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.root, tmp_path / "run"))


def test_a_finished_run_opens(finished: Finished) -> None:
    run = open_run(finished.root)
    assert run.names == ["original", "sspu"]
    assert run.erasures["sspu"].id == finished.erasure_id
    assert set(run.texts) == {"forget", "near", "far"}
    assert sum(len(c) for n, c in run.texts.items() if n != "forget") == len(run.retain)
    assert run.selection is not None
    assert run.selection.layer in run.saes
    assert run.documents["evaluation"] == read(finished.root / "evaluation.json")
    assert run.documents["run"]["status"] == "done"
    assert "attacks" not in run.documents
    assert run.model.lineage == []


def test_further_erasures_by_name(finished: Finished, tmp_path: Path, llama: LanguageModel) -> None:
    run = open_run(finished.root, erasures={"again": finished.root / "erasure"})
    assert run.names == ["original", "sspu", "again"]
    for name in ("sspu", "original"):
        with pytest.raises(ConfigError, match="taken"):
            open_run(finished.root, erasures={name: finished.root / "erasure"})
    make(llama).save(tmp_path / "foreign")
    with pytest.raises(ErasureError, match="made on"):
        open_run(finished.root, erasures={"foreign": tmp_path / "foreign"})


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "deleted"):
        with pytest.raises(RunError, match="not a run directory"):
            open_run(folder)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RunError, match="not an object"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "done", "config": {"unknown": 1}}')
    with pytest.raises(RunError, match="no settings"):
        open_run(tmp_path)


def test_unfinished_changed_and_foreign_runs_are_refused(copied: Path) -> None:
    info = read(copied / "run.json")
    for change, match in (
        ({"status": "cancelled"}, "not a finished run"),
        ({"model": {**info["model"], "fingerprint": "0" * 64}}, "changed"),
        ({"data": {**info["data"], "forget": {"n": 1, "fingerprint": "0" * 64}}}, "changed"),
    ):
        (copied / "run.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(RunError, match=match):
            open_run(copied)


@pytest.mark.parametrize(
    ("piece", "error"),
    [("erasure", ErasureError), ("saes/saes.json", None), ("saes/layer_0", None), ("saes", None),
     ("selection.json", None)],
)  # fmt: skip
def test_missing_pieces(copied: Path, piece: str, error: Any) -> None:
    target = copied / piece
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    if error:
        with pytest.raises(error):
            open_run(copied)
        return
    layer = read(copied / "selection.json")["layer"] if piece != "selection.json" else None
    if piece == "saes/layer_0" and layer == 0:
        with pytest.raises(SelectionError):
            open_run(copied)
        return
    run = open_run(copied)
    if piece == "saes":  # a method may need none: only the views of features do
        with pytest.raises(SelectionError, match="has SAEs for"):
            run.sae(0)
    if piece == "selection.json":
        assert run.selection is None
        assert run.bases() is None


def test_damaged_pieces_are_refused(copied: Path) -> None:
    (copied / "evaluation.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        open_run(copied)
    shutil.copy(copied / "selection.json", copied / "evaluation.json")
    weights_file = next((copied / "saes").glob("*/sae_weights.safetensors"))
    weights_file.write_bytes(weights_file.read_bytes()[:200])
    with pytest.raises(SAEMismatchError):
        open_run(copied)


# --- one model for many ------------------------------------------------------------------------------------


def test_an_edit_comes_off_whatever_happens(llama: LanguageModel) -> None:
    run = opened(llama, weights=make(llama), guard=make(llama, [guard()]), token=make(llama, [new_token(llama)]))
    before, tokenizer = weights(llama), llama.tokenizer
    for name in run.names:
        with contextlib.suppress(ZeroDivisionError), run.edited(name) as model:
            assert bool(model.lineage) == (name != "original")
            raise ZeroDivisionError
        assert same(before, weights(llama))
        assert llama.lineage == []
        assert llama.tokenizer is tokenizer
    with pytest.raises(ConfigError, match="there are original, weights, guard, token"), run.edited("other"):
        pass


def test_threads_do_not_see_each_other(llama: LanguageModel) -> None:
    run = opened(llama, a=make(llama, deltas(llama, seed=0)), b=make(llama, deltas(llama, seed=1)))
    alone = {}
    for name in run.names:
        with run.edited(name) as model, torch.no_grad():
            alone[name] = model.logits(IDS)
    assert not torch.equal(alone["a"], alone["b"])
    wrong: list[Any] = []

    def work(name: str) -> None:
        try:
            for _ in range(8):
                with run.edited(name) as model, torch.no_grad():
                    if not torch.equal(model.logits(IDS), alone[name]):
                        wrong.append(name)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in run.names * 3]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert same(weights(llama), weights(run.model))


def test_words_are_those_of_the_windows(lm: LanguageModel) -> None:
    run = opened(lm)
    items = windows(FORGET, lm)
    assert [run.words("forget").window(i) for i in range(len(items))] == [list(w.ids) for w in items]
    ids = lm.tokenizer(SENTENCES[0], add_special_tokens=False).input_ids
    assert "".join(run.token_texts(ids)) == SENTENCES[0]
    assert any(t.startswith(" ") for t in run.token_texts(ids))
    assert run.encode(SENTENCES[0]) == ids
    with pytest.raises(ConfigError, match="no text"):
        run.words("other")


def test_words_of_a_new_token(llama: LanguageModel) -> None:
    run: OpenedRun = opened(llama, token=make(llama, [new_token(llama)]))
    with run.edited("token") as model:
        at = len(model.tokenizer) - 1
        assert run.token_texts([at], model) == [TEXT]
        assert TEXT not in run.token_texts([at])


def test_directions_wait_for_the_model_only_where_they_must(llama: LanguageModel) -> None:
    from saeunlearn.erasure import WeightDelta

    rows = torch.eye(llama.d_model)[:2]
    head = WeightDelta("lm_head.weight", False, dense=torch.ones_like(llama.model.lm_head.weight))
    free, bound = opened(llama, inside=make(llama)), opened(llama, head=make(llama, [head]))
    for run, waits in ((free, False), (bound, True)):
        expected, done = run.direction_logits(rows), threading.Event()
        got: list[Any] = []

        def ask(run: OpenedRun = run, got: list[Any] = got, done: threading.Event = done) -> None:
            got.append(run.direction_logits(rows))
            done.set()

        with run.edited(run.names[1]):
            thread = threading.Thread(target=ask)
            thread.start()
            assert done.wait(0.5 if waits else 20) != waits
        thread.join()
        assert torch.equal(got[0], expected)
