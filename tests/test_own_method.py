"""The example of docs/methods.md, installed as a stranger's package would be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import IDS

from saeunlearn.cli import main
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError
from saeunlearn.methods import get_method
from saeunlearn.models import LanguageModel

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the package and the metadata that pip would have written."""
    text = DOCS.read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "class Shrink:" in c)
    (table,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    assert len(code.splitlines()) <= 35
    name, place = re.findall(r'^(\w+) = "(.*)"$', table, re.M)[0]
    module, _ = place.split(":")
    file = tmp_path / (module.replace(".", "/") + ".py")
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (file.parent / "__init__.py").touch()
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[saeunlearn.methods]\n{name} = {place}\nbroken = my_package.none:None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    for loaded in [m for m in sys.modules if m.split(".")[0] == "my_package"]:
        del sys.modules[loaded]


@pytest.mark.slow
def test_a_strangers_method_runs_like_ours(package: Path, checkpoints: Any, tmp_path: Path) -> None:
    model = checkpoints("llama")
    (tmp_path / "f.txt").write_text("Mara keeps the old map.\nTobin keeps a kettle.\n")
    (tmp_path / "r.txt").write_text("Elsa sold the ladder.\nPim sold the violin.\nQuill sold a lantern.\n")
    command = ["unlearn", "--model", str(model), "--forget", str(tmp_path / "f.txt"), "--retain",
               str(tmp_path / "r.txt"), "--method", "shrink", "--device", "cpu", "--out"]  # fmt: skip
    assert main([*command, str(tmp_path / "run"), "--set", "share=0.5"]) == 0
    lm = LanguageModel.open(model, device="cpu")
    erasure = Erasure.load(tmp_path / "run" / "erasure")
    (writer,) = lm.writers([lm.n_layers - 1])
    original = writer.weight.detach().clone()
    with erasure.apply(lm):
        torch.testing.assert_close(writer.weight.detach(), 0.5 * original)
        assert torch.isfinite(lm.logits(IDS)).all()
    assert main([*command, str(tmp_path / "bad"), "--set", "share=2"]) == 1
    assert not (tmp_path / "bad" / "erasure").exists()


def test_what_cannot_be_loaded_is_named(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"broken .*my_package\.none"):
        get_method("broken")


@pytest.mark.slow
def test_methods_lists_it(package: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "saeunlearn.cli", "methods"], capture_output=True, text=True, check=True
    )
    assert "shrink (weights)" in said.stdout
    assert "none: an example" in said.stdout
    assert "\nbroken: the method broken" in said.stdout  # and does not hide the others
    for name in ("sspu", "unierase", "delta", "dsg", "npo-lora"):
        assert f"\n{name} (" in f"\n{said.stdout}"
