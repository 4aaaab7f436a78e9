"""Erasures that act through hooks, attached to a plain Hugging Face model.

`saeunlearn export` copies this package next to a saved Erasure, so it imports torch, safetensors and (for offsets)
transformers, and nothing else of saeunlearn:

    handle = attach(model, folder)
    handle.remove()
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .layout import BLOCK_PATHS, DeployError, find_blocks

__all__ = ["BLOCK_PATHS", "RUNTIMES", "DeployError", "Handle", "attach", "find_blocks"]

SCHEMA = 1  # of erasure.json

# kind of a part → module and class made of (spec, tensors), with .attach(model) → function that undoes it
RUNTIMES = {"guard": (".guard", "GuardRuntime"), "offset": (".offset", "OffsetRuntime")}


class Handle:
    """An attached Erasure; `remove` takes its hooks off again."""

    def __init__(self, undo: Sequence[Callable[[], None]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def attach(model: Any, folder: str | Path) -> Handle:
    """Verify the saved Erasure in `folder` and hook its parts into a Hugging Face model.

    Whether the model is the one that the Erasure was made on is not checked, only that it fits. Raises DeployError
    for a damaged folder, for parts that are no hooks, and for a model that does not fit; nothing is attached then.
    """
    runtimes = load_runtimes(Path(folder).expanduser())
    undo: list[Callable[[], None]] = []
    try:
        for runtime in runtimes:
            undo.append(runtime.attach(model))
    except BaseException:
        Handle(undo).remove()
        raise
    return Handle(undo)


def load_runtimes(folder: Path) -> list[Any]:
    """The runtime of every part in the folder, in order. Raises DeployError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = json.loads((folder / "erasure.json").read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise DeployError(f"{folder} has schema {manifest['schema']}; this version reads schema {SCHEMA}")
        runtimes = []
        for part in manifest["parts"]:
            kind, name = part["kind"], str(part["file"])
            if kind not in RUNTIMES:
                raise DeployError(f"{folder} has a part of kind {kind}, which is no hook: merge the Erasure instead")
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise DeployError(f"{folder} names the payload {name!r}, which is no safetensors file in it")
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != part["sha256"]:
                raise DeployError(f"{folder / name} is damaged: its sha256 is not the one in erasure.json")
            module, runtime = RUNTIMES[kind]
            made = getattr(importlib.import_module(module, __package__), runtime)
            runtimes.append(made(part["spec"], load_file(folder / name)))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as e:
        raise DeployError(f"{folder} is not a readable Erasure: {e!r}") from e
    return runtimes
