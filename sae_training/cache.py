"""Activations on disk: memory-mapped safetensors shards with checksums, which later runs read instead of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn.checkpoints import sha256_file, write_json
from saeunlearn.corpus import Window
from saeunlearn.errors import ConfigError, RunError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

from .activations import Capture, positions
from .processes import Processes

SHARD_BYTES = 2**28
SCHEMA = 1


def cached(capture: Capture, folder: Path, items: Sequence[Window], layers: Sequence[int], model: LanguageModel,
           data: str, dtype: str, progress: Progress, processes: Processes) -> Capture:  # fmt: skip
    """`capture` from shards in `folder`, written first where they are missing; a killed run goes on where it stopped.

    The index says which model, data and layers they are of. Raises ConfigError for a dtype other than float32 and
    bfloat16, RunError for a folder of something else, or a shard whose sha256 is not the one in the index.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"activations are cached in float32 or bfloat16, not {dtype!r}")
    shards = _cut(items, layers, model.d_model, dtype)
    wanted: dict[str, Any] = {
        "schema": SCHEMA, "model": model.fingerprint(), "data": data, "layers": list(layers), "dtype": dtype,
        "windows": hashlib.sha256(json.dumps([len(w.ids) for w in items]).encode()).hexdigest(), "shards": len(shards),
    }  # fmt: skip
    if processes.first:
        _fill(capture, folder, items, shards, wanted, getattr(torch, dtype), (len(layers), model.d_model), progress)
    processes.wait()
    return _reader(folder, items, shards)


def _cut(items: Sequence[Window], layers: Sequence[int], d: int, dtype: str) -> list[range]:
    """Consecutive windows, about SHARD_BYTES of activations together."""
    most = max(1, SHARD_BYTES // (len(layers) * d * (4 if dtype == "float32" else 2)))
    shards, first, held = [], 0, 0
    for i, w in enumerate(items):
        if held and held + positions(w) > most:
            shards.append(range(first, i))
            first, held = i, 0
        held += positions(w)
    return [*shards, range(first, len(items))]


def _fill(capture: Capture, folder: Path, items: Sequence[Window], shards: Sequence[range], wanted: dict[str, Any],
          dtype: torch.dtype, shape: tuple[int, int], progress: Progress) -> None:  # fmt: skip
    from safetensors.torch import save_file

    index = folder / "activations.json"
    sums: dict[str, str] = {}
    if index.exists():
        try:
            said = json.loads(index.read_text())
            sums = said.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError) as e:
            raise RunError(f"{index} is damaged: {e!r}") from e
        if said != wanted:
            raise RunError(f"{folder} holds activations of another model, data, layers or dtype: choose another cache")
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no activations: choose another cache")
    folder.mkdir(parents=True, exist_ok=True)
    progress.start("activation cache", len(shards))
    for n, shard in enumerate(shards):
        file = folder / _name(n)
        if _name(n) not in sums:
            h = torch.empty(shape[0], sum(positions(items[i]) for i in shard), shape[1])
            capture(shard, h)
            partial = file.with_suffix(".partial")
            save_file({"h": h.to(dtype)}, partial)
            sums[_name(n)] = sha256_file(partial)
            partial.replace(file)
            write_json(index, {**wanted, "sha256": sums})
        elif not file.exists() or sha256_file(file) != sums[_name(n)]:
            raise RunError(f"{file} is missing or damaged: remove {folder} and run again")
        progress.step()
    progress.finish()


def _reader(folder: Path, items: Sequence[Window], shards: Sequence[range]) -> Capture:
    from safetensors import safe_open

    maps = [safe_open(folder / _name(n), framework="pt").get_slice("h") for n in range(len(shards))]
    place: list[tuple[int, int]] = []
    for n, shard in enumerate(shards):
        at = 0
        for i in shard:
            place.append((n, at))
            at += positions(items[i])

    def capture(chosen: Sequence[int], out: Tensor) -> None:
        at = 0
        for i in chosen:
            (shard, first), n = place[i], positions(items[i])
            out[:, at : at + n] = maps[shard][:, first : first + n].to(out)
            at += n

    return capture


def _name(n: int) -> str:
    return f"activations-{n:05d}.safetensors"
