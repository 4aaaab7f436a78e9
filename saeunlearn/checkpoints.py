"""Edits of checkpoint folders on disk, tensor by tensor, without opening the model; the ledger of merges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ErasureError, ModelError
from .stored import checkpoint_files, fingerprint_tensors, lineage_fingerprint, parameter_key, stored_tensors

if TYPE_CHECKING:
    from .erasure import Erasure
    from .parts import WeightDelta

LEDGER_SCHEMA = 1
ROOM = "saeunlearn"  # the folder inside a merged checkpoint that holds the ledger and the kept originals
CARD = "README.md"  # the model card of a Hugging Face folder
PARTIAL = ".partial"  # how a folder's name ends while it is being written
SENSITIVE = (
    "This can be reversed: whoever holds it can restore what was erased. "
    "It is as sensitive as the original model; protect or delete it accordingly."
)
# What may travel into a merged folder besides its safetensors. A list of what is allowed, because every other
# format (pytorch_model.bin, tf_model.h5, *.gguf, *.onnx, consolidated.*, …) can hold the unedited weights.
_PLAIN = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".bpe", ".spm", ".vocab"}
_PLAIN_NAMES = ("license", "notice", "use_policy", "readme")
_INDEX = "model.safetensors.index.json"
_EDITABLE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_EMBEDDINGS = {"embed_tokens.weight", "wte.weight", "embed_in.weight"}
_HEADS = {"lm_head.weight", "embed_out.weight"}


def fingerprint_folder(checkpoint_dir: str | Path) -> str:
    """What `LanguageModel.open(checkpoint_dir).fingerprint()` gives, without opening the model."""
    from safetensors import SafetensorError

    try:
        return fingerprint_tensors(stored_tensors(_checkpoint(checkpoint_dir)))
    except SafetensorError as e:
        raise ModelError(f"a shard of {checkpoint_dir} is damaged: {e}") from e


def read_ledger(checkpoint_dir: str | Path) -> list[dict[str, Any]]:
    """The merges that made this folder, oldest first; empty for an unedited one. ErasureError if damaged or absent."""
    if not Path(checkpoint_dir).expanduser().is_dir():
        raise ErasureError(f"{checkpoint_dir} is not a checkpoint folder")
    file = Path(checkpoint_dir).expanduser() / ROOM / "ledger.json"
    if not file.exists():
        return []
    try:
        ledger = json.loads(file.read_text(encoding="utf-8"))
        schema, entries = ledger["schema"], ledger["entries"]
        for key in ("erasure_id", "parent_fingerprint", "resulting_fingerprint", "originals"):
            [entry[key] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ErasureError(f"the ledger {file} is damaged: {e!r}") from e
    if schema != LEDGER_SCHEMA:
        raise ErasureError(f"the ledger {file} has schema {schema}; this version reads {LEDGER_SCHEMA}")
    return entries


def check_parent(
    parent: str, name: str, fingerprint: str, ledger: Sequence[dict[str, Any]], lineage: Sequence[str] = ()
) -> None:
    """Is a model with these stored tensors, this ledger and these Erasures in memory what `parent` names?

    An Erasure made in memory on top of others names base + lineage, and merging those others gives new
    tensors with a fingerprint of their own; so the ledger is walked back and every way to the same state is
    accepted. Raises ErasureError.
    """
    root, ids = fingerprint, list(lineage)
    accepted = {lineage_fingerprint(root, ids)}
    for entry in reversed(ledger):
        if entry["resulting_fingerprint"] != root:
            break  # the tensors were changed by something else since: the ledger says nothing about them
        root, ids = entry["parent_fingerprint"], [entry["erasure_id"], *ids]
        accepted.add(lineage_fingerprint(root, ids))
    if parent not in accepted:
        found = lineage_fingerprint(fingerprint, lineage)
        raise ErasureError(
            f"the Erasure was made on a model with fingerprint {parent[:12]}…, but {name} has {found[:12]}…: "
            "use the model it was made on, with the same Erasures applied before it"
        )


def merge_erasure(
    erasure: Erasure,
    deltas: Sequence[WeightDelta],
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    keep_originals: bool,
    cost: dict[str, Any] | None,
    force: bool,
    card: Path | None = None,
) -> None:
    """See `Erasure.merge`."""
    source = _checkpoint(checkpoint_dir)
    ledger, before = read_ledger(source), fingerprint_folder(source)
    if not force:
        check_parent(erasure.parent, str(source), before, ledger)
    edits = _targets(source, deltas)
    with atomic_folder(out_dir) as temp:
        originals, left_out = _copy_edited(source, temp, edits, keep=keep_originals)
        order, file = len(ledger) + 1, None
        if keep_originals:
            from safetensors import torch as st

            _copy_originals(source, temp, ledger)
            file = f"originals-{order}.safetensors"
            (temp / ROOM).mkdir(exist_ok=True)
            st.save_file(originals, temp / ROOM / file, metadata={"format": "pt"})
        if card := card if card and card.is_file() and not (temp / CARD).exists() else None:
            _copy(card, temp / CARD)
        m = erasure.manifest
        ids = [e["erasure_id"] for e in ledger] + [erasure.id]
        first = ledger[0]["parent_fingerprint"] if ledger else before
        entry = {
            "order": order,
            "erasure_id": erasure.id,
            "method": m["method"],
            "seed": m["seed"],
            "forget_fingerprint": m["forget_fingerprint"],
            "retain_fingerprint": m["retain_fingerprint"],
            "changed_parameters": len(m["changed"]["parameters"]),
            "changed_values": m["changed"]["count"],
            "erasure_parent": erasure.parent,
            "parent_fingerprint": before,
            "resulting_fingerprint": fingerprint_folder(temp),
            "lineage_fingerprint": lineage_fingerprint(first, ids),
            "forced": force,
            "cost": cost or {},
            "originals": file,
            "originals_sha256": file and sha256_file(temp / ROOM / file),
            "card_sha256": card and sha256_file(temp / CARD),
            "not_copied": left_out,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        _write_ledger(temp, [*ledger, entry])


def unmerge(checkpoint_dir: str | Path, out_dir: str | Path) -> None:
    """Write to `out_dir` the checkpoint as it was before the last merge, bit for bit, and its older ledger.

    Raises ErasureError when there is no merge to undo, its originals were not kept or are damaged, or the
    folder was changed since.
    """
    source = _checkpoint(checkpoint_dir)
    ledger = read_ledger(source)
    if not ledger:
        raise ErasureError(f"{source} has no ledger of merges, so there is nothing to undo")
    *rest, last = ledger
    if not last["originals"]:
        raise ErasureError(f"the last merge into {source} kept no originals; only the base model undoes it")
    file = source / ROOM / Path(last["originals"]).name
    if not file.is_file() or sha256_file(file) != last["originals_sha256"]:
        raise ErasureError(f"the kept originals {file} are missing or damaged (sha256 differs)")
    if fingerprint_folder(source) != last["resulting_fingerprint"]:
        raise ErasureError(f"{source} was changed after its last merge, which cannot be undone exactly any more")
    from safetensors import safe_open

    with atomic_folder(out_dir) as temp, safe_open(file, framework="pt") as kept:

        def original(name: str) -> Callable[[Tensor], Tensor]:
            return lambda _edited: kept.get_tensor(name)

        _copy_edited(source, temp, {n: original(n) for n in kept.keys()}, keep=False)  # noqa: SIM118 - no dict
        if last.get("card_sha256") and (temp / CARD).is_file() and sha256_file(temp / CARD) == last["card_sha256"]:
            (temp / CARD).unlink()  # it tells of a removal that this folder no longer has
        _copy_originals(source, temp, rest)
        if rest:
            _write_ledger(temp, rest)
        if fingerprint_folder(temp) != last["parent_fingerprint"]:
            raise ErasureError(f"undoing the last merge of {source} did not give the checkpoint from before it")


@contextlib.contextmanager
def atomic_folder(target: str | Path, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well and disappears otherwise.

    A `target` that exists and is not empty is replaced only where `replaces(target)`. Raises ErasureError for
    one that must not be, and for every failure to write (such as a full disk).
    """
    from safetensors import SafetensorError

    target = Path(target).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise ErasureError(f"{target} is a file; choose a new folder")
    full = target.is_dir() and any(target.iterdir())
    if full and not (replaces and replaces(target)):
        raise ErasureError(f"{target} exists and is not empty; choose a new folder")
    temp = target.parent / f".{target.name}.{secrets.token_hex(4)}{PARTIAL}"
    old = temp.with_suffix(".old")
    try:
        temp.mkdir(parents=True)
        yield temp
        for path in [*temp.rglob("*"), temp]:
            _sync(path)
        if full:
            os.rename(target, old)
        try:
            os.rename(temp, target)
        except BaseException:
            if full:
                os.rename(old, target)
            raise
        _sync(target.parent)
    except (OSError, SafetensorError) as e:
        raise ErasureError(f"cannot write {target}: {e} (nothing was left behind)") from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_json(file: Path, content: Any) -> None:
    """Indented JSON in UTF-8, written whole or not at all; NaN is refused (ValueError)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    temp = file.with_name(f".{file.name}{PARTIAL}")
    temp.write_text(text + "\n", encoding="utf-8")
    os.replace(temp, file)


def sha256_file(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _checkpoint(folder: str | Path) -> Path:
    """The folder, if it is a whole safetensors checkpoint (ModelError, ErasureError otherwise)."""
    folder = Path(folder).expanduser()
    if (folder / "adapter_config.json").exists():
        raise ErasureError(f"{folder} is a PEFT adapter, or has one on top: merge it into its base model first")
    checkpoint_files(folder)
    return folder


def _targets(source: Path, deltas: Sequence[WeightDelta]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Stored tensor name → its edit. ErasureError for what is missing, misshapen or not a float."""
    from safetensors import safe_open

    where = {name: file for file in checkpoint_files(source) for name in _layout(file)}
    keys = {parameter_key(name): name for name in where}

    def read(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as f:
            return f.get_tensor(name)

    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for delta in deltas:
        key = parameter_key(delta.name)
        ties = _HEADS if key in _EMBEDDINGS else _EMBEDDINGS if key in _HEADS else set()
        twins = [keys[k] for k in ties if k in keys]
        if key in keys:
            # Some files store a tied matrix under both names; an edit of one alone would untie it.
            stored = read(keys[key])
            names = [keys[key], *(n for n in twins if torch.equal(read(n), stored))]
        else:
            names = twins
        if not names:
            raise ErasureError(f"{source} stores no {delta.name}, which the Erasure changes")
        for name in names:
            delta.check_stored(read(name), f"{name} of {source}")
            edits[name] = delta.edit
    return edits


def _layout(file: Path) -> dict[str, tuple[str, int, int]]:
    """Name → (safetensors dtype, first byte, byte after the last) of each tensor in a safetensors file."""
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    start = 8 + size
    return {
        name: (t["dtype"], start + t["data_offsets"][0], start + t["data_offsets"][1]) for name, t in header.items()
    }


def _copy_edited(
    source: Path, temp: Path, edits: Mapping[str, Callable[[Tensor], Tensor]], *, keep: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Copy the checkpoint with `edits` made; returns the touched originals (if `keep`) and what was left out.

    An edit keeps dtype and shape, so the shards are copied as files and only the touched bytes are written:
    metadata and untouched tensors stay as they are, and memory holds one tensor.
    """
    from safetensors import safe_open

    shards = checkpoint_files(source)
    plain = [f for f in sorted(source.iterdir()) if _is_plain(f)]
    plain += sorted(source.glob("additional_chat_templates/*.jinja"))
    need = sum(f.stat().st_size for f in [*shards, *plain])
    if (free := shutil.disk_usage(temp).free) < need:
        raise ErasureError(f"the copy needs {need / 1e9:.3g} GB on the disk of {temp.parent}, {free / 1e9:.3g} free")
    for file in plain:
        _copy(file, temp / file.relative_to(source))
    originals = {}
    for shard in shards:
        _copy(shard, temp / shard.name)
        touched = {name: span for name, span in _layout(shard).items() if name in edits}
        if not touched:
            continue
        with safe_open(shard, framework="pt") as f, (temp / shard.name).open("r+b") as out:
            for name, (dtype, start, end) in touched.items():
                stored = f.get_tensor(name)
                edited = edits[name](stored).contiguous()
                if dtype not in _EDITABLE or edited.dtype != stored.dtype or edited.nbytes != end - start:
                    raise ErasureError(f"{name} in {shard} is {dtype} {list(stored.shape)} and cannot be edited")
                out.seek(start)
                out.write(edited.reshape(-1).view(torch.uint8).numpy().data)
                if keep:
                    originals[name] = stored
    ours = {*shards, *plain, source / ROOM, source / "additional_chat_templates"}
    return originals, [f.name for f in sorted(source.iterdir()) if f not in ours and f.name[0] != "."]


def _is_plain(file: Path) -> bool:
    if not file.is_file() or file.name.startswith("."):
        return False
    if file.name.endswith(".index.json"):
        return file.name == _INDEX
    return file.suffix in _PLAIN or file.name.lower().startswith(_PLAIN_NAMES)


def _copy_originals(source: Path, temp: Path, ledger: Sequence[dict[str, Any]]) -> None:
    for entry in ledger:
        if entry["originals"] and (file := source / ROOM / Path(entry["originals"]).name).is_file():
            _copy(file, temp / ROOM / file.name)


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, to)


def _write_ledger(temp: Path, entries: Sequence[dict[str, Any]]) -> None:
    kept = any((temp / ROOM / str(e["originals"])).is_file() for e in entries)
    note = SENSITIVE if kept else "No originals are kept here: these merges cannot be undone from this folder."
    (temp / ROOM).mkdir(exist_ok=True)
    write_json(temp / ROOM / "ledger.json", {"schema": LEDGER_SCHEMA, "note": note, "entries": list(entries)})


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after the rename finds it whole."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
