"""LanguageModel against Hugging Face's own outputs, TransformerLens and what is on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, MAX_LENGTH, N_LAYERS, Checkpoints, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeunlearn.errors import ModelError
from saeunlearn.models import LanguageModel, Writer
from saeunlearn.stored import parameter_key, stored_tensors

LAYERS = list(range(N_LAYERS))
# The writers of each layout by name, so that a wrong matrix of the right shape would be seen.
MLP_OUT = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
ATTN_OUT = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
MLP_OUT["gemma2"], ATTN_OUT["gemma2"] = MLP_OUT["llama"], ATTN_OUT["llama"]


@pytest.fixture
def ids() -> Tensor:
    """[2, 24] tokens: longer than Gemma-2's sliding window of 16."""
    return torch.randint(5, 180, (2, 24), generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-5 of the larger of 1 and b's largest entry (activations here reach about 12)."""
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


# --- capture and patch -------------------------------------------------------------------------------------


@torch.no_grad()
def test_capture_is_the_output_of_each_block(lm: LanguageModel, ids: Tensor) -> None:
    outputs: list[Tensor] = []
    last = lm.blocks[-1].register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    last.remove()
    got = lm.capture(ids, LAYERS)
    assert sorted(got) == LAYERS
    assert (lm.n_layers, lm.d_model, lm.max_length) == (N_LAYERS, D_MODEL, MAX_LENGTH)
    for layer in LAYERS[:-1]:
        assert torch.allclose(got[layer], hidden[layer + 1], atol=1e-5, rtol=0)
    assert torch.allclose(got[N_LAYERS - 1], outputs[0], atol=1e-5, rtol=0)
    # The last entry of hidden_states is AFTER the final norm: the trap that capture avoids.
    assert not torch.allclose(got[N_LAYERS - 1], hidden[N_LAYERS], atol=0.1)


@torch.no_grad()
def test_capture_equals_transformer_lens(lm: LanguageModel, ids: Tensor) -> None:
    bridge = lm.transformer_lens()
    logits, cache = bridge.run_with_cache(ids)
    got = lm.capture(ids, LAYERS)
    for layer in LAYERS:
        assert close(got[layer], cache[f"blocks.{layer}.hook_resid_post"])
    assert close(lm.logits(ids), logits)


@torch.no_grad()
def test_transformer_lens_is_a_view_on_a_copy(llama: LanguageModel, ids: Tensor) -> None:
    before = {n: p.clone() for n, p in llama.model.named_parameters()}
    bridge = llama.transformer_lens()
    changed = llama.logits(ids)
    for p in bridge.parameters():
        p.zero_()
    assert float(bridge(ids).abs().max()) == 0
    assert torch.equal(llama.logits(ids), changed)
    assert list(before) == [n for n, _ in llama.model.named_parameters()]
    assert all(torch.equal(p, before[n]) for n, p in llama.model.named_parameters())


def test_capture_stops_after_the_deepest_layer_and_keeps_the_graph(lm: LanguageModel, ids: Tensor) -> None:
    runs = [0] * N_LAYERS

    def count(layer: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[layer] += 1

        return hook

    handles = [block.register_forward_pre_hook(count(i)) for i, block in enumerate(lm.blocks)]
    got = lm.capture(ids, [0, 1])
    assert runs == [1, 1, 0, 0]
    for h in handles:
        h.remove()
    assert not any(b._forward_hooks for b in lm.blocks)

    got[1].square().mean().backward()
    reached = [any(p.grad is not None for p in block.parameters()) for block in lm.blocks]
    assert reached == [True, True, False, False]
    with torch.no_grad():
        assert not lm.capture(ids, [1])[1].requires_grad


@torch.no_grad()
def test_capture_ignores_right_padding(lm: LanguageModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    padded = lm.capture(ids, [2], mask)[2][0, :10]
    assert close(padded, lm.capture(ids[:1, :10], [2])[2][0])


@torch.no_grad()
def test_patch_replaces_the_stream_only_within_the_context(lm: LanguageModel, ids: Tensor) -> None:
    plain = lm.logits(ids)
    with lm.patch({1: lambda h: h}):
        assert torch.equal(lm.logits(ids), plain)
    with lm.patch({1: torch.zeros_like}):
        assert float((lm.logits(ids) - plain).abs().max()) > 0.1
        assert float(lm.capture(ids, [1])[1].abs().max()) == 0  # capture sees the patched stream
    assert torch.equal(lm.logits(ids), plain)

    # Feeding another input's stream into block 3 must give that input's logits.
    other = ids.flip(0)
    stream = lm.capture(other, [2])[2]
    with lm.patch({2: lambda _h: stream}):
        assert torch.equal(lm.logits(ids), lm.logits(other))

    def bad(_h: Tensor) -> Tensor:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), lm.patch({0: bad}):
        lm.logits(ids)
    assert torch.equal(lm.logits(ids), plain)


# --- writers -----------------------------------------------------------------------------------------------


def silence(writer: Writer) -> None:
    """Make a writer write nothing."""
    for p in writer.module.parameters():
        p.zero_()


@pytest.mark.parametrize("kind", ["mlp", "attn"])
@torch.no_grad()
def test_writers_reproduce_what_the_block_adds_to_the_stream(lm: LanguageModel, ids: Tensor, kind: str) -> None:
    """Zeroing the matrix takes W x from the stream, normalised and times the gain where a norm follows."""
    (writer,) = lm.writers([2], [kind])
    d_in = 64 if kind == "mlp" else D_MODEL
    if kind == "mlp" and lm.name == "gpt2":
        d_in = 4 * D_MODEL
    assert (writer.block, writer.d_in, writer.d_out) == (2, d_in, D_MODEL)
    assert writer.transposed == (lm.name == "gpt2")
    suffix = (MLP_OUT if kind == "mlp" else ATTN_OUT)[lm.name]
    assert writer.name.endswith(f".2.{suffix}.weight")
    assert lm.model.get_parameter(writer.name) is writer.weight
    assert (writer.post_scale is not None) == (lm.name == "gemma2")

    if kind == "attn":  # so that nothing but the attention's own output differs below
        silence(lm.writers([2], ["mlp"])[0])
    seen: dict[str, Tensor] = {}
    handle = writer.module.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out))
    before = lm.capture(ids, [2])[2]
    handle.remove()
    weight = writer.weight.T if writer.transposed else writer.weight  # canonical [d_out, d_in]
    bias = getattr(writer.module, "bias", None)
    assert close(seen["x"] @ weight.T + (0 if bias is None else bias), seen["y"])

    written = seen["y"]
    if writer.post_scale is not None:  # RMSNorm by hand, with the gain that the Writer reports
        rms = (written.square().mean(-1, keepdim=True) + lm.model.config.rms_norm_eps).rsqrt()
        written = written * rms * writer.post_scale
    silence(writer)
    assert float(written.abs().max()) > 0.1
    assert close(before - lm.capture(ids, [2])[2], written)


