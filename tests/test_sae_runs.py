"""SAE training as a whole: every architecture, stopping and going on, quality, the command."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, Checkpoints
from safetensors.torch import load_file, save_file
from streams import TEXTS, slow_positions

from sae_training import SAEConfig, load_saes, save_saes, train_saes
from sae_training.config import SPARSE
from sae_training.produce import produce, split, token_windows
from sae_training.quality import quality
from saeunlearn.corpus import windows
from saeunlearn.errors import Cancelled, ConfigError, CorpusError, RunError, SAEMismatchError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

ARCHITECTURES = ["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"]
CONFIG = SAEConfig(expansion=4, k=8, tokens=24_000, batch=128)
LAYERS = [1, 3]


def weights(saes: dict[int, Any]) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": p for i, s in saes.items() for n, p in s.state_dict().items()}


def stopping_at(done: int) -> Progress:
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", e.get("done", 0) >= done)
    return progress


def same(a: dict[int, Any], b: dict[int, Any]) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_keeps_its_aim_and_opens_in_sae_lens(
    llama: LanguageModel, tmp_path: Path, architecture: str
) -> None:
    from sae_lens import SAE

    config = replace(CONFIG, architecture=architecture, tokens=60_000 if architecture == "relu" else CONFIG.tokens)
    sae = train_saes(llama, TEXTS, [1], config, seed=0, progress=Progress())[1]
    h = slow_positions(llama, windows(TEXTS, llama), [1])[:, 0]
    z = sae.encode(h)
    fvu = float((sae.decode(z) - h).pow(2).sum() / (h - h.mean(0)).pow(2).sum())
    assert fvu < (0.6 if architecture == "relu" else 0.25)  # L1 shrinks what it finds
    l0 = float((z > 0).sum(-1).double().mean())
    off = 1.3 if architecture in SPARSE else 2.0
    assert config.k / off <= l0 <= config.k * off
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(4 * D_MODEL), atol=1e-5, rtol=0)
    save_saes({1: sae}, tmp_path / "saes")
    theirs = SAE.load_from_disk(tmp_path / "saes" / "layer_1", device="cpu")
    assert type(theirs) is type(sae)
    torch.testing.assert_close(theirs.encode(h), z, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs.decode(z), sae.decode(z), atol=1e-6, rtol=0)


def test_several_configurations_share_one_stream_and_do_not_disturb_each_other(llama: LanguageModel) -> None:
    configs = [replace(CONFIG, tokens=2_000, k=4), replace(CONFIG, tokens=2_000, architecture="gated")]
    passes = 0
    plain = llama.capture

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain(*args, **kwargs)

    llama.capture = counting  # type: ignore[method-assign]
    together = train_saes(llama, TEXTS, LAYERS, configs, seed=0, progress=Progress())
    once = passes
    alone = [train_saes(llama, TEXTS, LAYERS, c, seed=0, progress=Progress()) for c in configs]
    assert once == passes - once * 2 == passes // 3
    assert all(same(a, b) for a, b in zip(together, alone))
    for bad in ([], [CONFIG, CONFIG], [CONFIG, replace(CONFIG, k=4, batch=64)]):
        with pytest.raises(ConfigError):
            train_saes(llama, TEXTS, LAYERS, bad, seed=0, progress=Progress())


@pytest.mark.parametrize("drop", [False, True])
def test_positions_with_huge_norms_are_reported_and_left_out(llama: LanguageModel, drop: bool) -> None:
    plain = llama.capture

    def with_sinks(ids: Any, layers: Any, mask: Any = None) -> Any:
        out = plain(ids, layers, mask)
        return {i: torch.where((ids % 7 == 0)[..., None], 300 * h, h) for i, h in out.items()}

    llama.capture = with_sinks  # type: ignore[method-assign]
    items = windows(TEXTS, llama)
    share = sum(t % 7 == 0 for w in items for t in w.ids[1:]) / sum(len(w.ids) - 1 for w in items)
    assert 0.02 < share < 0.4
    notes: list[str] = []
    progress = Progress(lambda e: notes.append(e["message"]) if e["event"] == "note" else None)
    config = replace(CONFIG, tokens=6_000, drop_outliers=drop)
    sae = train_saes(llama, TEXTS, [1], config, seed=0, progress=progress)[1]
    said = sae.cfg.metadata.saeunlearn["outliers"]
    assert abs(said - share) < 0.03
    assert any("layer 1" in n and ("left out" if drop else "drop_outliers") in n for n in notes)
    h = slow_positions(llama, items, [1])[:, 0]
    ordinary = h[h.norm(dim=-1) < 100]
    fvu = float((sae(ordinary) - ordinary).pow(2).sum() / (ordinary - ordinary.mean(0)).pow(2).sum())
    assert (fvu < 0.5) == drop  # with the sinks kept the loss sees nothing else


# --- stopping and going on ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cancelled_run_goes_on_bit_for_bit(llama: LanguageModel, tmp_path: Path) -> None:
    configs = [replace(CONFIG, architecture=a, tokens=3_000, dead_after=300) for a in ARCHITECTURES]
    whole = train_saes(llama, TEXTS, LAYERS, configs, seed=0, progress=Progress())
    file = tmp_path / "c.safetensors"
    for stop in (128, 1_000, 2_000):
        with pytest.raises(Cancelled):
            train_saes(llama, TEXTS, LAYERS, configs, seed=0, progress=stopping_at(stop), checkpoint=file)
    again = train_saes(llama, TEXTS, LAYERS, configs, seed=0, progress=Progress(), checkpoint=file)
    assert all(same(a, b) for a, b in zip(whole, again))
    with pytest.raises(RunError, match="other settings"):
        train_saes(llama, TEXTS, LAYERS, configs, seed=1, progress=Progress(), checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match="not a checkpoint"):
        train_saes(llama, TEXTS, LAYERS, configs, seed=0, progress=Progress(), checkpoint=file)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from streams import TEXTS
from sae_training import SAEConfig, save_saes, train, train_saes
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
torch.set_num_threads(1)
train.CHECKPOINT_SECONDS = 0.0  # after every step
lm = LanguageModel.open({model!r}, device="cpu")
progress = Progress(lambda e: print(e.get("done"), flush=True))
configs = [SAEConfig(architecture=a, expansion=4, k=8, tokens=12_000, batch=128, buffer=256) for a in ("topk", "relu")]
saes = train_saes(lm, TEXTS, [1, 3], configs, seed=0, progress=progress, checkpoint=Path({out!r} + "/c.safetensors"))
for c, s in zip(configs, saes):
    save_saes(s, Path({out!r}) / c.label)
"""


