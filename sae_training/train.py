"""Train SAEs on many layers at once, as sae_lens objects in the SAELens format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saeunlearn import __version__
from saeunlearn.corpus import Corpus, windows
from saeunlearn.errors import ConfigError, NonFiniteError
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

    def check(self, d_model: int) -> None:
        """Raises ConfigError naming what is out of range."""
        for name in ("expansion", "tokens", "batch", "lr", "buffer"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"SAE setting {name} must be positive, not {getattr(self, name)}")
        if not 1 <= self.k <= self.expansion * d_model:
            raise ConfigError(f"k = {self.k} active features of d_sae = {self.expansion * d_model}")


def train_saes(model: LanguageModel, corpus: Corpus, layers: Sequence[int], config: SAEConfig, *, seed: int,
               progress: Progress) -> dict[int, Any]:  # fmt: skip
    """{layer: sae_lens TopKSAE} trained on the residual stream after each of `layers`, from one forward pass.

    Inputs are scaled to norm √d while training, and the scale is folded into the weights at the end.
    Raises ConfigError for settings out of range and k above d_sae, ModelError for a layer that is not there,
    NonFiniteError for NaN or infinite activations or losses.
    """
    from sae_lens.saes.sae import TrainStepInput

    model.check_layers(layers)
    config.check(model.d_model)
    d_sae = config.expansion * model.d_model
    items = windows(corpus, model)
    stream = shuffled(model, items, layers, batch=config.batch, buffer=config.buffer, seed=seed)
    first = next(stream)
    scales = (math.sqrt(model.d_model) / first.norm(dim=-1).mean(0)).tolist()
    torch.manual_seed(seed)
    saes = [_new_sae(model, i, d_sae, config, first[:, n] * scales[n]) for n, i in enumerate(layers)]
    optimisers = [torch.optim.Adam(s.parameters(), lr=config.lr, betas=(0.9, 0.999)) for s in saes]
    silent = [torch.zeros(d_sae, device=model.device) for _ in layers]
    steps = math.ceil(config.tokens / first.shape[0])
    variance = [float((first[:, n] * s).var(0, correction=0).sum().clamp_min(1e-12)) for n, s in enumerate(scales)]
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
            mse = out.losses["mse_loss"].item()
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
    done = TopKSAE(TopKSAEConfig.from_dict(sae.cfg.get_inference_sae_cfg_dict()))
    done.load_state_dict(sae.state_dict())
    # Trained on s·h. TopK and ReLU scale with their input, so z' = z/s with the same W_enc and unit decoder rows
    # reconstructs h itself once both biases are divided by s.
    with torch.no_grad():
        done.b_enc /= scale
        done.b_dec /= scale
    done.cfg.metadata["saeunlearn"] = info
    return done.requires_grad_(False).eval()