def test_writers_of_many_blocks_and_unknown_layers(llama: LanguageModel) -> None:
    found = llama.writers([0, 3], ["attn", "mlp"])
    assert [(w.block, w.name.split(".")[-2]) for w in found] == [
        (0, "o_proj"),
        (0, "down_proj"),
        (3, "o_proj"),
        (3, "down_proj"),
    ]
    with pytest.raises(ModelError, match=r"layers \[4\] are outside 0 … 3"):
        llama.writers([4])
    with pytest.raises(ModelError, match="outside"):
        llama.capture(torch.tensor([[5]]), [-1])
    with pytest.raises(ModelError, match="outside"):
        llama.capture(torch.tensor([[5]]), [])
    with pytest.raises(ModelError, match=r"layers \[9\]"), llama.patch({9: lambda h: h}):
        pass


# --- generation --------------------------------------------------------------------------------------------


def test_batched_generation_equals_one_by_one(lm: LanguageModel) -> None:
    prompts = ["Mara", "Tobin keeps the old map in the mill near", "Elsa keeps"]
    together = lm.generate(prompts, max_new_tokens=12)
    assert together == [lm.generate([p], max_new_tokens=12)[0] for p in prompts]
    assert len(set(together)) == 3
    # Greedy by hand, without padding, cache or generate().
    bos = [] if lm.bos_id is None else [lm.bos_id]
    row = bos + lm.tokenizer(prompts[1], add_special_tokens=False).input_ids
    start = len(row)
    with torch.no_grad():
        while len(row) < start + 12 and (len(row) == start or row[-1] != lm.tokenizer.eos_token_id):
            row.append(int(lm.logits(torch.tensor([row]))[0, -1].argmax()))
    assert together[1] == lm.tokenizer.decode(row[start:], skip_special_tokens=True)


def test_generation_shortens_a_long_prompt_from_the_left_and_keeps_bos(llama: LanguageModel) -> None:
    words = "Mara keeps the old map in the mill near the river. " * 20
    given: list[Tensor] = []
    handle = llama.model.get_input_embeddings().register_forward_pre_hook(lambda _m, a: given.append(a[0]))
    llama.generate([words], max_new_tokens=10)
    handle.remove()
    assert given[0].shape == (1, MAX_LENGTH - 10)
    assert int(given[0][0, 0]) == llama.bos_id
    tail = llama.tokenizer(words, add_special_tokens=False).input_ids[-(MAX_LENGTH - 11) :]
    assert given[0][0, 1:].tolist() == tail
    with pytest.raises(ModelError, match="fill the context of 64"):
        llama.generate(["Mara"], max_new_tokens=MAX_LENGTH)


