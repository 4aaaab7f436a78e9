"""Train SAEs on many layers at once, as sae_lens objects in the SAELens format."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn import __version__
from saeunlearn.checkpoints import atomic_folder
from saeunlearn.corpus import Corpus, windows
from saeunlearn.errors import ConfigError, ModelError, NonFiniteError, SAEMismatchError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.training import one_cycle

from .activations import shuffled


@dataclass(frozen=True)
class SAEConfig:
    """Settings of SAE training; every layer gets the same."""

    expansion: int = 8  # d_sae / d_model
    k: int = 16  # active features at each position (TopK, arXiv 2406.04093)
    tokens: int = 1_000_000  # positions trained on, epochs counted
    batch: int = 1024  # positions a step
    lr: float = 2e-3  # Adam's peak learning rate, for activations scaled to norm √d
    dead_after: int = 100_000  # positions without activity after which a feature counts as dead
    buffer: int = 500_000  # positions held in memory for shuffling


def train_saes(model: LanguageModel, corpus: Corpus, layers: Sequence[int], config: SAEConfig, *, seed: int,
               progress: Progress) -> dict[int, Any]:  # fmt: skip
    """{layer: sae_lens TopKSAE} trained on the residual stream after each of `layers`, from one forward pass.

    Inputs are scaled to norm √d while training, and the scale is folded into the weights at the end.
    Raises ConfigError for k above d_sae, ModelError for a layer that is not there, NonFiniteError for NaN or
    infinite activations or losses.
    """
    from sae_lens.saes.sae import TrainStepInput

    model.check_layers(layers)
    d_sae = config.expansion * model.d_model
    if not 1 <= config.k <= d_sae:
        raise ConfigError(f"k = {config.k} active features of d_sae = {d_sae}")
    items = windows(corpus, model)
    stream = shuffled(model, items, layers, batch=config.batch, buffer=config.buffer, seed=seed)
    first = next(stream)
    scales = (math.sqrt(model.d_model) / first.norm(dim=-1).mean(0)).tolist()
    torch.manual_seed(seed)
    saes = [_new_sae(model, i, d_sae, config, first[:, n] * scales[n]) for n, i in enumerate(layers)]
    optimisers = [torch.optim.Adam(s.parameters(), lr=config.lr, betas=(0.9, 0.999)) for s in saes]
    silent = [torch.zeros(d_sae, device=model.device) for _ in layers]
    steps = math.ceil(config.tokens / first.shape[0])
    variance = [float((first[:, n] * s).var(0).sum()) for n, s in enumerate(scales)]
    progress.start(f"SAEs on layers {','.join(map(str, layers))}", steps * first.shape[0])
    fvu = dict.fromkeys(layers, 1.0)
    for step in range(steps):
        h = first if step == 0 else next(stream)
        for n, (layer, sae, opt) in enumerate(zip(layers, saes, optimisers)):
            for group in opt.param_groups:
                group["lr"] = config.lr * one_cycle(step, steps, 0.05)
            x = h[:, n] * scales[n]
            out = sae.training_forward_pass(
                TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=silent[n] > config.dead_after,
                               n_training_steps=step, is_logging_step=False)
            )  # fmt: skip
            mse = float(out.losses["mse_loss"])
            if not math.isfinite(mse):
                raise NonFiniteError(f"the SAE loss of layer {layer} is {mse} at step {step}")
            opt.zero_grad(set_to_none=True)
            out.loss.backward()
            opt.step()
            fired = (out.feature_acts.detach() > 0).any(0)
            silent[n] = torch.where(fired, torch.zeros_like(silent[n]), silent[n] + len(x))
            fvu[layer] = 0.95 * fvu[layer] + 0.05 * mse / variance[n]
        progress.step(first.shape[0], **{f"fvu{i}": v for i, v in fvu.items()})
    progress.finish(**{f"fvu{i}": v for i, v in fvu.items()})
    info = {"saeunlearn": __version__, "config": asdict(config), "seed": seed, "layers": list(layers),
            "model_fingerprint": model.fingerprint(), "corpus_fingerprint": corpus.fingerprint()}  # fmt: skip
    return {i: _finished(s, scales[n], info) for n, (i, s) in enumerate(zip(layers, saes))}


def _new_sae(model: LanguageModel, layer: int, d_sae: int, config: SAEConfig, x: Tensor) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=model.d_model, d_sae=d_sae, k=config.k, device=str(model.device), apply_b_dec_to_input=True,
            aux_loss_coefficient=1 / 32, decoder_init_norm=1.0,
            metadata=SAEMetadata(
                model_name=model.name, hook_name=f"blocks.{layer}.hook_resid_post", hook_head_index=None
            ),
        )
    )  # fmt: skip
    sae.b_dec.data = x.mean(0).clone()
    return sae


def _finished(sae: Any, scale: float, info: dict[str, Any]) -> Any:
    """The inference SAE: decoder rows of norm 1, the input scale folded in."""
    from sae_lens import TopKSAE, TopKSAEConfig

    sae.fold_W_dec_norm()
    sae.cfg.rescale_acts_by_decoder_norm = False
    cfg = {k: v for k, v in sae.cfg.get_inference_sae_cfg_dict().items() if k != "architecture"}
    done = TopKSAE(TopKSAEConfig.from_dict(cfg))
    done.load_state_dict(sae.state_dict())
    # x·s encodes to z, whose reconstruction is divided by s: W_dec alone takes it, so its rows stay of one norm
    # only up to 1/s. Features are therefore rescaled: z' = z/s with unit rows.
    with torch.no_grad():
        done.b_enc /= scale
        done.b_dec /= scale
    done.cfg.metadata["saeunlearn"] = info
    return done.requires_grad_(False).eval()


def save_saes(saes: Mapping[int, Any], folder: str | Path) -> None:
    """One SAELens folder a layer, `layer_{l}/`, and an index; written whole or not at all."""
    with atomic_folder(folder, replaces=lambda p: (p / "saes.json").exists()) as work:
        for layer, sae in saes.items():
            sae.save_model(work / f"layer_{layer}")
        index = {
            "schema": 1,
            "layers": sorted(saes),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        (work / "saes.json").write_text(json.dumps(index, indent=1))


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
        folders = (
            [path] if (path / "cfg.json").exists() else sorted(p.parent for p in path.glob("*/cfg.json"))
        )
        if not folders:
            raise SAEMismatchError(f"{path} holds no SAELens folder (cfg.json with sae_weights.safetensors)")
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
    import re

    hook = getattr(sae.cfg.metadata, "hook_name", None) or ""
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_post|hook_resid_pre|hook_out|hook_in)", hook)
    if not found:
        raise SAEMismatchError(f"{name}: hook {hook!r} is not a residual stream between blocks")
    layer = int(found[1]) - (found[2] in ("hook_resid_pre", "hook_in"))
    if layer < 0:
        raise SAEMismatchError(f"{name}: {hook!r} is the embedding, before any block")
    return layer


def default_layers(model: LanguageModel, spec: str) -> list[int]:
    """`all`, or numbers and ranges as in `1,3,5-8`. Raises ModelError for anything else."""
    if spec == "all":
        return list(range(model.n_layers))
    out: set[int] = set()
    for part in spec.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ModelError(f"layers {spec!r}: use `all`, or numbers and ranges such as 1,3,5-8")
        out |= set(range(int(first), int(last or first) + 1))
    model.check_layers(sorted(out))
    return sorted(out)
