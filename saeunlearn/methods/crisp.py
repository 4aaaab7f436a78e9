"""CRISP: a LoRA that silences the relevant features (Ashuach et al., 2025, arXiv 2508.13650).

Known: the positive activation of salient SAE features on the target is driven to zero, the hidden states of retain text
are held by a squared error, and a coherence term keeps the text fluent. The exact terms are reconstructed: activations
are relative to their mean before the edit, squared errors to ‖h‖², and the coherence term is the likelihood of retain
text. Positions: all but BOS for the hidden states and activations, targets for the likelihood.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..corpus import Batch, windows
from ..errors import ConfigError, SelectionError
from ..features.selection import check_selection
from ..models import LanguageModel
from .budget import some
from .gradient import GradientMethod, LoopConfig, Objective, Task, Terms, check_loop
from .objectives import nll, target_log_probs, target_mask
from .trainable import Trainable, check_weights, trainable


@dataclass(frozen=True)
class CRISPConfig(LoopConfig):
    """Settings of CRISP."""

    lr: float = 0.1  # as in LoopConfig
    rank: int = 4  # of the LoRA (paper: 4)
    blocks: int = 3  # adapted blocks layer − blocks + 1 … layer: their matrices that write to the stream
    retain_weight: float = 3.0  # of the squared error of retain hidden states together with the coherence term
    coherence: float = 0.1  # weight of the coherence term within the retain loss


class CRISP(GradientMethod):
    name = "crisp"
    Config = CRISPConfig
    paper = "Ashuach et al., 2025, arXiv 2508.13650; exact terms reconstructed"
    changes = "a LoRA on the matrices that write to the stream in a few blocks up to the selection's layer"
    cost = "passes up to the chosen layer, and whole ones for the coherence term"
    needs = frozenset({"saes", "selection"})

    def check(self, model: LanguageModel, config: CRISPConfig) -> None:
        check_loop(config)
        check_weights(model, "lora", config.rank)
        if config.coherence < 0:
            raise ConfigError(f"coherence must not be negative, not {config.coherence}")

    def training(self, task: Task) -> AbstractContextManager[Trainable]:
        assert task.selection is not None
        layer = task.selection.layer
        blocks = range(max(0, layer - task.config.blocks + 1), layer + 1)
        names = [w.name.removesuffix(".weight") for w in task.model.writers(list(blocks), ("mlp", "attn"))]
        return trainable(task.model, "lora", task.config.rank, task.seed, names)

    def objective(self, task: Task) -> Objective:
        if task.selection is None:
            raise ConfigError("crisp needs a selection (saeunlearn select)")
        check_selection(task.selection, task.model, task.saes)
        layer, features, config = task.selection.layer, task.selection.relevant, task.config
        sae = task.saes[layer]

        def stream(model: LanguageModel, batch: Batch) -> Tensor:
            return model.capture(batch.ids, [layer], batch.attention_mask)[layer].float()[batch.mask]

        def activity(h: Tensor) -> Tensor:
            return sae.encode(h.to(sae.dtype))[..., features].float().sum(-1)

        with torch.no_grad():
            sample = some(windows(task.forget, task.model, config.max_length), task.seed)
            h = [task.model.capture(torch.tensor([w.ids], device=task.model.device), [layer])[layer] for w in sample]
            usual = float(torch.cat([activity(x[0, 1:].float()) for x in h]).mean())
        if usual <= 0:
            raise SelectionError("the relevant features are active nowhere in the forget text: nothing to silence")

        def losses(trained: Trainable, f: Batch, r: Batch) -> Terms:
            def kept() -> Tensor:
                with torch.no_grad(), trained.original() as original:
                    before = stream(original, r)
                moved = (stream(trained.net, r) - before) / before.norm(dim=-1, keepdim=True)
                fluent = nll(target_log_probs(trained.logits(r), r), target_mask(r)) if config.coherence else 0.0
                return moved.pow(2).sum(-1).mean() + config.coherence * fluent

            return lambda: activity(stream(trained.net, f)).mean() / usual, kept

        return losses
