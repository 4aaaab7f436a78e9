"""An Erasure in a form that works without this library: a PEFT adapter, or hooks with the code that attaches them."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import deploy
from .checkpoints import atomic_folder
from .erasure import Erasure
from .errors import ConfigError, ErasureError

PACKAGE = "saeunlearn_deploy"  # name of the copy of saeunlearn.deploy in an exported folder


def export(erasure: Erasure, folder: str | Path, base: str | None = None) -> str:
    """Write `erasure` to `folder` and say in a line how it is used.

    Low-rank weights become a PEFT adapter, which names its base model: `base`, a folder or hub id. Parts that act
    through hooks are saved as they are, beside a copy of `saeunlearn.deploy` and a README that shows how to attach
    them. Raises ConfigError where `base` is missing or without use, ErasureError for what cannot be exported.
    """
    kinds = {p.kind for p in erasure.parts}
    if kinds <= deploy.RUNTIMES.keys():
        if base is not None:
            raise ConfigError("--base is for low-rank weights: an Erasure of hooks names no base model")
        _export_hooks(erasure, folder)
        return f"{folder}: the Erasure and the code that attaches it to a Hugging Face model; see README.md in it"
    if hooks := kinds & deploy.RUNTIMES.keys():
        raise ErasureError(
            f"this Erasure has parts of kind {', '.join(sorted(kinds))}: only those of one sort, weights or hooks "
            f"({', '.join(sorted(hooks))}), can be exported"
        )
    if base is None:
        raise ConfigError("--base is required: a PEFT adapter names the model that it belongs to (folder or hub id)")
    erasure.to_peft(folder, base)
    return f"{folder}: a PEFT adapter; peft.PeftModel.from_pretrained(model, {str(folder)!r}) loads it"


def snippet(folder: str) -> str:
    """The lines of Python that attach an exported Erasure in `folder` to `model`."""
    return (
        f"import sys\nsys.path.insert(0, {folder!r})\n"
        f"from {PACKAGE} import attach\nhandle = attach(model, {folder!r})  # handle.remove() takes it off again\n"
    )


def _export_hooks(erasure: Erasure, folder: str | Path) -> None:
    source = Path(deploy.__file__).parent
    with atomic_folder(folder) as temp:
        erasure.save(temp)
        shutil.copytree(source, temp / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        (temp / "README.md").write_text(
            f"# Erasure {erasure.id[:12]} ({erasure.manifest['method']})\n\n"
            f"It acts on {erasure.manifest['model']} at inference and changes no weight. With `model` a Hugging Face "
            "causal model (torch, transformers and safetensors are all it needs):\n\n"
            f"```python\n{snippet(str(folder))}```\n\n"
            "Only this process is guarded: the checkpoint keeps what was to be forgotten, and whoever holds it can "
            "leave these lines out.\n",
            encoding="utf-8",
        )
