"""Every code block of the README runs, with tiny stand-ins for the names that it uses.

What would take long is shortened by OPTIONS, which come after the README's own. Two things are only parsed: `make …`
(its targets are what these tests are part of), and `explore`, which serves a page until it is stopped.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from micro import Finished

from saeunlearn.cli import build_parser, main
from saeunlearn.demo import TINY
from saeunlearn.progress import Progress
from saeunlearn.sandbox import build as sandbox_build
from saeunlearn.sandbox.build import Sandbox, build_oracle

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAES = "--tokens 20000 --expansion 4 --set batch=256 --set lr=0.004 --set buffer=4096"
OPTIONS = {
    "train-saes": SAES,
    "unlearn": "--k 2 --set steps=4 --set batch=8 --max-retain-rise 0.5",
    "attack": "--attacks none,int4",
    "verify": "--sample 8",
    "compare": "--methods npo-lora --trials 1 --seeds 0",
}


def blocks() -> list[str]:
    """Fenced blocks, and blocks that are indented by four spaces."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n(?:\s*\n(?=    ))?)+", rest, re.MULTILINE)
    return [re.sub(r"^    ", "", b, flags=re.MULTILINE) for b in indented] + fenced


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_blocks_are_found() -> None:
    found = [words for b in blocks() for words in (commands(b) if "import" not in b else [])]
    verbs = {words[1] for words in found if words[0] == "saeunlearn"}
    assert {"train-saes", "unlearn", "apply", "attack", "verify", "diff", "compare", "methods"} <= verbs
    assert {words[0] for words in found} == {"saeunlearn", "make"}
    assert sum("import" in b for b in blocks()) == README.count("```python") >= 1


@pytest.fixture
def stand_ins(finished: Finished, micro: Sandbox, micro_data: Path, tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with everything that the README names; the sandbox it builds is the tiny one."""
    build_oracle(micro, Progress())
    for name in ("forget", "retain", "questions"):
        shutil.copy(micro_data / f"{name}.jsonl", tmp_path)
    shutil.copy(micro.retain, tmp_path / "text.jsonl")
    (tmp_path / "MODEL").symlink_to(micro.model)
    (tmp_path / "ORACLE").symlink_to(micro.oracle)
    shutil.copytree(finished.root, tmp_path / "runs/mine")
    (tmp_path / "near.jsonl").symlink_to(micro.retain)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEUNLEARN_HOME", str(tmp_path / "home"))
    tiny = lambda world: replace(TINY, world=replace(TINY.world, seed=world.seed))  # noqa: E731
    monkeypatch.setattr(sandbox_build, "SandboxConfig", tiny)
    monkeypatch.setattr(sandbox_build, "build", lambda _config, _progress, _out=None: micro)
    return tmp_path


@pytest.mark.parametrize("block", blocks(), ids=lambda b: " ".join(b.split()[:2]))
@pytest.mark.slow
def test_a_block_of_the_readme_runs(block: str, stand_ins: Path, capsys: Any) -> None:
    if "import" in block:
        exec(compile(block, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()
        return
    if any(words[1:2] == ["train-saes"] for words in commands(block)):
        shutil.rmtree(stand_ins / "runs")  # it makes its own
    for words in commands(block):
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[1] == "explore":
            assert build_parser().parse_args(words[1:]).verb == "explore"
        else:
            code = main([*words[1:], *shlex.split(OPTIONS.get(words[1], ""))])
            said = capsys.readouterr()
            assert code == 0, f"{shlex.join(words)}: {said.err}"
