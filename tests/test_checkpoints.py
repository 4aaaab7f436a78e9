"""Merges on disk equal the applied model, keep everything else as it was, and are undone bit for bit."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import applied_logits, deltas, leftovers, make, plain_logits, resave, same_logits
from safetensors import torch as safetensors_torch

from saeunlearn.checkpoints import sha256_file
from saeunlearn.erasure import WeightDelta, fingerprint_folder, read_ledger, unmerge
from saeunlearn.errors import ErasureError, ModelError
from saeunlearn.models import LanguageModel
from saeunlearn.stored import lineage_fingerprint, parameter_key, stored_tensors


def test_merged_folder_is_the_applied_model_and_unmerges_exactly(arch_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(arch_path, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for secret in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", "optimizer.pt"):
        (source / secret).write_bytes(b"unedited weights")
    lm = LanguageModel.open(source, device="cpu")
    erasure = make(lm, deltas(lm, (2, None)))
    erasure.merge(source, tmp_path / "out", cost={"retain_loss": [1.0, 1.1]})
    expected = applied_logits(lm, erasure)
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(plain_logits(source), expected, atol=1e-2)

    merged = LanguageModel.open(tmp_path / "out", device="cpu")
    assert merged.tokenizer.chat_template == "{{ messages[0].content }}"
    assert merged.tokenizer("Mara keeps").input_ids == lm.tokenizer("Mara keeps").input_ids
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not [n for n in names if "bin" in n or "gguf" in n or n.endswith(".pt")]

    (entry,) = read_ledger(tmp_path / "out")
    assert entry["erasure_id"] == erasure.id
    assert entry["parent_fingerprint"] == lm.fingerprint()
    assert entry["resulting_fingerprint"] == merged.fingerprint()
    assert entry["cost"] == {"retain_loss": [1.0, 1.1]}
    assert entry["seed"] == 7
    assert entry["changed_values"] == erasure.manifest["changed"]["count"]
    assert "pytorch_model.bin" in entry["not_copied"]
    assert "as sensitive as the original" in (tmp_path / "out/saeunlearn/ledger.json").read_text()

    unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read_ledger(tmp_path / "back") == []
    assert not (tmp_path / "back/saeunlearn").exists()
    assert leftovers(tmp_path) == []


def test_sharded_bf16_checkpoint_keeps_dtype_shards_and_metadata(arch_path: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    base = resave(arch_path, tmp_path / "base", dtype="bfloat16", shard="12KB")
    shards = sorted(f.name for f in base.glob("*.safetensors"))
    assert len(shards) > 3
    lm = LanguageModel.open(base, device="cpu")
    erasure = make(lm)
    erasure.merge(base, tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == shards
    with erasure.apply(lm):
        edited = {parameter_key(n): p.detach().clone() for n, p in lm.model.named_parameters()}
    stored = {parameter_key(n): t for n, t in stored_tensors(tmp_path / "out")}
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(t, edited[n]) for n, t in stored.items())
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as f:
            assert f.metadata()["format"] == "pt"
    unmerge(tmp_path / "out", tmp_path / "back")
    assert all((tmp_path / "back" / s).read_bytes() == (base / s).read_bytes() for s in shards)


def test_fingerprint_does_not_depend_on_sharding(arch_path: Path, tmp_path: Path) -> None:
    sharded = resave(arch_path, tmp_path / "base", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint_folder(sharded) == fingerprint_folder(arch_path)
    lm = LanguageModel.open(arch_path, device="cpu")
    erasure = make(lm)
    erasure.merge(sharded, tmp_path / "out")
    torch.testing.assert_close(plain_logits(tmp_path / "out"), applied_logits(lm, erasure), atol=1e-5, rtol=0)


def test_stacked_erasures_merge_one_after_the_other(lm: LanguageModel, arch_path: Path, tmp_path: Path) -> None:
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    base = lm.fingerprint()
    first = make(lm)
    handle = first.apply(lm)
    second = make(lm, deltas(lm, (1, None, 2), seed=1))  # its parent is base + lineage
    inner = second.apply(lm)
    third = make(lm, deltas(lm, seed=2))
    inner.revert()
    handle.revert()
    with pytest.raises(ErasureError, match="made on a model"):
        second.merge(arch_path, one)
    assert not one.exists()
    first.merge(arch_path, one)
    with pytest.raises(ErasureError, match="made on a model"):
        third.merge(one, two)
    second.merge(one, two)
    opened = LanguageModel.open(one, device="cpu")
    assert same_logits(applied_logits(opened, second, third), applied_logits(lm, first, second, third))
    third.merge(two, three)
    assert same_logits(plain_logits(three), applied_logits(lm, first, second, third))

    ledger = read_ledger(three)
    assert [e["order"] for e in ledger] == [1, 2, 3]
    assert [e["erasure_id"] for e in ledger] == [first.id, second.id, third.id]
    assert ledger[2]["lineage_fingerprint"] == lineage_fingerprint(base, [first.id, second.id, third.id])
    assert [e["resulting_fingerprint"] for e in ledger] == [fingerprint_folder(p) for p in (one, two, three)]
    assert len(list((three / "saeunlearn").glob("originals-*.safetensors"))) == 3
    unmerge(three, tmp_path / "two again")
    unmerge(tmp_path / "two again", tmp_path / "one again")
    assert read_ledger(tmp_path / "two again") == ledger[:2]
    assert fingerprint_folder(tmp_path / "two again") == fingerprint_folder(two)
    assert fingerprint_folder(tmp_path / "one again") == fingerprint_folder(one)
    assert [f.name for f in (tmp_path / "one again/saeunlearn").glob("*.safetensors")] == ["originals-1.safetensors"]


def test_a_ledger_says_nothing_about_tensors_that_changed_since(
    llama: LanguageModel, checkpoints: Any, tmp_path: Path
) -> None:
    first = make(llama)
    with first.apply(llama):
        second = make(llama, deltas(llama, seed=1))
    first.merge(checkpoints("llama"), tmp_path / "one")
    tensors = dict(stored_tensors(tmp_path / "one"))
    tensors["model.norm.weight"] += 1
    safetensors_torch.save_file(tensors, tmp_path / "one/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ErasureError, match="made on a model"):
        second.merge(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ErasureError, match="changed after"):
        unmerge(tmp_path / "one", tmp_path / "back")
    second.merge(tmp_path / "one", tmp_path / "two", force=True)
    assert [e["forced"] for e in read_ledger(tmp_path / "two")] == [False, True]


def test_without_originals_nothing_unedited_stays(llama: LanguageModel, checkpoints: Any, tmp_path: Path) -> None:
    first = make(llama)
    with first.apply(llama):
        second = make(llama, deltas(llama, seed=1))
    first.merge(checkpoints("llama"), tmp_path / "one")
    second.merge(tmp_path / "one", tmp_path / "two", keep_originals=False)
    assert [f.name for f in (tmp_path / "two/saeunlearn").iterdir()] == ["ledger.json"]
    assert len(read_ledger(tmp_path / "two")) == 2
    with pytest.raises(ErasureError, match="kept no originals"):
        unmerge(tmp_path / "two", tmp_path / "back")
    with pytest.raises(ErasureError, match="nothing to undo"):
        unmerge(checkpoints("llama"), tmp_path / "back")
    file = tmp_path / "one/saeunlearn/originals-1.safetensors"
    kept, true = safetensors_torch.load_file(file), file.read_bytes()
    next(iter(kept.values()))[0, 0] += 1
    safetensors_torch.save_file(kept, file)
    ledger_file = tmp_path / "one/saeunlearn/ledger.json"
    ledger = ledger_file.read_text()
    ledger_file.write_text(ledger.replace(hashlib.sha256(true).hexdigest(), sha256_file(file)))
    with pytest.raises(ErasureError, match="did not give the checkpoint"):
        unmerge(tmp_path / "one", tmp_path / "back")
    ledger_file.write_text(ledger)
    file.write_bytes(true)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ErasureError, match="sha256"):
        unmerge(tmp_path / "one", tmp_path / "back")
    (tmp_path / "one/saeunlearn/ledger.json").write_text('{"schema": 1, "entries": [{}]}')
    with pytest.raises(ErasureError, match=r"ledger .* is damaged"):
        unmerge(tmp_path / "one", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_names_without_the_base_model_prefix(checkpoints: Any, tmp_path: Path) -> None:
    # The first GPT-2 files on the hub store `h.0.…` and mask buffers, among them a scalar.
    base = tmp_path / "base"
    shutil.copytree(checkpoints("gpt2"), base)
    tensors = {n.removeprefix("transformer."): t for n, t in stored_tensors(base)}
    assert fingerprint_folder(base) == fp_of(base, tensors)
    fp_of(base, {**tensors, "h.0.attn.masked_bias": torch.tensor(-1e4)})
    lm = LanguageModel.open(base, device="cpu")
    assert lm.fingerprint() == fingerprint_folder(base) != fingerprint_folder(checkpoints("gpt2"))
    erasure = make(lm)
    assert all(p.name.startswith("transformer.h.") for p in erasure.parts)
    erasure.merge(base, tmp_path / "out")
    assert dict(stored_tensors(tmp_path / "out")).keys() == {*tensors, "h.0.attn.masked_bias"}
    torch.testing.assert_close(plain_logits(tmp_path / "out"), applied_logits(lm, erasure), atol=1e-5, rtol=0)


def fp_of(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return fingerprint_folder(folder)


@pytest.mark.parametrize("stored", ["embedding", "both"])
def test_tied_embedding_and_head_stay_tied(checkpoints: Any, tmp_path: Path, stored: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoints("gpt2"), base)
    if stored == "both":
        tensors = dict(stored_tensors(base))
        fp_of(base, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    lm = LanguageModel.open(base, device="cpu")
    assert lm.model.lm_head.weight is lm.model.transformer.wte.weight
    shape = lm.model.lm_head.weight.shape
    part = WeightDelta("transformer.wte.weight", False, dense=0.1 * torch.ones(shape).tril())
    erasure = make(lm, [part])
    expected = applied_logits(lm, erasure)
    erasure.merge(base, tmp_path / "out")
    torch.testing.assert_close(plain_logits(tmp_path / "out"), expected, atol=1e-5, rtol=0)
    after = dict(stored_tensors(tmp_path / "out"))
    assert torch.equal(after.get("lm_head.weight", after["transformer.wte.weight"]), after["transformer.wte.weight"])
    unmerge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    with pytest.raises(ErasureError, match="dense"):
        erasure.to_peft(tmp_path / "peft", base)


def test_merge_refuses_before_it_writes(
    llama: LanguageModel, checkpoints: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    base = checkpoints("llama")
    erasure = make(llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(ErasureError, match="not empty"):
        erasure.merge(base, tmp_path / "full")
    with pytest.raises(ErasureError, match="not empty"):
        erasure.merge(base, base)
    with pytest.raises(ErasureError, match=f"{erasure.parent[:12]}.*{fingerprint_folder(checkpoints('gpt2'))[:12]}"):
        erasure.merge(checkpoints("gpt2"), tmp_path / "out")
    with pytest.raises(ErasureError, match="stores no"):
        erasure.merge(checkpoints("gpt2"), tmp_path / "out", force=True)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        erasure.merge(tmp_path / "full", tmp_path / "out")
    with pytest.raises(ErasureError, match="cost"):
        erasure.merge(base, tmp_path / "out", cost={"loss": float("nan")})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ErasureError, match="GB on the disk"):
        erasure.merge(base, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("where", ["originals", "shards"])
def test_a_disk_that_fills_during_a_merge_leaves_no_folder(
    llama: LanguageModel, checkpoints: Any, tmp_path: Path, monkeypatch: Any, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    erasure = make(llama)
    if where == "originals":
        monkeypatch.setattr(safetensors_torch, "save_file", full)
    else:
        monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ErasureError, match="No space left"):
        erasure.merge(checkpoints("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
