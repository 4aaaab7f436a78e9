"""SAE training: which activations it sees, what it learns, and what is on disk afterwards."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, SENTENCES
from safetensors.torch import load_file, save_file
from streams import TEXTS, slow_positions
from toys import topk_sae

from sae_training import SAEConfig, load_saes, parse_layers, save_saes, train_saes
from saeunlearn.corpus import windows
from saeunlearn.errors import (
    Cancelled,
    ConfigError,
    ErasureError,
    ModelError,
    NonFiniteError,
    SAEMismatchError,
)
from saeunlearn.features.scores import feature_stats
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

CONFIG = SAEConfig(expansion=4, k=8, tokens=8_000, batch=128, lr=5e-3)
LAYERS = [1, 3]


def train(lm: LanguageModel, config: SAEConfig = CONFIG, seed: int = 0, progress: Progress | None = None) -> Any:
    return train_saes(lm, TEXTS, LAYERS, config, seed=seed, progress=progress or Progress())


# --- training ----------------------------------------------------------------------------------------------


def test_training_explains_the_stream(llama: LanguageModel) -> None:
    events: list[dict[str, Any]] = []
    before = {n: p.clone() for n, p in llama.model.named_parameters()}
    saes = train(llama, replace(CONFIG, tokens=24_000), progress=Progress(events.append))
    assert list(saes) == LAYERS
    items = windows(TEXTS, llama)
    trained = feature_stats(llama, saes, items, Progress())
    h = slow_positions(llama, items, LAYERS)
    for n, (layer, sae) in enumerate(saes.items()):
        assert trained[layer].fvu < 0.3
        z = sae.encode(h[:, n])
        assert int((z > 0).sum(-1).max()) <= CONFIG.k
        assert float(z.min()) >= 0
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(4 * D_MODEL), atol=1e-5, rtol=0)
        assert not sae.W_dec.requires_grad
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (D_MODEL, 4 * D_MODEL, CONFIG.k)
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        info = sae.cfg.metadata.saeunlearn
        assert info["model_fingerprint"] == llama.fingerprint()
        assert info["corpus_fingerprint"] == TEXTS.fingerprint()
        assert (info["seed"], info["config"]["tokens"]) == (0, 24_000)
    steps = [e for e in events if e["event"] == "step"]
    assert len(steps) == math.ceil(24_000 / CONFIG.batch)
    for layer in LAYERS:  # what was reported is what was reached, up to the smoothing
        assert steps[0][f"fvu{layer}"] > 0.9 > 0.4 > steps[-1][f"fvu{layer}"]
        assert abs(steps[-1][f"fvu{layer}"] - trained[layer].fvu) < 0.1
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in llama.model.named_parameters())


def test_training_is_deterministic(llama: LanguageModel) -> None:
    short = SAEConfig(expansion=2, k=4, tokens=500, batch=64)
    first, again, other = train(llama, short), train(llama, short), train(llama, short, seed=1)
    for layer in LAYERS:
        for name, p in first[layer].state_dict().items():
            assert torch.equal(p, again[layer].state_dict()[name])
        assert not torch.equal(first[layer].W_dec, other[layer].W_dec)


def test_settings_out_of_range_are_refused(llama: LanguageModel) -> None:
    for config in (
        SAEConfig(k=0), SAEConfig(expansion=1, k=D_MODEL + 1), SAEConfig(expansion=0), SAEConfig(tokens=0),
        SAEConfig(batch=0), SAEConfig(lr=0.0), SAEConfig(lr=float("nan")),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            train(llama, config)
    with pytest.raises(ModelError, match="outside"):
        train_saes(llama, TEXTS, [4], CONFIG, seed=0, progress=Progress())


def test_a_diverging_run_and_a_cancelled_one_stop(llama: LanguageModel) -> None:
    with pytest.raises(NonFiniteError, match=r"layer 1 is .* at step"):
        train(llama, SAEConfig(expansion=2, k=4, tokens=2_000, batch=64, lr=1e30))
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", e.get("done", 0) >= 128)
    with pytest.raises(Cancelled):
        train(llama, SAEConfig(expansion=2, k=4, tokens=2_000, batch=64), progress=progress)


def test_a_single_position_is_no_reason_to_report_nan(llama: LanguageModel) -> None:
    events: list[dict[str, Any]] = []
    config = SAEConfig(expansion=2, k=4, tokens=3, batch=1)
    train_saes(llama, TEXTS, [0], config, seed=0, progress=Progress(events.append))
    assert json.dumps(events, allow_nan=False)


# --- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama: LanguageModel, tmp_path: Path) -> Path:
    save_saes({i: topk_sae(i, seed=i) for i in LAYERS}, tmp_path / "saes")
    return tmp_path / "saes"


def test_saved_saes_are_saelens_folders(llama: LanguageModel, tmp_path: Path) -> None:
    from sae_lens import SAE

    saes = train(llama, SAEConfig(expansion=2, k=4, tokens=500, batch=64))
    save_saes(saes, tmp_path / "saes")
    h = slow_positions(llama, windows(TEXTS, llama), LAYERS)
    ours = load_saes(tmp_path / "saes", llama)
    assert list(ours) == LAYERS
    for n, layer in enumerate(LAYERS):
        theirs = SAE.load_from_disk(tmp_path / "saes" / f"layer_{layer}", device="cpu")
        for back in (theirs, ours[layer]):
            z = saes[layer].encode(h[:, n])
            torch.testing.assert_close(back.encode(h[:, n]), z, atol=1e-6, rtol=0)
            torch.testing.assert_close(back.decode(z), saes[layer].decode(z), atol=1e-6, rtol=0)
            assert back.cfg.metadata.saeunlearn == saes[layer].cfg.metadata.saeunlearn
        assert not any(p.requires_grad for p in ours[layer].parameters())
    index = json.loads((tmp_path / "saes" / "saes.json").read_text())
    assert (index["schema"], index["layers"]) == (1, LAYERS)
    names = sorted(p.name for p in (tmp_path / "saes").rglob("*") if p.is_file())
    assert names == ["cfg.json", "cfg.json", "sae_weights.safetensors", "sae_weights.safetensors", "saes.json"]
    assert not any(s in p.read_text() for p in (tmp_path / "saes").rglob("*.json") for s in SENTENCES)


def test_folders_that_others_wrote_load_too(saved: Path, tmp_path: Path) -> None:
    assert list(load_saes(saved / "layer_3")) == [3]  # a single SAELens folder
    (tmp_path / "mine").mkdir()
    topk_sae(hook="blocks.3.hook_resid_pre").save_model(tmp_path / "mine" / "a")  # the output of block 2
    topk_sae(0).save_model(tmp_path / "mine" / "b")
    (tmp_path / "mine" / "notes").mkdir()
    assert list(load_saes(str(tmp_path / "mine"))) == [0, 2]  # sorted by layer, not by name


def test_saving_replaces_its_own_folder_only(saved: Path, tmp_path: Path) -> None:
    save_saes({2: topk_sae(2)}, saved)
    assert list(load_saes(saved)) == [2]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ErasureError, match="not empty"):
        save_saes({2: topk_sae(2)}, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"


def test_damaged_and_foreign_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "layer_1" / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "W_enc": tensors["W_enc"] * float("nan")}, weights)
    with pytest.raises(NonFiniteError, match="layer_1"):
        load_saes(saved)
    save_file({k: v for k, v in tensors.items() if k != "b_enc"}, weights)
    with pytest.raises(SAEMismatchError, match="layer_1"):
        load_saes(saved)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(SAEMismatchError, match="layer_1"):
        load_saes(saved)
    weights.unlink()
    with pytest.raises(SAEMismatchError, match=r"layer_1 has no sae_weights\.safetensors"):
        load_saes(saved)
    shutil.copytree(saved / "layer_3", saved / "twice")
    shutil.rmtree(saved / "layer_1")
    with pytest.raises(SAEMismatchError, match=r"two SAEs .* layer 3"):
        load_saes(saved)
    (saved / "twice" / "cfg.json").write_text("{}")
    with pytest.raises(SAEMismatchError, match="twice"):
        load_saes(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SAEMismatchError, match="no SAELens folder"):
        load_saes(tmp_path / "empty")


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_mlp_out", "blocks.0.attn.hook_z", "blocks.0.hook_resid_pre", "hook_embed", ""]
)
def test_hooks_that_are_no_block_output_are_refused(hook: str, tmp_path: Path) -> None:
    sae = topk_sae(0)
    sae.cfg.metadata.hook_name = hook or None
    sae.save_model(tmp_path / "sae")
    with pytest.raises(SAEMismatchError, match="embedding" if "resid" in hook else "not a residual stream"):
        load_saes(tmp_path / "sae")


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["no-such-release:blocks.0", "gpt2-small-res-jb:blocks.0.hook_resid_pre", "no/such/folder"]
)
def test_what_cannot_be_fetched_is_refused(source: str) -> None:
    with pytest.raises(SAEMismatchError, match="cannot load" if ":" in source else "neither a folder"):
        load_saes(source)


def test_parse_layers(llama: LanguageModel) -> None:
    assert parse_layers(llama, "all") == list(range(N_LAYERS))
    assert parse_layers(llama, "2") == [2]
    assert parse_layers(llama, "3, 0-1,1") == [0, 1, 3]
    for bad in ("", "1,", "a", "-1", "1-", "0-4", "4", "2-1", "1.0", "²", "0-99999999999"):
        with pytest.raises(ModelError):
            parse_layers(llama, bad)
