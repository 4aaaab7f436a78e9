"""Erasure: a reversible, saved edit of a model. A directory with erasure.json and safetensors payloads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    PARTIAL,
    SENSITIVE,
    atomic_folder,
    check_parent,
    fingerprint_folder,
    merge_erasure,
    read_ledger,
    sha256_file,
    unmerge,
    write_json,
)
from .errors import ErasureError, NonFiniteError
from .models import LanguageModel
from .parts import Part, WeightDelta, base_parameters, part_kind
from .stored import fingerprint_tensors, parameter_key

__all__ = ["Erasure", "Handle", "Part", "WeightDelta", "fingerprint_folder", "read_ledger", "unmerge"]

SCHEMA = 1
MANIFEST = "erasure.json"
_PAYLOAD = re.compile(r"part-\d{3,}\.safetensors")
_EMBEDDING_MODULES = ("embed_tokens", "wte", "wpe", "embed_in")
_LIBRARIES = ("saeunlearn", "torch", "transformers", "sae_lens")


class Handle:
    """An applied Erasure. `revert()` once, last applied first; or use it as a context manager."""

    def __init__(self, erasure: Erasure, model: LanguageModel, undo: list[Callable[[], None]]) -> None:
        self.erasure = erasure
        self.model = model
        self._undo: list[Callable[[], None]] | None = undo
        self._lineage = list(model.lineage)

    def revert(self) -> None:
        """Restore the bits from before `apply`. Raises ErasureError when done before or out of order."""
        if self._undo is None:
            raise ErasureError(f"Erasure {self.erasure.id[:12]}… was reverted already")
        if self.model.lineage != self._lineage:
            raise ErasureError(
                f"Erasure {self.erasure.id[:12]}… is not the last one applied to {self.model.name}: "
                "revert the later ones first"
            )
        for undo in reversed(self._undo):
            undo()
        self.model.lineage.pop()
        self._undo = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._undo is not None:
            self.revert()


class Erasure:
    """An ordered list of parts and the manifest that says where they come from. Treat both as read-only."""

    def __init__(self, parts: Sequence[Part], manifest: dict[str, Any]) -> None:
        if not parts:
            raise ErasureError("an Erasure needs at least one part")
        names = [parameter_key(p.name) for p in parts if isinstance(p, WeightDelta)]
        if double := {n for n in names if names.count(n) > 1}:
            raise ErasureError(f"several deltas change {', '.join(sorted(double))}: add them up first")
        self.parts = list(parts)
        self.manifest = manifest

    @classmethod
    def create(
        cls,
        model: LanguageModel,
        parts: Sequence[Part],
        *,
        method: str,
        config: dict[str, Any],
        seed: int,
        forget_fingerprint: str,
        retain_fingerprint: str,
        selection: dict[str, Any] | None = None,
        saes: dict[str, Any] | None = None,
        losses: Sequence[dict[str, Any]] = (),
        extra: dict[str, Any] | None = None,
    ) -> Erasure:
        """An Erasure of `model` in its present state; `config`, `losses` and the rest must be JSON-able.

        Raises ErasureError where a part does not fit the model, NonFiniteError for NaN or infinity in a part
        or in the numbers given.
        """
        parts = list(parts)
        for part in parts:
            part.check(model)
            if bad := _non_finite(part.tensors()):
                raise NonFiniteError(f"the {part.kind} {part.spec().get('name', '')} of {method} has {bad}")
        changed = [c for part in parts for c in part.changed()]
        total = sum(p.numel() for p in base_parameters(model).values())
        count = sum(c["count"] for c in changed)
        manifest = {
            "schema": SCHEMA,
            "note": SENSITIVE,
            "method": method,
            "config": config,
            "seed": seed,
            "model": model.name,
            "parent_fingerprint": model.fingerprint(),
            "forget_fingerprint": forget_fingerprint,
            "retain_fingerprint": retain_fingerprint,
            "selection": selection,
            "saes": saes,
            "losses": list(losses),
            "changed": {"parameters": changed, "count": count, "share": count / total},
            "versions": {name: _version(name) for name in _LIBRARIES},
            "threads": torch.get_num_threads(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "extra": extra or {},
        }
        try:
            return cls(parts, json.loads(json.dumps(manifest, allow_nan=False)))
        except ValueError as e:
            raise NonFiniteError(f"the manifest of {method} holds NaN or infinity: {e}") from e
        except TypeError as e:
            raise ErasureError(f"the manifest of {method} is not JSON: {e}") from e

    @property
    def parent(self) -> str:
        """Fingerprint of the model that this was made on."""
        return self.manifest["parent_fingerprint"]

    @cached_property
    def id(self) -> str:
        """sha256 over parts, parent, method and config: equal after save and load, and free of time."""
        m = self.manifest
        parts = [[p.kind, p.spec(), fingerprint_tensors(p.tensors().items())] for p in self.parts]
        text = json.dumps([parts, self.parent, m["method"], m["config"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    # --- disk ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the directory, all or nothing; an Erasure that is there is replaced, anything else is not.

        Raises ErasureError when it cannot be written.
        """
        from safetensors import torch as st

        with atomic_folder(folder, replaces=_is_erasure) as temp:
            entries = []
            for i, part in enumerate(self.parts):
                file = temp / f"part-{i:03d}.safetensors"
                st.save_file(part.tensors(), file)
                sha = sha256_file(file)
                entries.append({"kind": part.kind, "file": file.name, "sha256": sha, "spec": part.spec()})
            write_json(temp / MANIFEST, {**self.manifest, "id": self.id, "parts": entries})

    @classmethod
    def load(cls, folder: str | Path) -> Erasure:
        """Read and verify a directory that `save` wrote. Raises ErasureError for everything else."""
        from safetensors import SafetensorError
        from safetensors import torch as st

        folder = Path(folder).expanduser()
        if not (folder / MANIFEST).is_file():
            raise ErasureError(f"{folder} is not an Erasure: it has no {MANIFEST}")
        if folder.name.endswith(PARTIAL):
            raise ErasureError(f"{folder} is the unfinished rest of a save that was interrupted: delete it")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["schema"] != SCHEMA:
                raise ErasureError(f"{folder} has schema {manifest['schema']}; this version reads schema {SCHEMA}")
            entries, said = manifest.pop("parts"), manifest.pop("id")
            parts = []
            for entry in entries:
                kind, file = entry["kind"], str(entry["file"])
                cls_of_part = part_kind(kind)
                if not _PAYLOAD.fullmatch(file) or not (folder / file).is_file():
                    raise ErasureError(f"{folder} names the payload {file!r}, which is missing or no safetensors")
                if sha256_file(folder / file) != entry["sha256"]:
                    raise ErasureError(f"{folder / file} is damaged: its sha256 is not the one in {MANIFEST}")
                tensors = st.load_file(folder / file)
                if bad := _non_finite(tensors):
                    raise ErasureError(f"{folder / file} has {bad}")
                parts.append(cls_of_part.from_payload(entry["spec"], tensors))
            erasure = cls(parts, manifest)
            if erasure.id != said:
                raise ErasureError(f"{folder} is damaged: parts, parent, method or config are not those of its id")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
            raise ErasureError(f"{folder} is not a readable Erasure: {e!r}") from e
        return erasure

    # --- use -------------------------------------------------------------------------------------------

    def apply(self, model: LanguageModel, *, force: bool = False) -> Handle:
        """Edit the model in place. `force` skips the fingerprint, never names and shapes.

        Raises ErasureError when this was made on another model, NonFiniteError when the edit overflows; the
        model is unchanged then.
        """
        base = model.base_fingerprint()  # also where forced: it must be taken before the first edit
        if not force:
            ledger = read_ledger(model.source) if model.source else []
            check_parent(self.parent, model.name, base, ledger, model.lineage)
        for part in self.parts:
            part.check(model)
        undo: list[Callable[[], None]] = []
        try:
            for part in self.parts:
                undo.append(part.apply(model))
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        model.lineage.append(self.id)
        return Handle(self, model, undo)

    def merge(
        self,
        checkpoint_dir: str | Path,
        out_dir: str | Path,
        *,
        keep_originals: bool = True,
        cost: dict[str, Any] | None = None,
        force: bool = False,
        card: Path | None = None,
    ) -> None:
        """Write an ordinary checkpoint with the edit in its weights, shard by shard, without opening a model.

        `keep_originals` makes `unmerge` possible and keeps what older merges kept; without it the folder
        holds no originals at all, so no merge in it can be undone. `cost` goes to the ledger. `card`: a model card
        that becomes README.md where the checkpoint has none; `unmerge` takes it away again. Only
        configuration, tokenizer and safetensors travel: other formats would carry the unedited weights along.
        Raises ErasureError: another parent (unless `force`), `out_dir` not empty, disk full, no weight edit.
        """
        try:
            json.dumps(cost, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise ErasureError(f"the cost of a merge must be finite JSON: {e}") from e
        merge_erasure(
            self,
            self._weight_deltas("merged into a checkpoint"),
            checkpoint_dir,
            out_dir,
            keep_originals=keep_originals,
            cost=cost,
            force=force,
            card=card,
        )

    def to_peft(self, folder: str | Path, base_model_name_or_path: str | Path) -> None:
        """Write a PEFT LoRA adapter that gives the same model on top of the base.

        All factors are padded with zeros to one rank r and alpha = r, so that PEFT's scaling is 1.
        Raises ErasureError for parts that are not low-rank factors of a linear layer.
        """
        from peft import LoraConfig
        from safetensors import torch as st
        from torch.nn.functional import pad as pad_zeros

        deltas = self._weight_deltas("exported to PEFT")
        modules = [d.name.removesuffix(".weight") for d in deltas]
        for d in deltas:
            if d.left is None:
                raise ErasureError(f"the delta of {d.name} is dense, not low-rank: merge it instead")
            if not d.name.endswith(".weight") or parameter_key(d.name).split(".")[0] in _EMBEDDING_MODULES:
                raise ErasureError(f"{d.name} is not the weight of a linear layer: merge it instead")
        r = max(1, *(d.rank or 0 for d in deltas))
        tensors: dict[str, Tensor] = {}
        for d, module in zip(deltas, modules):
            assert d.left is not None
            assert d.right is not None
            pad = r - d.left.shape[1]
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = pad_zeros(d.right, (0, 0, 0, pad))
            tensors[f"{prefix}.lora_B.weight"] = pad_zeros(d.left, (0, pad))
        config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(base_model_name_or_path),
            inference_mode=True,
            r=r,
            lora_alpha=r,
            lora_dropout=0.0,
            bias="none",
            fan_in_fan_out=any(d.transposed for d in deltas),
            # PEFT matches a list by suffix, which may hit more modules; a pattern must match the full name.
            target_modules="|".join(re.escape(m) for m in modules),
        )
        with atomic_folder(folder) as temp:
            config.save_pretrained(str(temp))
            st.save_file(tensors, temp / "adapter_model.safetensors", metadata={"format": "pt"})

    def _weight_deltas(self, what: str) -> list[WeightDelta]:
        deltas = _deltas(self.parts)
        if len(deltas) < len(self.parts):
            kinds = sorted({p.kind for p in self.parts} - {WeightDelta.kind})
            raise ErasureError(f"an Erasure with parts of kind {', '.join(kinds)} cannot be {what}")
        return deltas


def _deltas(parts: Sequence[Part]) -> list[WeightDelta]:
    return [p for p in parts if isinstance(p, WeightDelta)]


def _non_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensors hold NaN or infinity, in words; empty where none does."""
    bad = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    return f"NaN or infinity in {', '.join(bad)}" if bad else ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_erasure(folder: Path) -> bool:
    """Only what `save` writes may be replaced: a stranger's file in the folder makes it not ours."""
    names = {f.name for f in folder.iterdir()}
    return MANIFEST in names and all(n == MANIFEST or _PAYLOAD.fullmatch(n) for n in names)