def run(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_bit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def script(out: Path) -> str:
        out.mkdir(exist_ok=True)
        return SCRIPT.format(tests=str(Path(__file__).parent), model=str(checkpoints("llama")), out=str(out))

    plain = run(script(tmp_path / "plain"))
    assert plain.wait() == 0, plain.stderr and plain.stderr.read()
    for kill_after in (3, 20, 20, 20):
        p = run(script(tmp_path / "killed"))
        assert p.stdout
        for _ in range(kill_after):
            assert p.stdout.readline()
        time.sleep(0.003 * kill_after % 0.01)  # somewhere in a step, or in the writing of its checkpoint
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
    end = run(script(tmp_path / "killed"))
    assert end.wait() == 0, end.stderr and end.stderr.read()
    for label in ("topk-x4-k8", "relu-x4-k8"):
        for layer in (1, 3):
            a, b = (
                load_file(tmp_path / r / label / f"layer_{layer}/sae_weights.safetensors") for r in ("plain", "killed")
            )
            assert all(torch.equal(a[n], b[n]) for n in a)


# --- quality -----------------------------------------------------------------------------------------------


def test_quality_agrees_with_sae_lens(llama: LanguageModel) -> None:
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    saes = train_saes(llama, TEXTS, LAYERS, replace(CONFIG, tokens=4_000), seed=0, progress=Progress())
    length = 12
    items = [w for w in windows(TEXTS, llama, length) if len(w.ids) == length][:16]
    tokens = torch.tensor([w.ids for w in items])

    class Store:  # what sae_lens asks of its activation store here
        store_batch_size_prompts = len(items)
        context_size = length

        def get_batch_tokens(self, _n: int) -> torch.Tensor:
            return tokens

        def reset_input_dataset(self) -> None: ...

    bridge = llama.transformer_lens()
    config = EvalConfig(
        batch_size_prompts=len(items), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1,
        compute_kl=True, compute_ce_loss=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )  # fmt: skip
    for ours in quality(llama, saes, items, Progress()):
        theirs, features = run_evals(
            saes[ours.layer],
            Store(),
            bridge,
            ActivationScaler(),
            config,
            exclude_special_tokens=[0 if llama.bos_id is None else llama.bos_id],
        )
        close = {
            ours.fvu: 1 - theirs["reconstruction_quality"]["explained_variance"],
            ours.l0: theirs["sparsity"]["l0"],
            ours.ce: theirs["model_performance_preservation"]["ce_loss_without_sae"],
            ours.ce_through_sae: theirs["model_performance_preservation"]["ce_loss_with_sae"],
            ours.ce_ablated: theirs["model_performance_preservation"]["ce_loss_with_ablation"],
            ours.ce_recovered: theirs["model_performance_preservation"]["ce_loss_score"],
            ours.kl: theirs["model_behavior_preservation"]["kl_div_with_sae"],
        }
        for mine, other in close.items():
            assert abs(mine - other) < 1e-3 * max(1.0, abs(other))
        density = torch.tensor(features["feature_density"])
        torch.testing.assert_close(torch.tensor(ours.density), density, atol=1e-3, rtol=0)
        assert abs(ours.dead - float((density == 0).double().mean())) < 1e-6


# --- the command -------------------------------------------------------------------------------------------


def test_produce_writes_everything_and_goes_on(llama: LanguageModel, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(r.text for r in TEXTS))
    tokens = torch.randint(5, llama.d_vocab, (40, 30))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    sources = [texts, tmp_path / "tokens.safetensors"]
    configs = [replace(CONFIG, tokens=2_000), replace(CONFIG, tokens=2_000, architecture="relu", expansion=2)]
    out = tmp_path / "saes"
    with pytest.raises(Cancelled):
        produce(llama, sources, LAYERS, configs, out, seed=0, progress=stopping_at(1_000))
    assert not out.exists()
    with pytest.raises(RunError, match="--resume"):
        produce(llama, sources, LAYERS, configs, out, seed=0, progress=Progress())
    rows = produce(llama, sources, LAYERS, configs, out, seed=0, progress=Progress(), resume=True)
    assert [(r["label"], r["layer"]) for r in rows] == [(c.label, i) for c in configs for i in LAYERS]
    said = json.loads((out / "quality.json").read_text())
    assert said["saes"] == rows
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(load_saes(out / "topk-x4-k8")) == LAYERS
    with pytest.raises(SAEMismatchError, match="topk-x4-k8"):
        load_saes(out)
    train, _ = split(llama, sources, CONFIG, 0)
    alone = train_saes(llama, train, LAYERS, configs, seed=0, progress=Progress())
    assert all(same(alone[n], load_saes(out / c.label)) for n, c in enumerate(configs))
    assert not list(tmp_path.glob(".saes*"))


def test_held_out_text_is_not_trained_on(llama: LanguageModel, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(r.text for r in TEXTS))
    tokens = torch.arange(4 * 600).reshape(100, 24) % (llama.d_vocab - 5) + 5
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    train, held = split(llama, [texts, tmp_path / "tokens.safetensors"], CONFIG, 0)
    assert not {w.ids for w in train} & {w.ids for w in held}
    assert len(held) >= 5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_token_files_fill_the_context(checkpoints: Checkpoints, arch: str, tmp_path: Path) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    ids = torch.randint(5, lm.d_vocab, (1000,))
    save_file({"tokens": ids}, tmp_path / "t.safetensors")
    rows = token_windows(tmp_path / "t.safetensors", lm, 16)
    first = 0 if lm.bos_id is None else 1
    assert {len(w.ids) for w in rows[:-1]} == {16}
    assert [t for w in rows for t in w.ids[first:]] == ids.tolist()[: sum(len(w.ids) - first for w in rows)]
    assert all(first == 0 or w.ids[0] == lm.bos_id for w in rows)


BAD_TOKENS = [
    (torch.zeros(5), "whole numbers"),
    (torch.tensor([[[1, 2]]]), "whole numbers"),
    (torch.zeros(0, dtype=torch.int64), "whole numbers"),
    (torch.tensor([1, 10**6]), "run to"),
    (torch.tensor([-1, 2]), "run to"),
    (torch.tensor([7]), "fills"),
]


@pytest.mark.parametrize(("tensor", "message"), BAD_TOKENS, ids=str)
def test_bad_token_files_are_refused(llama: LanguageModel, tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    save_file({"tokens": tensor}, tmp_path / "t.safetensors")
    with pytest.raises(CorpusError, match=message):
        split(llama, [tmp_path / "t.safetensors"], CONFIG, 0)
    (tmp_path / "t.safetensors").write_text(textwrap.dedent("not tensors"))
    with pytest.raises(CorpusError, match="token file"):
        token_windows(tmp_path / "t.safetensors", llama)


@pytest.mark.parametrize(("name", "message"), [("nonesuch", "unknown tracker"), ("trackio", "pip install trackio")])
def test_a_tracker_that_is_not_there_is_refused_before_training(
    llama: LanguageModel, tmp_path: Path, name: str, message: str
) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    (tmp_path / "texts.txt").write_text("\n".join(r.text for r in TEXTS))
    events: list[dict[str, Any]] = []
    with pytest.raises(ConfigError, match=message):
        produce(llama, [tmp_path / "texts.txt"], LAYERS, [CONFIG], tmp_path / "saes", seed=0,
                progress=Progress(events.append), tracker=name)  # fmt: skip
    assert events == []


@pytest.mark.slow
def test_a_tracker_gets_the_reports(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "texts.txt").write_text("\n".join(r.text for r in TEXTS))
    seen: list[dict[str, float]] = []
    from accelerate.tracking import WandBTracker

    log = WandBTracker.log
    monkeypatch.setattr(WandBTracker, "log", lambda self, values, **kw: (seen.append(values), log(self, values, **kw)))
    produce(llama, [tmp_path / "texts.txt"], LAYERS, [replace(CONFIG, tokens=2_000)], tmp_path / "saes", seed=0,
            progress=Progress(), tracker="wandb")  # fmt: skip
    assert seen
    assert all(isinstance(v, float) for values in seen for v in values.values())
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
