"""What lies in a checkpoint folder: its safetensors, their names, and the fingerprint of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .deploy.layout import BLOCK_PATHS
from .errors import ErasureError, ModelError


def parameter_key(name: str) -> str:
    """A parameter's name without the base-model prefix (old GPT-2 files lack it) and PEFT's `.base_layer`.

    GPT-NeoX writes its `lm_head` to disk as `embed_out`; the key is that of the model in memory.
    """
    root, _, rest = name.partition(".")
    if root == "embed_out":
        return f"lm_head.{rest}"
    known = any(path.split(".")[0] == root for path in BLOCK_PATHS)
    return (rest if known else name).replace(".base_layer", "")


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over (`parameter_key`, dtype, shape, bytes) of each tensor; one in memory at a time."""
    lines = []
    for name, t in tensors:
        flat = t.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().data if t.numel() else b""
        digest = hashlib.sha256(raw).hexdigest()
        lines.append(f"{parameter_key(name)} {str(t.dtype).removeprefix('torch.')} {list(t.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def lineage_fingerprint(base: str, erasure_ids: Sequence[str]) -> str:
    """The fingerprint of a model with fingerprint `base` after these Erasures were applied in order."""
    return hashlib.sha256("\n".join([base, *erasure_ids]).encode()).hexdigest() if erasure_ids else base


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint folder as stored, one at a time over all shards."""
    from safetensors import safe_open

    for file in checkpoint_files(folder):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                yield name, f.get_tensor(name)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors shards of a checkpoint folder, sorted. Raises ModelError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as e:
            raise ModelError(f"{index} is damaged: {e!r}") from e
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise ModelError(f"{folder} lacks the shards {missing}")
        return [folder / n for n in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ModelError(f"{folder} has no model.safetensors (pickled .bin files are refused: convert them)")


def check_folder(path: Path) -> None:
    """Raises ModelError or ErasureError, naming what is wrong, for a folder that no model can be opened from."""
    if (path / "erasure.json").exists():
        raise ErasureError(f"{path} is an Erasure, not a model: `saeunlearn apply` it to its base checkpoint")
    if (path / "adapter_config.json").exists():
        if not (path / "adapter_model.safetensors").exists():
            raise ModelError(f"{path} has no adapter_model.safetensors (pickled .bin adapters are refused)")
        return
    if not (path / "config.json").exists():
        raise ModelError(f"{path} has no config.json: not a Hugging Face model folder")
    checkpoint_files(path)
