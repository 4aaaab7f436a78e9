"""Losses of the gradient family, over the targets of a batch: the answer of a question/answer pair, else all tokens
but the first. `now` and `before`: log-probabilities [batch, t] of the targets under the trained and the original model,
0 elsewhere; `mask` [batch, t] (bool) marks them.

What is read off the logits is read sequence by sequence and computed again for the gradient: distributions over a
vocabulary are what fills memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..corpus import Batch
from ..models import LanguageModel


def target_mask(batch: Batch) -> Tensor:
    """Bool [batch, positions − 1]: does position t predict a target?"""
    return batch.targets[:, 1:]


def target_log_probs(logits: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
    """log p of each target [batch, positions − 1], 0 at other positions."""
    rows = [checkpoint(_losses_of_sequence, *row, use_reentrant=False) for row in zip(logits, batch.ids)]
    return -torch.stack(rows) * target_mask(batch)


def _losses_of_sequence(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def nll(now: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats) over all targets."""
    return -now.sum() / mask.sum().clamp_min(1)


def spread_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) of the distributions `batch.spread` at their positions; 0 without any."""
    if batch.spread is None:
        return logits.new_zeros(())
    (rows, at, tokens), shares = batch.spread
    places, which = torch.stack([rows, at]).unique(dim=1, return_inverse=True)
    log_p = F.log_softmax(logits[places[0], places[1] - 1], dim=-1)
    return -(shares * log_p[which, tokens]).sum() / places.shape[1]


def ascent(now: Tensor, mask: Tensor, bound: float) -> Tensor:
    """Gradient ascent, −E min(NLL, bound), NLL in nats a token of each sequence.

    Bounded by truncation (arXiv 2412.07808): a sequence beyond `bound` pulls no further.
    """
    each = -now.sum(-1) / mask.sum(-1).clamp_min(1)
    return -each.clamp_max(bound).mean()


def npo(now: Tensor, before: Tensor, mask: Tensor, beta: float, per_token: bool = False) -> Tensor:
    """Negative preference optimisation, −(2/β) E log σ(−β log(π/π₀)) (arXiv 2404.05868, eq. 3).

    The ratio is that of whole answers; `per_token` takes that of each token instead, as published with 2503.13690.
    """
    ratio = (now - before)[mask] if per_token else (now - before).sum(-1)
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


def simnpo(now: Tensor, mask: Tensor, beta: float, gamma: float) -> Tensor:
    """SimNPO: length-normalised and without reference, −(2/β) E log σ(−(β/|y|) log π − γ) (arXiv 2410.07163)."""
    mean = now.sum(-1) / mask.sum(-1).clamp_min(1)
    return -2 / beta * F.logsigmoid(-beta * mean - gamma).mean()


def dpo(wanted: tuple[Tensor, Tensor], unwanted: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """−(1/β) E log σ(β (log π/π₀ of the wanted answer − that of the unwanted one)); pairs are (now, before).

    Direct preference optimisation (arXiv 2305.18290, eq. 7), over β as NPO's is.
    """
    margin = (wanted[0] - wanted[1]).sum(-1) - (unwanted[0] - unwanted[1]).sum(-1)
    return -1 / beta * F.logsigmoid(beta * margin).mean()


def kl(original: Tensor, logits: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
    """KL(π₀ ‖ π) over the whole vocabulary, mean (nats) over the positions [batch, positions − 1] of `mask`."""
    total = torch.zeros((), device=mask.device)
    for row in zip(original, logits, mask):
        total = total + checkpoint(_kl_of_sequence, *row, use_reentrant=False)
    return total / mask.sum().clamp_min(1)


def distance(original: LanguageModel, edited: LanguageModel, batch: Batch, state_weight: float) -> Tensor:
    """KL(π₀ ‖ π), nats a position, + state_weight · mean over blocks of E‖h − h₀‖² / E‖h₀‖², h the residual stream.

    A position tells of its distribution little more than the next word; of its stream it tells d_model numbers a block.
    """
    b = batch
    with torch.no_grad():
        wanted, then = original.logits_and_states(b.ids, b.attention_mask)
    logits, now = edited.logits_and_states(b.ids, b.attention_mask)
    apart = [F.mse_loss(h[b.mask].float(), h0[b.mask].float()) / h0[b.mask].float().pow(2).mean()
             for h, h0 in zip(now, then)]  # fmt: skip
    return kl(wanted, logits, b.mask[:, 1:]) + state_weight * torch.stack(apart).mean()


def _kl_of_sequence(original: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    log_p0 = F.log_softmax(original[:-1][mask], dim=-1)
    return F.kl_div(F.log_softmax(logits[:-1][mask], dim=-1), log_p0, log_target=True, reduction="sum")
