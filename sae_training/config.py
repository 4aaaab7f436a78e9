"""Settings of SAE training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from saeunlearn.errors import ConfigError

Architecture = Literal["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"]
SPARSE = ("topk", "batchtopk", "matryoshka")  # trained by sparse kernels; the others by sae_lens's own classes
LEVELS = (1 / 8, 1 / 4, 1 / 2, 1)  # of d_sae: the nested widths of Matryoshka SAEs


@dataclass(frozen=True)
class SAEConfig:
    """Settings of SAE training; every layer gets the same.

    Architectures: TopK (arXiv 2406.04093), BatchTopK (2412.06410), Matryoshka BatchTopK (2503.17547), ReLU with L1
    and Gated (2404.16014), JumpReLU with a tanh penalty (2407.14435, Anthropic January 2025).
    """

    architecture: Architecture = "topk"
    expansion: int = 8  # d_sae / d_model
    k: int = 16  # active features at a position: exactly (topk), on average (batchtopk, matryoshka), or aimed at
    tokens: int = 1_000_000  # positions trained on, epochs counted
    batch: int = 1024  # positions a step, over all processes
    lr: float = 3e-3  # Adam's peak learning rate, for activations scaled to norm √d
    aux: float = 1 / 32  # top-k family: weight of the loss by which dead features learn what the others leave over
    dead_after: int = 100_000  # positions without activity after which a feature counts as dead
    buffer: int | None = None  # positions held in memory for shuffling; None: what fits into 1 GiB
    context: int | None = None  # tokens in a row at most; None: the model's context
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"  # top-k family: of the dense pass that selects features
    pack: bool = False  # join records to rows of full length; off: short ones stay alone, where the model knows them
    drop_outliers: bool = False  # leave out positions with a norm above 10 × the median (attention sinks)

    @property
    def label(self) -> str:
        """A short name, the same for all layers."""
        return f"{self.architecture}-x{self.expansion}-k{self.k}"

    def check(self, d_model: int) -> None:
        """Raises ConfigError naming what is out of range."""
        if self.architecture not in get_args(Architecture):
            raise ConfigError(f"unknown architecture {self.architecture!r}; use {', '.join(get_args(Architecture))}")
        if self.encoder_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"encoder_dtype is float32 or bfloat16, not {self.encoder_dtype!r}")
        for name in ("expansion", "tokens", "batch", "lr", "dead_after", "buffer", "context"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"SAE setting {name} must be positive, not {value}")
        if not self.aux >= 0:
            raise ConfigError(f"SAE setting aux must not be negative, not {self.aux}")
        if not 1 <= self.k <= self.expansion * d_model:
            raise ConfigError(f"k = {self.k} active features of d_sae = {self.expansion * d_model}")
