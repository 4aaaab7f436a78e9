"""A checkpoint of SAE training: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn.errors import RunError

SCHEMA = 1


def save_checkpoint(file: Path, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors and JSON; a kill at any moment leaves the old file or the new one. Raises RunError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    said = {"schema": SCHEMA, "key": key, "info": info}
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial, {"saeunlearn": json.dumps(said)})
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, file)
    except BaseException as e:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(e, OSError | SafetensorError):
            raise RunError(f"cannot write the checkpoint {file}: {e}") from e
        raise


def load_checkpoint(file: Path, key: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was saved. Raises RunError for a damaged file, or one of a run with other settings, model or data."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=str(device)) as f:
            said = json.loads(f.metadata()["saeunlearn"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
        if said["schema"] != SCHEMA or said["key"] != key:
            raise RunError(f"{file} is the checkpoint of a run with other settings, model, data or versions: "
                           "remove it, or choose another place")  # fmt: skip
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{file} is not a checkpoint: {e}") from e
    return tensors, said["info"]
