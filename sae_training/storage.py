"""SAEs on disk: SAELens folders, one a layer, and anything else that sae_lens opens."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saeunlearn.checkpoints import atomic_folder, write_json
from saeunlearn.errors import ModelError, NonFiniteError, SAEMismatchError
from saeunlearn.models import LanguageModel


def save_saes(saes: Mapping[int, Any], folder: str | Path) -> None:
    """One SAELens folder a layer, `layer_{l}/`, and an index; written whole or not at all."""
    with atomic_folder(folder, replaces=lambda p: (p / "saes.json").exists()) as work:
        write_saes(saes, work)


def write_saes(saes: Mapping[int, Any], folder: Path) -> None:
    """What `save_saes` writes, file by file."""
    for layer, sae in saes.items():
        sae.save_model(folder / f"layer_{layer}")
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(folder / "saes.json", {"schema": 1, "layers": sorted(saes), "created": created})


def load_saes(source: str | Path, model: LanguageModel | None = None) -> dict[int, Any]:
    """{layer: SAE} from a folder written by `save_saes`, a single SAELens folder, a folder of such folders, or
    a `release:sae_id` of the sae_lens registry (Gemma Scope among them).

    The layer is read from each SAE's hook name. Raises SAEMismatchError when it cannot be told or two SAEs claim
    the same layer.
    """
    from sae_lens import SAE

    path = Path(source).expanduser()
    device = str(model.device) if model else "cpu"
    if path.is_dir():
        folders = [path] if (path / "cfg.json").exists() else sorted(p.parent for p in path.glob("*/cfg.json"))
        if not folders:
            several = sorted(p.parent.parent.name for p in path.glob("*/*/cfg.json"))
            hint = f": name one of its sets, {', '.join(dict.fromkeys(several))}" if several else ""
            raise SAEMismatchError(f"{path} holds no SAELens folder (cfg.json with sae_weights.safetensors){hint}")
        loaded = [(str(f), _load_folder(f, device)) for f in folders]
    elif ":" in str(source) and not path.exists():
        release, _, sae_id = str(source).partition(":")
        try:
            loaded = [(str(source), SAE.from_pretrained(release, sae_id, device=device))]
        except Exception as e:  # the registry raises many unrelated types
            raise SAEMismatchError(f"cannot load {sae_id!r} of {release!r} through sae_lens: {e}") from e
    else:
        raise SAEMismatchError(f"{source} is neither a folder nor `release:sae_id`")
    out: dict[int, Any] = {}
    for name, sae in loaded:
        layer = _layer_of(sae, name)
        if layer in out:
            raise SAEMismatchError(f"two SAEs in {source} are for layer {layer}")
        out[layer] = sae.requires_grad_(False).eval()
    return dict(sorted(out.items()))


def _load_folder(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    if not (folder / "sae_weights.safetensors").exists():
        raise SAEMismatchError(f"{folder} has no sae_weights.safetensors")
    try:
        sae = SAE.load_from_disk(folder, device=device)
    except Exception as e:  # a foreign cfg.json fails in as many ways as there are fields
        raise SAEMismatchError(f"cannot load the SAE in {folder}: {type(e).__name__}: {e}") from e
    if not all(torch.isfinite(p).all() for p in sae.parameters()):
        raise NonFiniteError(f"the SAE in {folder} holds NaN or infinity")
    return sae


def _layer_of(sae: Any, name: str) -> int:
    hook = getattr(sae.cfg.metadata, "hook_name", None) or ""
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_post|hook_resid_pre|hook_out|hook_in)", hook)
    if not found:
        raise SAEMismatchError(f"{name}: hook {hook!r} is not a residual stream between blocks")
    layer = int(found[1]) - (found[2] in ("hook_resid_pre", "hook_in"))
    if layer < 0:
        raise SAEMismatchError(f"{name}: {hook!r} is the embedding, before any block")
    return layer


def parse_layers(model: LanguageModel, spec: str) -> list[int]:
    """`all`, or numbers and ranges as in `1,3,5-8`. Raises ModelError for anything else."""
    if spec == "all":
        return list(range(model.n_layers))
    out: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ModelError(f"layers {spec!r}: use `all`, or numbers and ranges such as 1,3,5-8")
        model.check_layers([int(first), int(last or first)])  # before a range of millions is written out
        out |= set(range(int(first), int(last or first) + 1))
    model.check_layers(sorted(out))
    return sorted(out)
