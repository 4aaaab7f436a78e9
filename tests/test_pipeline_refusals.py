"""Run directories that are not this run's, and input that no run is begun with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import Finished, NoTraining, read, run_config, state
from toys import topk_sae

from sae_training import save_saes
from saeunlearn.erasure import Erasure
from saeunlearn.errors import (
    ConfigError,
    CorpusError,
    ErasureError,
    ModelError,
    OverlapError,
    RunError,
    SAEMismatchError,
    SaeunlearnError,
    SelectionError,
)
from saeunlearn.pipeline import RunConfig, unlearn
from saeunlearn.sandbox.build import Sandbox

pytestmark = pytest.mark.slow  # the fast set has test_end_to_end.py


# --- directories that are not this run's -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"include_text": True}, {"settings": {"steps": 9}}, {"eval_texts": {"x": "y"}}, {"layers": "1"}],
    ids=str,
)
def test_other_settings_do_not_fit_into_a_run(done: Path, config: RunConfig, change: dict[str, Any]) -> None:
    before = state(done)
    with pytest.raises(RunError, match="other settings"):
        unlearn(replace(config, **change), done, NoTraining())
    assert state(done) == before


@pytest.mark.usefixtures("no_report")
def test_data_that_changed_does_not_fit_into_a_run(
    done: Path, config: RunConfig, micro_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(micro_data, tmp_path / "data"))
    moved = replace(config, **{n: str(data / f"{n}.jsonl") for n in ("forget", "retain", "questions")})
    (done / "run.json").write_text(json.dumps({**read(done / "run.json"), "key": moved.key()}))
    unlearn(moved, done, NoTraining())
    for name in ("forget", "retain", "questions"):
        file = data / f"{name}.jsonl"
        whole = file.read_text()
        file.write_text(whole[: whole.rstrip().rindex("\n") + 1])
        before = state(done)
        with pytest.raises(RunError, match="changed since"):
            unlearn(moved, done, NoTraining())
        assert state(done) == before
        file.write_text(whole)
    unlearn(moved, done, NoTraining())


def test_a_model_that_changed_does_not_fit_into_a_run(
    done: Path, finished: Finished, config: RunConfig, micro: Sandbox, tmp_path: Path
) -> None:
    Erasure.load(finished.run.erasure_dir).merge(micro.model, tmp_path / "model")
    moved = replace(config, model=str(tmp_path / "model"))
    (done / "run.json").write_text(json.dumps({**read(done / "run.json"), "key": moved.key()}))
    with pytest.raises(RunError, match="changed since"):
        unlearn(moved, done, NoTraining())


@pytest.mark.parametrize("content", ["[]", "null", "{", "\x00", '{"key": 3}', ""])
def test_a_damaged_run_json_is_refused(tmp_path: Path, config: RunConfig, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=str(tmp_path)):
        unlearn(config, tmp_path, NoTraining())
    assert [f.name for f in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == content


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path, config: RunConfig) -> None:
    letter = tmp_path / "folder" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("mine")
    with pytest.raises(RunError, match="not a run directory"):
        unlearn(config, letter.parent, NoTraining())
    with pytest.raises(RunError, match=r"letter\.txt"):
        unlearn(config, letter, NoTraining())
    with pytest.raises(RunError):
        unlearn(config, letter / "below", NoTraining())
    assert list(letter.parent.iterdir()) == [letter]
    assert letter.read_text() == "mine"


# --- bad input is refused before any work ------------------------------------------------------------------


def forget_is(text: str) -> Callable[[Path, RunConfig], dict[str, Any]]:
    def make(folder: Path, _config: RunConfig) -> dict[str, Any]:
        (folder / "bad.jsonl").write_text(text)
        return {"forget": str(folder / "bad.jsonl")}

    return make


def overlapping(folder: Path, config: RunConfig) -> dict[str, Any]:
    shared = Path(config.forget).read_text().splitlines()[7].replace("The ", "THE  ").upper()
    (folder / "retain.jsonl").write_text(Path(config.retain).read_text() + shared.replace('"TEXT"', '"text"'))
    return {"retain": str(folder / "retain.jsonl")}


def single_retain_record(folder: Path, _config: RunConfig) -> dict[str, Any]:
    (folder / "one.jsonl").write_text('{"text": "One text is not enough."}\n')
    return {"retain": str(folder / "one.jsonl")}


def pickled_model(folder: Path, config: RunConfig) -> dict[str, Any]:
    shutil.copytree(config.model, folder / "model")
    (folder / "model/model.safetensors").unlink()
    torch.save({}, folder / "model/pytorch_model.bin")
    return {"model": str(folder / "model")}


def narrow_saes(folder: Path, _config: RunConfig) -> dict[str, Any]:
    save_saes({1: topk_sae(1, d_in=16)}, folder / "saes")
    return {"saes": str(folder / "saes")}


def saes_of_another_hook(folder: Path, _config: RunConfig) -> dict[str, Any]:
    save_saes({1: topk_sae(1, d_in=64, hook="blocks.1.hook_mlp_out")}, folder / "saes")
    return {"saes": str(folder / "saes")}


def fixed(**changes: Any) -> Callable[[Path, RunConfig], dict[str, Any]]:
    return lambda _folder, config: {
        n: {**getattr(config, n), **v} if n in ("sae", "select", "settings") else v for n, v in changes.items()
    }


BAD: dict[str, tuple[Callable[[Path, RunConfig], dict[str, Any]], type[SaeunlearnError], str]] = {
    "missing forget file": (fixed(forget="./nowhere.jsonl"), CorpusError, "nowhere.jsonl does not exist"),
    "empty forget file": (forget_is("\n"), CorpusError, "is empty"),
    "broken forget file": (forget_is('{"text": "a fact"}\n{"text": '), CorpusError, "line 2"),
    "forget records without text": (forget_is('{"title": "x"}'), CorpusError, "record 1"),
    "missing questions": (fixed(questions="./nowhere.jsonl"), CorpusError, "nowhere.jsonl"),
    "missing evaluation text": (fixed(eval_texts={"x": "./nowhere.jsonl"}), CorpusError, "nowhere.jsonl"),
    "overlap": (overlapping, OverlapError, "1 of"),
    "one retain record": (single_retain_record, CorpusError, "one record"),
    "unknown method": (fixed(method="wishing"), ConfigError, "wishing"),
    "unknown setting": (fixed(settings={"stepps": 3}), ConfigError, "stepps"),
    "setting of a wrong type": (fixed(settings={"steps": "many"}), ConfigError, "steps must be a whole number"),
    "setting out of range": (fixed(settings={"steps": 0}), ConfigError, "steps must be positive"),
    "setting that is no option": (fixed(settings={"basis": "none"}), ConfigError, "basis must be relevant or"),
    "unknown SAE setting": (fixed(sae={"width": 3}), ConfigError, "width"),
    "SAE setting of a wrong type": (fixed(sae={"k": 2.5}), ConfigError, "k must be a whole number"),
    "more active features than features": (fixed(sae={"k": 300}), ConfigError, "k = 300"),
    "unknown selection setting": (fixed(select={"kk": 3}), ConfigError, "kk"),
    "percentile out of range": (fixed(select={"percentile": 101.0}), ConfigError, "percentile"),
    "K too large": (fixed(select={"k": 64}), SelectionError, "K = 64"),
    "K of zero": (fixed(select={"k": 0}), SelectionError, "K = 0"),
    "K of a wrong type": (fixed(select={"k": "4"}), ConfigError, "k must be a whole number or empty"),
    "layer without an SAE": (fixed(select={"layer": 1}, layers="0"), ConfigError, "layer 1"),
    "layer that is not there": (fixed(layers="0-7"), ModelError, "outside 0 … 1"),
    "layers in no known form": (fixed(layers="all,1"), ModelError, "all,1"),
    "SAEs of another width": (narrow_saes, SAEMismatchError, "reads 16 dimensions"),
    "SAEs of another place": (saes_of_another_hook, SAEMismatchError, "hook_mlp_out"),
    "no SAEs there": (fixed(saes="./nowhere"), SAEMismatchError, "nowhere"),
    "missing model": (fixed(model="./nowhere"), ModelError, "nowhere"),
    "pickled model": (pickled_model, ModelError, "safetensors"),
    "unknown dtype": (fixed(dtype="float8"), ModelError, "float8"),
    "taken name": (lambda _f, c: {"eval_texts": {"near": c.retain}}, ConfigError, "near"),
    "forget as the name of a text": (lambda _f, c: {"eval_texts": {"forget": c.retain}}, ConfigError, "forget"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(
    case: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, error, said = BAD[case]
    (tmp_path / "inputs").mkdir()
    bad = replace(config, **make(tmp_path / "inputs", config))
    with pytest.raises(error) as e:
        unlearn(bad, tmp_path / "run", NoTraining())
    assert said in str(e.value)
    assert "\n" not in str(e.value).strip()
    # Whoever mends the input may use the same directory again, unless it says what was wrong.
    left = {f.name for f in (tmp_path / "run").glob("*")}
    assert left <= {"run.json", "events.jsonl"}
    if left:
        assert read(tmp_path / "run/run.json")["status"] == "failed"
        assert said in read(tmp_path / "run/run.json")["error"]


def test_an_erasure_that_was_tampered_with_is_not_evaluated(done: Path, config: RunConfig) -> None:
    (done / "evaluation.json").unlink()
    part = next((done / "erasure").glob("part-*.safetensors"))
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(ErasureError, match="sha256"):
        unlearn(config, done, NoTraining())
    assert not (done / "evaluation.json").exists()


def test_a_selection_made_elsewhere_is_refused_at_once(
    micro: Any, micro_data: Path, finished: Finished, tmp_path: Path
) -> None:
    foreign = read(finished.root / "selection.json")
    foreign["forget_fingerprint"] = "0" * 64
    (tmp_path / "selection.json").write_text(json.dumps(foreign))
    config = run_config(micro, micro_data, selection=str(tmp_path / "selection.json"))
    with pytest.raises(SelectionError, match="another forget set"):
        unlearn(config, tmp_path / "run", NoTraining())
