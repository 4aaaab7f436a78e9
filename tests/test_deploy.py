"""An exported guard acts on a plain Hugging Face model, in a process that cannot import saeunlearn."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, make, plain_logits, same_logits
from guarded import PROMPTS, fitted_sae, generated, guard
from transformers import AutoModelForCausalLM

from saeunlearn import deploy, erasure
from saeunlearn.checkpoints import sha256_file
from saeunlearn.cli import main
from saeunlearn.deploy import DeployError, attach
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError, ErasureError
from saeunlearn.export import PACKAGE, export, snippet
from saeunlearn.models import LanguageModel

# Runs the README's lines where saeunlearn and sae_lens cannot be imported.
STRANGER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("saeunlearn", "sae_lens", "transformer_lens"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
sys.path = [p for p in sys.path if p != {source!r}]
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({model!r}).eval()
ids, rows, mask = (torch.tensor(x) for x in {inputs})
with torch.no_grad():
    plain = model(input_ids=ids).logits
{snippet}
    guarded = model(input_ids=ids).logits
    out = model.generate(input_ids=rows, attention_mask=mask, **{generation})
    handle.remove()
    same = torch.equal(model(input_ids=ids).logits, plain)
loaded = [m for m in sys.modules if m.split(".")[0] == "saeunlearn"]
print(json.dumps([guarded.tolist(), out.tolist(), same, loaded]))
"""


@pytest.mark.slow
def test_a_stranger_gets_the_same_logits_and_text(lm: LanguageModel, arch_path: Path, tmp_path: Path) -> None:
    part = guard("dsg", strength=20.0, sae=fitted_sae(lm))
    made = make(lm, [part, guard("clamp", "topk-rescaled", layer=2)])
    made.save(tmp_path / "erasure")
    folder = tmp_path / "exported"
    assert main(["export", str(tmp_path / "erasure"), str(folder)]) == 0

    readme = (folder / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert lines == snippet(str(folder))
    assert len(lines.splitlines()) == 4
    if arch_path.name != "llama":  # one process is enough; the others run the same copy of the code here
        model = AutoModelForCausalLM.from_pretrained(arch_path).eval()
        handle = attach(model, folder)
        with torch.no_grad(), made.apply(lm):
            assert torch.equal(model(input_ids=IDS).logits, lm.logits(IDS))
            assert generated(LanguageModel(model, lm.tokenizer), PROMPTS) == generated(lm, PROMPTS)
        handle.remove()
        assert same_logits(model(input_ids=IDS).logits, plain_logits(arch_path))
        return

    rows = [[lm.bos_id, *lm.tokenizer(p, add_special_tokens=False).input_ids] for p in PROMPTS]
    width = max(map(len, rows))
    padded = [[lm.pad_id] * (width - len(r)) + r for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    generation = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": lm.pad_id}
    script = STRANGER.format(
        source=str(Path(deploy.__file__).parents[2]), model=str(arch_path), inputs=[IDS.tolist(), padded, mask],
        snippet="\n".join("    " + line for line in lines.splitlines()), generation=generation,
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits, out, reverted, loaded = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad(), made.apply(lm):
        assert torch.allclose(torch.tensor(logits), lm.logits(IDS), atol=1e-5)
        expected = lm.model.generate(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), **generation)
    assert out == expected.tolist()
    assert out != lm.model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask), **generation).tolist()
    assert reverted
    assert loaded == []


def test_the_package_imports_only_itself_torch_and_safetensors() -> None:
    allowed = {"torch", "safetensors", "transformers", *sys.stdlib_module_names}
    files = list(Path(deploy.__file__).parent.glob("*.py"))
    assert len(files) >= 3
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and str(node.module).split(".")[0] in allowed), file
    assert deploy.SCHEMA == erasure.SCHEMA


def test_an_exported_folder_is_still_an_erasure(llama: LanguageModel, tmp_path: Path) -> None:
    made = make(llama, [guard("conditional")])
    said = export(made, tmp_path / "out")
    assert "README.md" in said
    assert Erasure.load(tmp_path / "out").id == made.id
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "erasure.json", "part-000.safetensors", "README.md", PACKAGE,
    }  # fmt: skip
    assert not any(s[:20] in f.read_text() for s in SENTENCES for f in (tmp_path / "out").rglob("*.md"))
    with pytest.raises(ErasureError, match="not empty"):
        export(made, tmp_path / "out")


def test_what_cannot_be_exported(llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from erasures import deltas

    made = make(llama)
    with pytest.raises(ConfigError, match="--base is required"):
        export(made, tmp_path / "out")
    with pytest.raises(ConfigError, match="names no base model"):
        export(make(llama, [guard()]), tmp_path / "out", "base")
    mixed: Any = [*deltas(llama), guard()]
    with pytest.raises(ErasureError, match="only those of one sort"):
        export(make(llama, mixed), tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()
    assert "peft.PeftModel" in export(made, tmp_path / "out", str(llama.source))
    made.save(tmp_path / "erasure")
    assert main(["export", str(tmp_path / "erasure"), str(tmp_path / "other")]) == 1
    assert "ConfigError: --base is required" in capsys.readouterr().err


def test_damaged_and_foreign_folders_attach_nothing(llama: LanguageModel, checkpoints: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))

    def refused(folder: Path, said: str, on: Any = model) -> None:
        with pytest.raises(DeployError, match=said):
            attach(on, folder)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in on.modules())

    refused(tmp_path, "not a readable Erasure")
    make(llama).save(tmp_path / "weights")
    refused(tmp_path / "weights", "weight_delta, which is no hook: merge")
    make(llama, [guard(), guard(layer=3)]).save(tmp_path / "good")
    manifest = json.loads((tmp_path / "good" / "erasure.json").read_text())

    def changed(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / name))
        (folder / "erasure.json").write_text(json.dumps({**manifest, **changes}))
        return folder

    first, second = manifest["parts"]
    refused(changed("schema", schema=99), "schema 99")
    refused(changed("outside", parts=[{**first, "file": "../good/part-000.safetensors"}]), "no safetensors file in it")
    refused(changed("spec", parts=[{**first, "spec": {**first["spec"], "mode": "melt"}}]), "melt")
    refused(changed("keys", parts=[{"kind": "guard"}]), "not a readable Erasure")
    refused(changed("layer", parts=[first, {**second, "spec": {**second["spec"], "layer": 7}}]), "4 blocks")
    broken = changed("bits")
    payload = broken / "part-001.safetensors"
    payload.write_bytes(payload.read_bytes()[:-1] + b"\x01")
    refused(broken, "is damaged")
    (broken / "part-001.safetensors").write_bytes(b"no tensors")
    second = {**second, "sha256": sha256_file(payload)}
    (broken / "erasure.json").write_text(json.dumps({**manifest, "parts": [first, second]}))
    refused(broken, "not a readable Erasure")
    refused(tmp_path / "good", "known list of blocks", torch.nn.Linear(2, 2))