def test_bos_is_that_of_the_tokenizer(lm: LanguageModel) -> None:
    expected = lm.tokenizer.bos_token_id if lm.name in ("llama", "gemma2") else None
    assert lm.bos_id == expected
    assert 0 <= lm.pad_id < lm.d_vocab


# --- disk and identity -------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_and_open_give_the_same_model(lm: LanguageModel, ids: Tensor, tmp_path: Path) -> None:
    lm.save(tmp_path / "copy")
    again = LanguageModel.open(tmp_path / "copy", device="cpu")
    assert torch.equal(again.logits(ids), lm.logits(ids))
    text = "Odette keeps the old violin in the mill near the river."
    assert again.tokenizer(text).input_ids == lm.tokenizer(text).input_ids
    assert again.fingerprint() == lm.fingerprint()
    assert not list((tmp_path / "copy").glob("*.bin"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fingerprint_depends_on_the_tensors_only(checkpoints: Checkpoints, tmp_path: Path, arch: str) -> None:
    folder = checkpoints(arch)
    on_disk = LanguageModel.open(folder, device="cpu")
    tokenizer = make_tokenizer(arch)
    memory = LanguageModel(make_model(arch, tokenizer), tokenizer)  # never on disk
    memory.model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    sharded = LanguageModel.open(tmp_path, device="cpu")
    narrow = LanguageModel.open(folder, device="cpu", dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    prints = {m.fingerprint() for m in (on_disk, memory, sharded, narrow, on_disk.copy())}
    assert len(prints) == 1
    # What is stored and what is in memory go by the same keys (GPT-NeoX renames its head on disk).
    stored = {parameter_key(name) for name, _ in stored_tensors(folder)}
    assert stored == {parameter_key(name) for name, _ in memory.model.named_parameters()}

    changed = LanguageModel(make_model(arch, tokenizer), tokenizer)
    with torch.no_grad():
        changed.writers([3])[0].weight[0, 0] += 1e-3
    assert changed.fingerprint() not in prints
    changed.lineage.append("erasure")
    assert changed.fingerprint() != changed.base_fingerprint()


@torch.no_grad()
def test_files_without_the_base_prefix_are_the_same_model(
    checkpoints: Checkpoints, ids: Tensor, tmp_path: Path
) -> None:
    """The original GPT-2 files say `h.0…` where transformers now writes `transformer.h.0…`."""
    folder = shutil.copytree(checkpoints("gpt2"), tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    assert "h.0.mlp.c_proj.weight" in old
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    new, again = (LanguageModel.open(f, device="cpu") for f in (checkpoints("gpt2"), folder))
    assert torch.equal(again.logits(ids), new.logits(ids))
    assert again.fingerprint() == new.fingerprint()


def test_a_copy_is_independent(llama: LanguageModel, ids: Tensor) -> None:
    twin = llama.copy()
    twin.lineage.append("erasure")
    with torch.no_grad():
        before = llama.logits(ids)
        twin.writers([0])[0].weight.zero_()
        assert torch.equal(llama.logits(ids), before)
        assert not torch.equal(twin.logits(ids), before)
    assert llama.lineage == []


def test_peft_models_and_adapter_folders(checkpoints: Checkpoints, ids: Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = LanguageModel.open(checkpoints("llama"), device="cpu")
    config = LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    wrapped = LanguageModel(get_peft_model(base.copy().model, config), base.tokenizer)
    with torch.no_grad():
        plain, logits = base.logits(ids), wrapped.logits(ids)
        assert float((logits - plain).abs().max()) > 0.1
        stream = wrapped.capture(ids, [3])[3]
        cache = wrapped.transformer_lens().run_with_cache(ids)[1]
        assert float((stream - cache["blocks.3.hook_resid_post"]).abs().max()) < 1e-4  # merging rounds
        assert torch.equal(wrapped.logits(ids), logits)
        assert torch.equal(wrapped.writers([1])[0].weight, base.writers([1])[0].weight)
        wrapped.model.save_pretrained(tmp_path)
        opened = LanguageModel.open(tmp_path, device="cpu")
        assert torch.equal(opened.logits(ids), logits)
    assert opened.fingerprint() == wrapped.fingerprint() != base.fingerprint()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors.*pickled"):
        LanguageModel.open(tmp_path, device="cpu")
