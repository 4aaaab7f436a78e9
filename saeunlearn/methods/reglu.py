"""ReGLU: low-rank updates in the directions of the forget texts, off those of the retain texts (arXiv 2604.17396).

Known: a LoRA initialised in the top eigenvectors of (1 − β) Cov_f − β Cov_r of layer outputs and kept off the retain
subspace; projected unlearning without an SAE. Reconstructed: the layers are the matrices that write to the stream, the
losses are those of NPO with a retain likelihood, and ΔW = U B with U frozen: those eigenvectors without what they share
with as many top eigenvectors of Cov_r (the paper trains U too, under a penalty). Covariances leave out BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..corpus import Corpus, windows
from ..errors import ConfigError, ModelError
from ..features.subspace import orthonormal_basis
from ..models import LanguageModel, Writer
from .budget import some
from .gradient import Task
from .npo import NPO, NPOConfig
from .trainable import Trainable, trainable_writers


@dataclass(frozen=True)
class ReGLUConfig(NPOConfig):
    """Settings of ReGLU; what is trained is given, so `weights` must stay as it is."""

    lr: float = 0.1  # as in LoopConfig
    mix: float = 0.5  # β: weight of the retain covariance against that of the forget texts


class ReGLU(NPO):
    name = "reglu"
    Config = ReGLUConfig
    paper = "ReGLU, 2026, arXiv 2604.17396; losses reconstructed, subspace frozen"
    changes = "all matrices that write to the stream, in the directions of the forget texts"
    cost = "as fine-tuning a LoRA; one pass for the covariances"

    def check(self, model: LanguageModel, config: ReGLUConfig) -> None:
        super().check(model, config)
        if config.weights != "lora":
            raise ConfigError("reglu always trains low-rank updates of the matrices that write: leave out `weights`")
        if not 0 <= config.mix <= 1:
            raise ConfigError(f"mix is a share from 0 to 1, not {config.mix}")
        if 2 * config.rank > model.d_model:
            raise ConfigError(f"rank {config.rank} leaves no room beside the retain subspace in d = {model.d_model}")

    def training(self, task: Task) -> AbstractContextManager[Trainable]:
        rank, mix = task.config.rank, task.config.mix
        writers = task.model.writers(list(range(task.model.n_layers)), ("mlp", "attn"))
        c_f, c_r = (output_covariances(task.model, writers, c, task.seed) for c in (task.forget, task.retain))
        bases: list[Tensor | None] = []
        for f, r in zip(c_f, c_r):
            wanted = top((1 - mix) * f - mix * r, rank)
            bases.append(orthonormal_basis(wanted.T, against=top(r, rank).cpu()))
        return trainable_writers(task.model, writers, bases)


@torch.no_grad()
def output_covariances(model: LanguageModel, writers: Sequence[Writer], corpus: Corpus, seed: int) -> list[Tensor]:
    """E[y yᵀ] [d_out, d_out] (float64) of what each matrix writes, over a sample of the corpus."""
    sums = [torch.zeros(w.d_out, w.d_out, dtype=torch.float64, device=model.device) for w in writers]
    seen: dict[int, Tensor] = {}
    handles = [
        w.module.register_forward_hook(lambda _m, _a, out, n=n: seen.update({n: out})) for n, w in enumerate(writers)
    ]
    count = 0
    try:
        for window in some(windows(corpus, model), seed):
            model.logits(torch.tensor([window.ids], device=model.device))
            for n, total in enumerate(sums):
                y = seen[n][0, 1:].double()
                total += y.T @ y
            count += len(window.ids) - 1
    finally:
        for h in handles:
            h.remove()
    return [s / count for s in sums]


def top(matrix: Tensor, n: int) -> Tensor:
    """The `n` eigenvectors [d, n] with the largest eigenvalues of a symmetric matrix."""
    if not torch.isfinite(matrix).all():
        raise ModelError("the covariance of what the model writes holds NaN or infinity")
    return torch.linalg.eigh(matrix).eigenvectors[:, -n:]
