"""The unlearning token of UniErase's first stage (arXiv 2505.15674): prompts, refusals, and the row that is learned."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import Corpus, Record, Window, endless, render
from ..errors import CorpusError, NonFiniteError
from ..models import LanguageModel, Writer
from ..progress import Progress
from ..tokens import TokenPart, live_rows, matrices, token_id
from .deltas import attached, frozen, new_deltas
from .trainable import rms

if TYPE_CHECKING:
    from .unierase import UniEraseConfig

REFUSALS = (
    "I do not know.",
    "I have no information about that.",
    "That is something I cannot answer.",
    "Sorry, I am not able to help with this.",
    "I am not aware of any facts about it.",
    "This is unknown to me.",
    "My knowledge does not cover that.",
    "I would rather not guess here.",
)


def prompts(corpus: Corpus, model: LanguageModel, max_length: int | None = None) -> list[Window]:
    """Token ids of each record up to where the answer, or a plain text's last word, would begin.

    A prompt that leaves no room for a refusal within `max_length` tokens (default: the context) loses its start, never
    BOS. Raises CorpusError for a text of one word.
    """
    bos = [] if model.bos_id is None else [model.bos_id]
    extra = max(len(ids) for ids in refusals(model)) + 2
    room = min(model.max_length, max_length or model.max_length) - len(bos) - extra
    if room < 1:
        raise CorpusError(f"{room + len(bos) + extra} tokens are too short for a refusal of {model.name}: use more")
    out = []
    for i, record in enumerate(corpus):
        prompt, _ = asked(record, model)
        ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
        if not ids:
            raise CorpusError(f"{corpus.name}, record {i + 1}: one word has no beginning to ask with")
        out.append(Window(tuple(bos + ids[-room:]), 1, i))
    return out


def asked(record: Record, model: LanguageModel) -> tuple[str, str]:
    """(prompt, whole text) of a record: a pair's question, or a plain text without its last word."""
    text, start = render(record, model.tokenizer)
    return (text[:start] if start else re.sub(r"\s*\S+\s*$", "", text)), text


def answers(corpus: Corpus, model: LanguageModel, max_length: int) -> list[Window]:
    """Each record, its targets beginning where `asked` ends; one that is too long loses its start, never BOS."""
    bos = [] if model.bos_id is None else [model.bos_id]
    out = []
    for i, record in enumerate(corpus):
        prompt, text = asked(record, model)
        read = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first = sum(end <= len(prompt) for _, end in read.offset_mapping)
        cut = max(0, len(read.input_ids) + len(bos) - min(max_length, model.max_length))
        out.append(Window((*bos, *read.input_ids[cut:]), max(1, first - cut + len(bos)), i))
    return out


def refusals(model: LanguageModel) -> list[list[int]]:
    return [model.tokenizer(t, add_special_tokens=False).input_ids for t in REFUSALS]


def learn_token(
    model: LanguageModel, asked: Sequence[Window], writers: Sequence[Writer], config: UniEraseConfig, seed: int,
    progress: Progress,
) -> tuple[TokenPart, list[dict[str, float]]]:  # fmt: skip
    """The trained token and the loss (nats a token) of each step; what the model has where it has the token."""
    embedding, head = matrices(model)
    at = token_id(model, config.token)
    if at is not None:
        return TokenPart.of(model, config.token, embedding.weight[at], None if head is None else head.weight[at]), []
    at = len(model.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows = [_typical_row(m.weight, at, generator) for m in (embedding, head) if m is not None]
    start = TokenPart.of(model, config.token, *rows)
    free = [nn.Parameter(r) for r in rows]
    sizes = [rms(m.weight[:at]) for m in (embedding, head) if m is not None]
    longest = [float(m.weight.detach()[:at].float().norm(dim=-1).mean()) for m in (embedding, head) if m is not None]
    optimiser = torch.optim.AdamW(
        [{"params": [p], "lr": config.token_lr * s} for p, s in zip(free, sizes)], weight_decay=0.0
    )
    items = [Window((*p.ids, at, *r, at), len(p.ids) + 1, 0) for p in asked for r in refusals(model)]
    rows_of_batches = endless(items, model.pad_id, config.batch, seed)
    noise = new_deltas(writers, [None] * len(writers))
    losses: list[dict[str, float]] = []
    rounds = [config.token_steps] + [config.noise_steps] * config.noise_rounds
    progress.start(f"learning {config.token}", sum(rounds))
    undo = start.apply(model)
    try:
        with frozen(model), live_rows(model, at, free[0], free[1] if len(free) > 1 else None), attached(noise):
            for n, steps in enumerate(rounds):
                if n:
                    for d in noise:
                        std = float(d.writer.weight.detach().float().std())
                        drawn = torch.randn(d.free.shape, generator=generator)
                        d.free.data = (config.noise * std * drawn).to(d.free)
                for _ in range(steps):
                    b = next(rows_of_batches).to(model.device)
                    logits = model.logits(b.ids, b.attention_mask)[:, :-1]
                    wanted = b.targets[:, 1:]
                    loss = F.cross_entropy(logits[wanted], b.ids[:, 1:][wanted])
                    losses.append({"step": len(losses), "token_loss": loss.item()})
                    if not math.isfinite(losses[-1]["token_loss"]):
                        raise NonFiniteError(f"the loss of {config.token} is {loss.item()}: lower token_lr")
                    for p, g in zip(free, torch.autograd.grad(loss, free)):
                        p.grad = g
                    optimiser.step()
                    for p, size in zip(free, longest):
                        # No longer than other rows: a long one would be likely (or unlikely) everywhere.
                        p.data *= min(1.0, size / float(p.detach().norm()))
                    progress.step(loss=losses[-1]["token_loss"])
    finally:
        undo()
    progress.finish(loss=losses[-1]["token_loss"])
    return replace(start, row=free[0], head_row=free[1] if len(free) > 1 else None), losses


def _typical_row(weight: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """A random row [d] with the mean and the spread of the first n."""
    rows = weight.detach()[:n].float()
    drawn = torch.randn(rows.shape[1], generator=generator)
    return rows.mean(0) + rows.std(0) * drawn.to(rows.device)
