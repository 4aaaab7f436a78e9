"""A whole run on a tiny world, and the command line over it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import Finished, NoTraining, read, run_config, state
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from saeunlearn.cli import main
from saeunlearn.errors import (
    ConfigError,
    CorpusError,
    ModelError,
    OverlapError,
    RunError,
    SAEMismatchError,
    SelectionError,
)
from saeunlearn.pipeline import unlearn
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox


def test_a_run_directory_is_complete(finished: Finished) -> None:
    names = {f.name for f in finished.root.iterdir()}
    assert names == {"run.json", "events.jsonl", "saes", "selection.json", "erasure", "evaluation.json", "figures",
                     "report.html", "report.md", "report.json", "model_card.md"}  # fmt: skip
    info = read(finished.root / "run.json")
    assert info["status"] == "done"
    assert set(info["data"]) == {"forget", "retain", "questions"}


def test_finished_steps_are_not_repeated(finished: Finished, micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "run"))
    kept = [root / n for n in ("saes", "selection.json", "erasure", "evaluation.json")]
    before = state(*kept)
    unlearn(run_config(micro, micro_data), root, NoTraining())
    assert state(*kept) == before


def test_a_killed_run_goes_on_to_the_same_result(
    finished: Finished, micro: Sandbox, micro_data: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(finished.killed, tmp_path / "run"))
    run = unlearn(run_config(micro, micro_data), root, Progress())
    assert read(run.erasure_dir / "erasure.json")["id"] == finished.erasure_id


def test_a_directory_belongs_to_one_run(finished: Finished, micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="other settings"):
        unlearn(run_config(micro, micro_data, seed=5), finished.root, NoTraining())
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        unlearn(run_config(micro, micro_data), tmp_path, NoTraining())


def test_bad_input_is_refused_before_any_long_work(micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (CorpusError, {"forget": str(tmp_path / "missing.jsonl")}),
        (CorpusError, {"forget": str(tmp_path / "empty.jsonl")}),
        (OverlapError, {"retain": str(micro_data / "forget.jsonl")}),
        (ConfigError, {"method": "magic"}),
        (ConfigError, {"settings": {"strength": 3}}),
        (ConfigError, {"settings": {"steps": "many"}}),
        (ModelError, {"model": str(tmp_path / "pickled")}),
        (SAEMismatchError, {"saes": str(tmp_path)}),
    ]
    for n, (error, change) in enumerate(cases):
        with pytest.raises(error):
            unlearn(run_config(micro, micro_data, **change), tmp_path / f"run{n}", NoTraining())


def test_k_beyond_the_width_is_refused(finished: Finished, micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    config = run_config(micro, micro_data, saes=str(finished.root / "saes"), select={"k": 64})
    with pytest.raises(SelectionError, match="K = 64"):
        unlearn(config, tmp_path / "run", NoTraining())


def test_verbs_over_an_erasure(finished: Finished, micro: Sandbox, tmp_path: Path, capsys: Any) -> None:
    erasure, merged, back = str(finished.run.erasure_dir), tmp_path / "merged", tmp_path / "back"
    assert main(["inspect", erasure]) == 0
    assert main(["apply", erasure, str(micro.model), str(merged)]) == 0
    assert main(["ledger", str(merged)]) == 0
    assert main(["revert", str(merged), str(back)]) == 0
    assert main(["export", erasure, str(tmp_path / "peft"), "--base", str(micro.model)]) == 0
    assert main(["evaluate", "--model", str(micro.model), "--erasure", erasure, "--device", "cpu",
                 "--text", f"forget={micro.forget}", "--out", str(tmp_path / "result.json")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert finished.erasure_id[:12] in said
    assert read(tmp_path / "result.json")["comparison"][0]["metric"] == "nll"
    original, restored = (load_file(p / "model.safetensors") for p in (micro.model, back))
    assert all(torch.equal(original[n], restored[n]) for n in original)
    edited = load_file(merged / "model.safetensors")
    assert any(not torch.equal(original[n], edited[n]) for n in original)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model(**tokenizer("It is", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()


def test_typed_errors_are_one_line_and_exit_1(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    assert main(["ledger", str(tmp_path / "nowhere")]) == 1
    assert main(["inspect", str(finished.root)]) == 1
    assert main(["unlearn", "--model", "x", "--forget", "y.jsonl", "--retain", "z", "--out", str(tmp_path / "r"),
                 "--set", "gamma"]) == 1  # fmt: skip
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("saeunlearn: ") for line in lines)


def test_help_needs_no_heavy_import() -> None:
    heavy = "{'torch', 'transformers', 'sae_lens', 'matplotlib', 'numpy'}"
    code = f"import sys, saeunlearn.cli as c; c.build_parser().format_help(); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
