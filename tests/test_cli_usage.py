"""The parser of the command line, how a command ends, and the verbs that need no files: sandbox and demo."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import call, ok
from micro import read, state

from saeunlearn import cli, demo, options
from saeunlearn.cli import build_parser, main
from saeunlearn.demo import TINY
from saeunlearn.sandbox import build as sandbox_build
from saeunlearn.sandbox.build import Sandbox

pytestmark = pytest.mark.slow  # the fast set has test_end_to_end.py

VERBS = ["demo", "sandbox", "train-saes", "select", "unlearn", "evaluate", "compare", "apply", "revert", "export",
         "inspect", "ledger", "attack", "report", "verify", "diff", "explore"]  # fmt: skip


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "from saeunlearn.cli import build_parser, main\n"
        "build_parser()\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert not e.code\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'transformer_lens', 'numpy', 'matplotlib', 'peft', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in VERBS:
        assert re.search(rf"^    {verb}\s", done.stdout, re.MULTILINE)


def test_the_command_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="saeunlearn")
    assert entry.load() is main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([verb, "--help"])
    assert e.value.code == 0
    assert f"usage: saeunlearn {verb}" in capsys.readouterr().out


def test_no_verb_shows_the_verbs() -> None:
    said = call()
    assert said.code == 2
    assert "usage: saeunlearn" in said.out
    assert "saeunlearn demo" in said.out


@pytest.mark.parametrize("argv", [["wish"], ["unlearn"], ["apply", "x"], ["sandbox", "burn"], ["demo", "--seed", "x"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version() -> None:
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(io.StringIO()) as out:
        main(["--version"])
    assert e.value.code == 0
    assert out.getvalue().split() == ["saeunlearn", importlib.metadata.version("saeunlearn")]


def test_settings_of_the_method_are_json_or_text() -> None:
    argv = ["unlearn", "--model", "m", "--forget", "f", "--retain", "r", "--out", "o", "--form", "soft"]
    items = ["steps=5", "lr=1e-2", "gated=false", "basis=random_rows", 'target="relevant"', "x=a=b"]
    args = build_parser().parse_args([*argv, *(x for i in items for x in ("--set", i)), "--max-retain-rise", "0.1"])
    assert options.method_settings(args) == {
        "steps": 5, "lr": 0.01, "gated": False, "basis": "random_rows", "target": "relevant", "x": "a=b",
        "form": "soft", "max_retain_rise": 0.1,
    }  # fmt: skip


def test_a_cancelled_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "inspect", interrupted)
    said = call("inspect", "x")
    assert said.code == 130
    assert "cancelled" in said.err
    assert "Traceback" not in said.err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


# --- sandbox and demo --------------------------------------------------------------------------------------


def test_sandbox_build(micro: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {0: TINY.training, 7: replace(TINY.training, steps=2)}
    monkeypatch.setattr(
        sandbox_build, "SandboxConfig",
        lambda world: replace(TINY, world=replace(TINY.world, seed=world.seed), training=steps[world.seed]),
    )  # fmt: skip
    before = state(micro.root)
    out = ok("sandbox", "build", "--out", micro.root)
    assert f"held-out {micro.describe()['multiple_choice']['held_out']:.3f}" in out
    assert str(micro.root) in out
    assert state(micro.root) == before
    said = call("sandbox", "build", "--out", micro.root, "--seed", 7)
    assert (said.code, "another seed" in said.err) == (1, True)
    said = call("sandbox", "build", "--out", tmp_path / "box", "--seed", 7)
    assert (said.code, "held-out phrasings" in said.err) == (1, True)
    assert not (tmp_path / "box").exists()


def test_demo_and_the_commands_that_it_suggests(
    micro: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "build", lambda _config, _progress: micro)
    out = ok("demo")
    assert read(tmp_path / "runs/demo/run.json")["status"] == "done"
    assert out.count("before:") == out.count("after:") >= 6  # prompts of each group
    suggested = re.findall(r"^  saeunlearn (.*)$", out, re.MULTILINE)
    assert [shlex.split(s)[0] for s in suggested] == ["sandbox", "attack", "verify", "apply"]
    for argv in map(shlex.split, suggested):
        assert build_parser().parse_args(argv).verb == argv[0]
        if argv[0] in ("verify", "apply"):  # the others take long, and have tests of their own
            assert ok(*argv)
    assert ok("demo") == out  # the merged folder inside does not make the run foreign
