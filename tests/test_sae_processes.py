"""SAE training in several processes: the same as one, and an end where one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Checkpoints
from streams import TEXTS

WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import torch
from streams import TEXTS
from sae_training import SAEConfig, train_saes
from sae_training.processes import Processes
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
torch.set_num_threads(1)
lm = LanguageModel.open({model!r}, device="cpu")
processes = Processes.launched(torch.device("cpu"))
rows = []
def report(e):
    if e["event"] == "step":
        rows.append({{k: v for k, v in e.items() if k.startswith("fvu")}})
        if {die} and processes.rank == 1 and len(rows) == 5:
            os._exit(9)
for a in ("topk", "batchtopk", "matryoshka", "gated"):
    config = SAEConfig(architecture=a, expansion=4, k=8, tokens=1_500, batch=128, buffer={buffer}, dead_after=500)
    train_saes(lm, TEXTS, [1, 3], config, seed=0, progress=Progress(report), processes=processes)
if processes.first:
    print(json.dumps(rows))
"""


def launch(script: str, count: int, port: int) -> list[subprocess.Popen[str]]:
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "ACCELERATE_USE_CPU": "1", "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip
    return [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(count)
    ]  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [600, 100_000])
def test_two_processes_are_one(checkpoints: Checkpoints, buffer: int) -> None:
    script = WORKER.format(tests=str(Path(__file__).parent), model=str(checkpoints("llama")), die=0, buffer=buffer)
    outputs = []
    for count in (1, 2):
        parts = launch(script, count, free_port())
        said = [p.communicate(timeout=120) for p in parts]
        assert [p.returncode for p in parts] == [0] * count, said[0][1][-2000:]
        outputs.append(json.loads(said[0][0].splitlines()[-1]))
    one, two = outputs
    assert len(one) == len(two) == 4 * 12
    for a, b in zip(one, two):
        for name in a:  # the same batches, summed in another order
            assert abs(a[name] - b[name]) < 2e-3 * max(a[name], 0.05)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_an_error(checkpoints: Checkpoints) -> None:
    script = WORKER.format(tests=str(Path(__file__).parent), model=str(checkpoints("llama")), die=1, buffer=600)
    first, second = launch(script, 2, free_port())
    assert second.wait(timeout=120) == 9
    _, said = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "Error" in said


@pytest.mark.slow
def test_accelerate_launch_runs_the_command(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(r.text for r in TEXTS))
    command = ["-m", "saeunlearn.cli", "train-saes", "--model", str(checkpoints("llama")), "--corpus",
               str(tmp_path / "texts.txt"), "--layers", "1", "--expansion", "4", "--k", "8", "--tokens", "2000",
               "--set", "batch=128", "--device", "cpu"]  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
                "--cpu", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", str(free_port())]  # fmt: skip
    losses = []
    for start in ([sys.executable], launcher):
        out = tmp_path / f"saes-{len(losses)}"
        done = subprocess.run([*start, *command, "--out", str(out)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(json.loads((out / "quality.json").read_text())["saes"][0]["fvu"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
