"""What cannot be opened as a model, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Checkpoints, make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from saeunlearn.errors import ErasureError, ModelError, TokenizerMismatchError
from saeunlearn.models import LanguageModel, resolve_device, resolve_dtype


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _misshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lose_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_config, r"has no config.json: not a Hugging Face model folder"),
        (_only_bin, r"no model.safetensors \(pickled .bin files are refused"),
        (_lose_a_tensor, r"1 tensors missing or misshapen, like model.layers.1.mlp.down_proj.weight"),
        (_misshape_a_tensor, r"1 tensors missing or misshapen, like model.layers.1.mlp.down_proj.weight"),
        (_truncate, r"cannot open .*incomplete metadata"),
        (_lose_a_shard, r"lacks the shards \['model-00002-of-00002.safetensors'\]"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), r"index.json is damaged"),
        (lambda f: (f / "config.json").write_text("{"), r"cannot open .*not a valid JSON"),
        (_lose_the_tokenizer, r"cannot open .*tokenizer"),
    ],
)
def test_damaged_folders_are_refused(
    checkpoints: Checkpoints, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(checkpoints("llama"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ModelError, match=message) as e:
        LanguageModel.open(folder, device="cpu")
    assert str(folder) in str(e.value)


def test_what_is_not_a_model_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        LanguageModel.open(tmp_path / "nowhere", device="cpu")
    with pytest.raises(ModelError, match="not a model folder"):
        LanguageModel.open(checkpoints("llama") / "config.json", device="cpu")
    (tmp_path / "erasure.json").write_text("{}")
    with pytest.raises(ErasureError, match="is an Erasure, not a model"):
        LanguageModel.open(tmp_path, device="cpu")


def test_foreign_tokenizer_and_unsupported_layout_are_refused(checkpoints: Checkpoints) -> None:
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_tokenizer("llama")
    model = make_model("llama", tokenizer)
    n = len(tokenizer)
    tokenizer.add_tokens(["unheard-of"])
    with pytest.raises(TokenizerMismatchError, match=rf"has {n + 1} tokens but .* embeds only {n}"):
        LanguageModel(model, tokenizer)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(vocab_size=300, **shape))
    with pytest.raises(ModelError, match=r"BertForMaskedLM has no known list of blocks"):
        LanguageModel(bert, tokenizer)


def test_unknown_device_and_dtype_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ModelError, match="unknown dtype 'float8'; use one of float32"):
        LanguageModel.open(checkpoints("llama"), dtype="float8")
    with pytest.raises(ModelError, match="device 'toaster' is not available"):
        LanguageModel.open(checkpoints("llama"), device="toaster")
    with pytest.raises(ModelError, match="'cuda:99' is not available"):
        resolve_device("cuda:99")
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_device("cpu").type == "cpu"
