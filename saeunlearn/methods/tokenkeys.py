"""The embedding's share of key erasure: rows of tokens that belong to forget text alone (see `keyerasure`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..corpus import Window
from ..models import LanguageModel
from ..parts import WeightDelta


@dataclass(frozen=True)
class TokenRows:
    """The change [n, d_model], float32, of the embedding's rows `rows` [n]."""

    name: str
    rows: Tensor
    change: Tensor
    height: int

    @property
    def size(self) -> float:
        """‖ΔE‖."""
        return float(self.change.norm())

    def part(self, scale: float = 1.0) -> WeightDelta:
        return WeightDelta(self.name, False, dense=scale * self.change, rows=self.rows, height=self.height)


@torch.no_grad()
def erase_tokens(
    model: LanguageModel, forget: Sequence[Window], weights: Sequence[Tensor] | None, retain: Sequence[Window],
    lam: float, least: float = 0.0,
) -> TokenRows | None:  # fmt: skip
    """The change of the embedding by its closed form; None where no row changes. Rows that would lose no more than
    `least` of themselves stay.

    `weights`: of each forget token, aligned to `window.ids[1:]`, of mean 1; None: all alike. The first token of a
    window counts as retain text, whatever it is: it is BOS, or acts as the attention sink.
    """
    embedding = model._base.get_input_embeddings()
    e = embedding.weight.detach().double().cpu()
    wanted, unwanted = torch.zeros(len(e)).double(), torch.zeros(len(e)).double()
    for w in retain:
        wanted.index_add_(0, torch.tensor(w.ids), torch.ones(len(w.ids)).double())
    for i, w in enumerate(forget):
        n = torch.ones(len(w.ids) - 1) if weights is None else weights[i]
        unwanted.index_add_(0, torch.tensor(w.ids[1:]), n.double().cpu())
        wanted[w.ids[0]] += 1
    share = lam * unwanted / unwanted.sum()
    rows = (share > 0).nonzero().flatten()
    gone = share[rows] / (wanted[rows] / wanted.sum() + share[rows])
    rows, gone = rows[gone > least], gone[gone > least]
    change = (gone[:, None] * (e[wanted > 0].mean(0) - e[rows])).float()
    name = next(n for n, p in model._base.named_parameters() if p is embedding.weight)
    kept = change.abs().amax(1) > 0
    return TokenRows(name, rows[kept], change[kept], len(e)) if kept.any() else None


@contextlib.contextmanager
def seen_with(model: LanguageModel, tokens: TokenRows | None) -> Iterator[None]:
    """Within the context the blocks see the changed rows; a tied output matrix stays as it is."""
    if tokens is None:
        yield
        return
    embedding = model._base.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma multiplies what it looks up
    at = torch.full((tokens.height,), len(tokens.rows))
    at[tokens.rows] = torch.arange(len(tokens.rows))
    table = torch.cat([tokens.change, torch.zeros(1, tokens.change.shape[1])]).to(embedding.weight.device)
    at = at.to(table.device)

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (scale * table[at[args[0]]]).to(output.dtype)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
