"""Where the supported models keep their blocks. Self-contained: see the package's docstring."""

from __future__ import annotations

from typing import Any

from torch import nn

# Where each supported layout keeps its blocks: Llama and Gemma-2, GPT-2, GPT-NeoX.
BLOCK_PATHS = ("model.layers", "transformer.h", "gpt_neox.layers")


class DeployError(ValueError):
    """A saved Erasure is damaged, does not fit the model, or cannot act in the way that is asked."""


def find_blocks(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """(module that runs the blocks, the blocks) of a Hugging Face causal model, plain or PEFT.

    Raises DeployError for an unknown layout.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path in BLOCK_PATHS:
        outer, inner = path.split(".")
        backbone = getattr(base, outer, None)
        blocks = getattr(backbone, inner, None)
        if isinstance(backbone, nn.Module) and isinstance(blocks, nn.ModuleList):
            return backbone, blocks
    raise DeployError(
        f"{type(base).__name__} has no known list of blocks (looked for {', '.join(BLOCK_PATHS)}); "
        "Llama-, GPT-2-, GPT-NeoX- and Gemma-2-like layouts are supported"
    )
