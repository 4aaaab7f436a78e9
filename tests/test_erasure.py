"""Erasures are exact: applied, saved or exported they are W + ΔW, and the way back gives the same bits."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import IDS, applied_logits, deltas, leftovers, make, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors_torch

from saeunlearn import checkpoints as ck
from saeunlearn.erasure import Erasure, WeightDelta, fingerprint_folder
from saeunlearn.errors import ErasureError, NonFiniteError
from saeunlearn.models import LanguageModel
from saeunlearn.stored import lineage_fingerprint

# --- in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_adds_the_canonical_delta_and_revert_restores_every_bit(arch_path: Path, dtype: str) -> None:
    lm = LanguageModel.open(arch_path, device="cpu", dtype=dtype)
    before, fingerprint = weights(lm), lm.fingerprint()
    parts = deltas(lm, (2, None))
    erasure = make(lm, parts)
    handle = erasure.apply(lm)
    expected = dict(before)
    for p in parts:
        d = p.dense if p.dense is not None else torch.einsum("ok,ki->oi", p.left, p.right)
        d = d.mT if p.transposed else d
        expected[p.name] = (before[p.name].float() + d).to(before[p.name].dtype)
    after = weights(lm)
    for name, w in expected.items():
        torch.testing.assert_close(after[name], w, atol=1e-6 if dtype == "float32" else 1e-2, rtol=0)
    assert not torch.equal(after[parts[0].name], before[parts[0].name])
    assert lm.lineage == [erasure.id]
    assert lm.fingerprint() == lineage_fingerprint(fingerprint, [erasure.id]) != fingerprint
    handle.revert()
    assert same(weights(lm), before)
    assert lm.fingerprint() == fingerprint
    with pytest.raises(ErasureError, match="reverted already"):
        handle.revert()


def test_delta_acts_on_the_output_side_of_the_layer(lm: LanguageModel) -> None:
    # ΔW x added to the layer's output, computed from its input without knowing how the weight is stored.
    (part,) = deltas(lm, (2,))
    module = lm.writers([0])[0].module
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        lm.logits(IDS)
        with make(lm, [part]).apply(lm):
            lm.logits(IDS)
    hook.remove()
    (x, y), (_, edited) = seen
    torch.testing.assert_close(edited, y + x @ part.right.T @ part.left.T, atol=1e-4, rtol=1e-4)


def test_erasures_stack_and_revert_last_in_first_out(lm: LanguageModel) -> None:
    original = weights(lm)
    first = make(lm)
    outer = first.apply(lm)
    middle = weights(lm)
    second = make(lm, deltas(lm, seed=1))
    assert second.parent == lm.fingerprint() != first.parent
    inner = second.apply(lm)
    with pytest.raises(ErasureError, match="not the last"):
        outer.revert()
    inner.revert()
    assert same(weights(lm), middle)
    outer.revert()
    assert same(weights(lm), original)
    with pytest.raises(ErasureError, match=r"fingerprint .*… has .*…|made on a model"):
        second.apply(lm)  # its parent had `first` applied


def test_context_manager_reverts_on_an_exception(llama: LanguageModel) -> None:
    before = weights(llama)
    with pytest.raises(ZeroDivisionError), make(llama).apply(llama):
        assert 1 / same(weights(llama), before) is None  # 1 / False
    assert same(weights(llama), before)
    assert llama.lineage == []


def test_foreign_model_is_refused_by_short_fingerprints_unless_forced(llama: LanguageModel) -> None:
    erasure = make(llama)
    other = LanguageModel(llama.copy().model, llama.tokenizer, "other")
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ErasureError) as e:
        erasure.apply(other)
    assert erasure.parent[:12] in str(e.value)
    assert other.fingerprint()[:12] in str(e.value)
    before = weights(other)
    handle = erasure.apply(other, force=True)
    handle.revert()
    assert same(weights(other), before)


def test_force_checks_names_and_shapes(checkpoints: Any, llama: LanguageModel) -> None:
    before = weights(llama)
    gpt2 = LanguageModel.open(checkpoints("gpt2"), device="cpu")
    with pytest.raises(ErasureError, match="no parameter"):
        make(gpt2).apply(llama, force=True)
    wide = WeightDelta("model.layers.0.mlp.down_proj.weight", False, dense=torch.zeros(32, 65))
    with pytest.raises(ErasureError, match="shape"):
        make(llama, [wide])
    assert same(weights(llama), before)


def test_an_edit_that_overflows_leaves_the_model_unchanged(checkpoints: Any) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu", dtype="float16")
    before = weights(lm)
    with pytest.raises(NonFiniteError, match="float16"):
        make(lm, deltas(lm, (2, 2))[:1] + deltas(lm, (1, 1), scale=1e8)[1:]).apply(lm)
    assert same(weights(lm), before)
    assert lm.lineage == []


def test_memory_and_folder_have_one_fingerprint(arch_path: Path) -> None:
    opened = LanguageModel.open(arch_path, device="cpu")
    in_memory = LanguageModel(opened.model, opened.tokenizer)
    half = LanguageModel.open(arch_path, device="cpu", dtype="bfloat16")
    assert opened.fingerprint() == in_memory.fingerprint() == half.fingerprint() == fingerprint_folder(arch_path)


# --- parts and manifest --------------------------------------------------------------------------------


def test_parts_with_wrong_shapes_or_numbers_are_refused(llama: LanguageModel) -> None:
    t = torch.ones
    for tensors in (
        {},
        {"left": t(3, 2)},
        {"left": t(3, 2), "right": t(3, 2)},
        {"left": t(3), "right": t(3)},
    ):
        with pytest.raises(ErasureError, match=r"x\.weight"):
            WeightDelta("x.weight", False, **tensors)
    with pytest.raises(ErasureError, match="either"):
        WeightDelta("x.weight", False, t(3, 2), t(2, 3), t(3, 3))
    bad = deltas(llama)
    bad[1].right[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1.*right"):
        make(llama, bad)
    with pytest.raises(NonFiniteError, match="manifest"):
        make(llama, losses=[{"loss": float("inf")}])
    with pytest.raises(ErasureError, match="not JSON"):
        make(llama, config={"x": object()})
    with pytest.raises(ErasureError, match="add them up"):
        make(llama, deltas(llama) + deltas(llama))
    with pytest.raises(ErasureError, match="at least one"):
        make(llama, [])


def test_manifest_counts_what_changes(lm: LanguageModel) -> None:
    erasure = make(lm, deltas(lm, (2, None)), losses=[{"step": 0, "loss": 1.5}])
    m = erasure.manifest
    d_in = lm.writers([0])[0].d_in
    assert m["changed"]["count"] == 2 * lm.d_model * d_in
    assert [c["rank"] for c in m["changed"]["parameters"]] == [2, None]
    assert m["changed"]["share"] == pytest.approx(2 * lm.d_model * d_in / lm.model.num_parameters())
    assert m["versions"]["torch"] == torch.__version__.split("+")[0] or m["versions"]["torch"] == torch.__version__
    assert m["threads"] == torch.get_num_threads()
    assert m["config"] == {"k": 2, "blocks": [0, 1]}
    assert m["losses"] == [{"step": 0, "loss": 1.5}]
    assert json.loads(json.dumps(m)) == m


def test_id_names_content_not_time(llama: LanguageModel) -> None:
    erasure, again = make(llama), make(llama, seed=8)
    again.manifest["created"] = "another time"
    assert erasure.id == again.id
    others = [
        make(llama, config={"k": 3}),
        make(llama, method="other"),
        make(llama, deltas(llama, seed=1)),
        make(llama, deltas(llama)[::-1]),
    ]
    assert len({erasure.id, *(o.id for o in others)}) == 5


# --- save and load -------------------------------------------------------------------------------------


def test_save_and_load_round_trip(lm: LanguageModel, tmp_path: Path) -> None:
    erasure = make(lm, deltas(lm, (2, None, 1)), selection={"layer": 1}, extra={"note": "ü"})
    erasure.save(tmp_path / "e")
    back = Erasure.load(tmp_path / "e")
    assert back.manifest == erasure.manifest
    assert back.id == erasure.id
    assert torch.equal(applied_logits(lm, back), applied_logits(lm, erasure))
    for a, b in zip(erasure.parts, back.parts):
        assert a.spec() == b.spec()
        assert same(a.tensors(), b.tensors())
    written = json.loads((tmp_path / "e" / "erasure.json").read_text(encoding="utf-8"))
    assert "as sensitive as the original" in written["note"]
    assert [p["sha256"] for p in written["parts"]] == [
        ck.sha256_file(tmp_path / "e" / p["file"]) for p in written["parts"]
    ]
    assert {f.suffix for f in (tmp_path / "e").iterdir()} == {".json", ".safetensors"}


@settings(max_examples=25, deadline=None)
@given(
    d_out=st.integers(1, 5),
    d_in=st.integers(1, 5),
    rank=st.integers(0, 4),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_delta_survives_its_payload(d_out: int, d_in: int, rank: int, transposed: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(2 * d_out, rank, generator=g).double()
    part = WeightDelta("a.weight", transposed, wide[::2], torch.randn(rank, d_in, generator=g))
    payload = safetensors_torch.load(safetensors_torch.save(part.tensors()))
    back = WeightDelta.from_payload(json.loads(json.dumps(part.spec())), payload)
    assert torch.equal(back.delta(), part.delta())
    assert back.stored_shape == ((d_in, d_out) if transposed else (d_out, d_in))
    w = torch.randn(back.stored_shape, generator=g)
    by_hand = w.clone()
    for o in range(d_out):
        for i in range(d_in):
            step = sum(float(wide[2 * o, k]) * float(part.right[k, i]) for k in range(rank))
            by_hand[(i, o) if transposed else (o, i)] += step
    torch.testing.assert_close(back.edit(w), by_hand, atol=1e-5, rtol=1e-5)


def test_any_flipped_byte_of_a_payload_is_noticed(llama: LanguageModel, tmp_path: Path) -> None:
    make(llama).save(tmp_path / "e")
    file = tmp_path / "e" / "part-001.safetensors"
    raw = file.read_bytes()
    for at in (0, 9, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ErasureError, match=r"part-001.*sha256"):
            Erasure.load(tmp_path / "e")
    file.write_bytes(raw)
    Erasure.load(tmp_path / "e")


def rewrite(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "erasure.json").read_text())
    change(manifest)
    (folder / "erasure.json").write_text(json.dumps(manifest))


def nan_payload(folder: Path) -> None:
    tensors = safetensors_torch.load_file(folder / "part-000.safetensors")
    tensors["left"][0, 0] = float("nan")
    safetensors_torch.save_file(tensors, folder / "part-000.safetensors")
    sha = ck.sha256_file(folder / "part-000.safetensors")
    rewrite(folder, lambda m: m["parts"][0].update(sha256=sha))


DAMAGE = {
    "unknown kind": lambda f: rewrite(f, lambda m: m["parts"][0].update(kind="no_kind")),
    "schema 99": lambda f: rewrite(f, lambda m: m.update(schema=99)),
    "which is missing": lambda f: (f / "part-000.safetensors").unlink(),
    "no safetensors": lambda f: rewrite(f, lambda m: m["parts"][0].update(file="../x.bin")),
    "other shapes": lambda f: rewrite(f, lambda m: m["parts"][0]["spec"].update(shape=[1, 1])),
    "of its id": lambda f: rewrite(f, lambda m: m["config"].update(k=3)),
    "KeyError": lambda f: rewrite(f, lambda m: m.pop("parts")),
    "TypeError": lambda f: (f / "erasure.json").write_text("[1]"),
    "readable": lambda f: (f / "erasure.json").write_text((f / "erasure.json").read_text()[:200]),
    "UnicodeDecodeError": lambda f: (f / "erasure.json").write_bytes(b"\xff\xfe"),
    "it has no erasure.json": lambda f: (f / "erasure.json").unlink(),
    "NaN or infinity in left": nan_payload,
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damaged_directories_are_refused_with_the_reason(llama: LanguageModel, tmp_path: Path, says: str) -> None:
    make(llama).save(tmp_path / "e")
    DAMAGE[says](tmp_path / "e")
    with pytest.raises(ErasureError, match=says):
        Erasure.load(tmp_path / "e")


def test_save_replaces_an_erasure_and_nothing_else(llama: LanguageModel, tmp_path: Path) -> None:
    old, new = make(llama, deltas(llama, (1, 1, 1))), make(llama)
    old.save(tmp_path / "e")
    new.save(tmp_path / "e")
    assert Erasure.load(tmp_path / "e").id == new.id
    assert len(list((tmp_path / "e").iterdir())) == 3
    (tmp_path / "e" / "notes.txt").write_text("mine")
    with pytest.raises(ErasureError, match="not empty"):
        new.save(tmp_path / "e")
    assert (tmp_path / "e" / "notes.txt").read_text() == "mine"
    with pytest.raises(ErasureError, match="is a file"):
        new.save(tmp_path / "e" / "notes.txt")
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(llama: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    old, new = make(llama, deltas(llama, seed=1)), make(llama)
    old.save(tmp_path / "e")
    real = safetensors_torch.save_file

    def full(tensors: Any, file: Path, *args: Any, **kwargs: Any) -> None:
        if "part-000" not in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(tensors, file, *args, **kwargs)

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    for target in ("e", "fresh"):
        with pytest.raises(ErasureError, match=r"cannot write .*No space left"):
            new.save(tmp_path / target)
    assert Erasure.load(tmp_path / "e").id == old.id
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_killed_save_is_not_taken_for_an_erasure(llama: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    erasure = make(llama)

    def die(*_: Any) -> None:
        os._exit(9)

    monkeypatch.setattr(ck, "_sync", die)  # everything is written, nothing has its name yet
    if (child := os.fork()) == 0:
        try:
            erasure.save(tmp_path / "e")
        finally:
            os._exit(1)  # never on into the rest of the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    (left,) = leftovers(tmp_path)
    assert not (tmp_path / "e").exists()
    with pytest.raises(ErasureError, match="unfinished"):
        Erasure.load(tmp_path / left)
    erasure.save(tmp_path / "e")
    assert Erasure.load(tmp_path / "e").id == erasure.id


# --- PEFT ----------------------------------------------------------------------------------------------


def test_peft_adapter_gives_the_same_logits(lm: LanguageModel, arch_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    writers = lm.writers([0, 2], ("attn", "mlp"))
    g = torch.Generator().manual_seed(3)
    parts = [
        WeightDelta(w.name, w.transposed, *(0.3 * torch.randn(s, generator=g) for s in shapes))
        for w, k in zip(writers, (1, 4, 2, 3))
        for shapes in [((w.d_out, k), (k, w.d_in))]
    ]
    erasure = make(lm, parts)
    erasure.to_peft(tmp_path / "adapter", arch_path)
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = AutoModelForCausalLM.from_pretrained(arch_path)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    touched = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert touched == {p.name.removesuffix(".weight") for p in parts}
    with torch.no_grad():
        got = peft(input_ids=IDS).logits
    torch.testing.assert_close(got, applied_logits(lm, erasure), atol=1e-5, rtol=1e-5)
    lm.tokenizer.save_pretrained(tmp_path / "adapter")
    opened = LanguageModel.open(tmp_path / "adapter", device="cpu")  # an adapter's folder, and a PeftModel
    for wrapped in (opened, LanguageModel(peft, lm.tokenizer)):
        before = weights(wrapped)
        handle = make(wrapped, deltas(wrapped)).apply(wrapped)
        assert not same(weights(wrapped), before)
        handle.revert()
        assert same(weights(wrapped), before)


def test_peft_refuses_dense_parts(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="not low-rank"):
        make(llama, deltas(llama, (2, None))).to_peft(tmp_path / "adapter", "base")
    assert list(tmp_path.iterdir()) == []
