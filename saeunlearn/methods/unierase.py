"""UniErase: an unlearning token and a null-space-constrained edit that calls it (arXiv 2505.15674).

Stage 1 learns the row of a new token ⟨UNL⟩ so that "question ⟨UNL⟩" goes on with a refusal and closes with ⟨UNL⟩.
Stage 2 edits MLP output matrices so that the token after every forget prompt is ⟨UNL⟩. The edit is made at the last
token of the prompt (the paper: the subject's last token, which needs a finder of subjects); hence later blocks than
the paper's by default. The cut of the null space, λ and the noise are relative to the spectrum and to the standard
deviation of the weights (the authors' are absolute, their noise is scaled by the mean).

The prompt of a question/answer record is the question (through the chat template); that of a plain text is the text
without its last word. This is a refusal: measure also with the token banned (`saeunlearn.tokens.banned`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..corpus import Batch, Corpus, Window, collate, refuse_overlap, windows
from ..erasure import Erasure
from ..errors import ConfigError, ErasureError, ModelError, NonFiniteError
from ..features.selection import Selection
from ..models import LanguageModel, Writer
from ..progress import Progress
from ..tokens import check_text, is_added, matrices, token_id
from .budget import Budget, some
from .deltas import Delta, attached, frozen
from .nullspace import null_space, retain_covariances, solve, wide
from .refusal import learn_token, prompts

HELD = 2000  # retain prompts whose ends are held
ENOUGH = 0.05  # nats: a prompt's target is not pushed further below this loss


@dataclass(frozen=True)
class UniEraseConfig:
    """Settings of UniErase. Strengths are relative, so that they carry over between models."""

    token: str = "<|UNL|>"  # text of the new token
    token_steps: int = 200  # AdamW steps of stage 1 (paper: 5 epochs)
    token_lr: float = 0.05  # relative to the root mean square of the embedding (paper: 1e-3, absolute)
    noise_rounds: int = 4  # further rounds of stage 1, each with other noise on the matrices to be edited
    noise_steps: int = 25  # steps of each
    noise: float = 0.05  # standard deviation relative to that of each matrix (authors' code: to its mean)
    batch: int = 16  # prompts a step
    blocks: int = 5  # edited blocks top−blocks+1 … top (paper: 5)
    top: int | None = None  # last edited block; None: at three quarters of the depth (paper: 8 of 32, at the subject)
    z_steps: int = 25  # gradient steps for the target at the top block (AlphaEdit: 25)
    z_lr: float = 0.1  # relative to the activation's root mean square (AlphaEdit: 0.1, absolute)
    clamp: float = 1.0  # largest ‖z − h‖ / ‖h‖ (AlphaEdit: 0.75)
    cut: float = 0.5  # null space: eigenvalues up to this share of the mean one (paper: 2e-2, absolute)
    hold: float = 1.0  # weight of the ends of retain prompts, as many as forget prompts counted (paper: 0)
    lam: float = 0.01  # λ relative to the mean eigenvalue of the edits' keys (paper: 10, absolute)
    max_length: int = 256  # tokens in a retain window
    max_retain_rise: float = 0.02  # relative rise of the loss on held-out retain records that the result keeps to


class UniErase:
    """The method object; see the module's docstring."""

    name = "unierase"
    Config = UniEraseConfig
    needs: frozenset[str] = frozenset()
    kind: Literal["token"] = "token"
    changes = "a new token's row; MLP output matrices of a few blocks, in the null space of retain inputs"
    paper = "UniErase, arXiv 2505.15674; edit: AlphaEdit, arXiv 2410.02355"
    cost = "trains one row, then one gradient search over all prompts and one linear solve a block"

    def check(self, model: LanguageModel, config: UniEraseConfig) -> None:
        check_config(model, config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: UniEraseConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """Learn the token and the edit; the model is unchanged.

        Positions: the last token of each forget prompt is edited; stage 1 counts the refusal's tokens and the closing
        ⟨UNL⟩; retain keys are those of all positions. Raises ConfigError, OverlapError, CorpusError for a text of
        one word, ModelError, NonFiniteError, Cancelled. A model that has the token already (from an Erasure that
        was applied) keeps its row.
        """
        return sequential(model, [forget], retain, config, seed, progress)[0]


def sequential(
    model: LanguageModel, requests: Sequence[Corpus], retain: Corpus, config: UniEraseConfig, seed: int,
    progress: Progress,
) -> list[Erasure]:  # fmt: skip
    """One Erasure a request, each made on top of those before it; the model is unchanged.

    The token is learned once for all requests, and retain keys are read once. Each solve protects the keys of the
    earlier edits (C_prev). All requests share one budget, relative to the model before the first: after the n-th of N,
    n/N of it may be used. Raises as `unlearn`.
    """
    check_config(model, config)
    if not requests:
        raise ConfigError("no requests: give at least one forget corpus")
    for forget in requests:
        refuse_overlap(forget, retain)
    asked = [prompts(forget, model) for forget in requests]
    part_of_retain, held = retain.split(0.2, seed)
    items, held_items = (windows(c, model, config.max_length) for c in (part_of_retain, held))
    held_items = some(held_items, seed)
    beside = prompts(part_of_retain.sample(HELD, seed), model) if config.hold else []
    writers = edited(model, config)
    bases = [null_space(c, config.cut) for c in retain_covariances(model, items, writers, progress)]
    previous = [torch.zeros(w.d_in, w.d_in, dtype=torch.float64, device=v.device) for w, v in zip(writers, bases)]
    out: list[Erasure] = []
    with contextlib.ExitStack() as applied:
        part, losses = learn_token(model, [p for a in asked for p in a], writers, config, seed, progress)
        budget = Budget(model)
        budget.watch("retain", held_items, config.max_retain_rise)
        whole = budget.watches["retain"]
        for n, (forget, own) in enumerate(zip(requests, asked)):
            model.fingerprint()  # of the weights in memory, so before they are touched
            budget.watches["retain"] = replace(whole, limit=config.max_retain_rise * (n + 1) / len(requests))
            with contextlib.ExitStack() as with_token:
                with_token.callback(part.apply(model))
                with_token.enter_context(frozen(model))
                deltas, keys, extra = edit(model, own, beside, writers, bases, previous, config, progress)
                extra["budget"] = budget.settle(partial(attached, deltas), most=1.0)
                for d in deltas:
                    d.free.data *= extra["budget"]["scale"]
                with attached(deltas):
                    extra["next_is_token_after"] = share_next(model, own, config)
            for c, k in zip(previous, keys):
                c += k @ k.T
            erasure = Erasure.create(
                model, [part, *(d.part() for d in deltas)], method=UniErase.name, config=asdict(config), seed=seed,
                forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(), losses=losses,
                extra=extra,
            )  # fmt: skip
            out.append(erasure)
            applied.callback(erasure.apply(model).revert)
    return out


def check_config(model: LanguageModel, config: UniEraseConfig) -> None:
    """Raises ConfigError naming the setting that is out of range."""
    for name in ("token_steps", "token_lr", "batch", "blocks", "z_steps", "z_lr", "clamp", "cut", "lam",
                 "max_retain_rise"):  # fmt: skip
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("noise_rounds", "noise_steps", "noise", "hold"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must not be negative, not {getattr(config, name)}")
    if not math.isfinite(config.max_retain_rise):
        raise ConfigError("max_retain_rise must be finite: without a budget the edit can destroy the model")
    if config.top is not None and not 0 <= config.top < model.n_layers:
        raise ConfigError(f"top is block {config.top}, but {model.name} has blocks 0 … {model.n_layers - 1}")
    try:
        check_text(config.token)
        matrices(model)
    except ErasureError as e:
        raise ConfigError(str(e)) from e
    if token_id(model, config.token) is not None and not is_added(model, config.token):
        raise ConfigError(f"{config.token} is a token of {model.name} already: choose another text")


def edited(model: LanguageModel, config: UniEraseConfig) -> list[Writer]:
    """The MLP writers that stage 2 edits. Raises ModelError where a norm behind one has gains of zero."""
    top = max(0, 3 * model.n_layers // 4 - 1) if config.top is None else config.top
    writers = model.writers(range(max(0, top - config.blocks + 1), top + 1))
    for w in writers:
        if w.post_scale is not None and bool((w.post_scale.abs() < 1e-6).any()):
            raise ModelError(f"the norm behind {w.name} has gains of zero: no edit there can reach every direction")
    return writers


# --- stage 2 -----------------------------------------------------------------------------------------------


def edit(
    model: LanguageModel, asked: Sequence[Window], beside: Sequence[Window], writers: Sequence[Writer],
    bases: Sequence[Tensor], previous: Sequence[Tensor], config: UniEraseConfig, progress: Progress,
) -> tuple[list[Delta], list[Tensor], dict[str, Any]]:  # fmt: skip
    """The closed-form deltas of all writers, the keys [d_in, n] they were solved for, and what was measured.

    The keys at the ends of the prompts `beside` are held like those of earlier edits, times `hold`. Among all
    positions of retain text they are few, so that the null space alone does not spare them.
    For the i-th of n writers R = (z − h)/(n − i), with h read again after each edit.
    """
    top = writers[-1].block
    before = share_next(model, asked, config)
    z = targets(model, asked, top, config, progress)
    deltas: list[Delta] = []
    keys: list[Tensor] = []
    gaps: list[Tensor] = []
    progress.start("editing", len(writers))
    for i, (writer, v, c) in enumerate(zip(writers, bases, previous)):
        with attached(deltas):
            k, y, h = read(model, asked, writer, top, config)
            if beside:
                near = read(model, beside, writer, top, config)[0]
                c = c.to(k) + config.hold * len(asked) / len(beside) * near.T @ near
        gaps.append((z - h).norm())
        # d_out × n: what the matrix itself should write more, one column a prompt.
        residual = before_norm(writer, y, (z - h) / (len(writers) - i)).T
        right = solve(k.T, v, c.to(k), config.lam)
        deltas.append(new_delta(writer, residual, right))
        keys.append(k.T)
        progress.step()
    with attached(deltas):
        gaps.append((z - read(model, asked, writers[-1], top, config)[2]).norm())
    progress.finish()
    ranks = {str(w.block): {"null_space": v.shape[1], "d_in": w.d_in} for w, v in zip(writers, bases)}
    return deltas, keys, {
        "token": config.token, "prompts": len(asked), "next_is_token_before": before, "ranks": ranks,
        "share_of_residual_left": float(gaps[-1] / gaps[0].clamp_min(1e-300)),
    }  # fmt: skip


def targets(
    model: LanguageModel, asked: Sequence[Window], top: int, config: UniEraseConfig, progress: Progress
) -> Tensor:
    """z [n, d] float64: the stream after block `top` at each prompt's end with which ⟨UNL⟩ comes next."""
    at = token_id(model, config.token)
    assert at is not None
    z = torch.empty(0)
    groups = list(_in_batches(model, asked, config.batch))
    progress.start("targets", len(groups) * config.z_steps)
    for index, b, last in groups:
        rows = torch.arange(len(last), device=model.device)
        with torch.no_grad():
            h = model.capture(b.ids, [top], b.attention_mask)[top][rows, last].float()
        size = h.norm(dim=-1, keepdim=True)
        unit = size / math.sqrt(h.shape[1])
        free = torch.zeros_like(h, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=config.z_lr)
        for step in range(config.z_steps):
            offset = free * unit
            with model.patch({top: partial(_add_at, rows=rows, last=last, offset=offset)}):
                logits = model.logits(b.ids, b.attention_mask)[rows, last]
            loss = F.cross_entropy(logits, torch.full_like(last, at), reduction="none")
            if not loss.isfinite().all():
                raise NonFiniteError(f"the loss of the targets is {float(loss.detach().sum())}: lower z_lr or clamp")
            progress.step(loss=float(loss.detach().mean()))
            far = loss > ENOUGH
            if not far.any():
                progress.step(config.z_steps - step - 1)
                break
            (free.grad,) = torch.autograd.grad(loss[far].sum(), free)
            optimiser.step()
            with torch.no_grad():
                length = (free * unit).norm(dim=-1, keepdim=True)
                free *= (config.clamp * size / length.clamp_min(1e-12)).clamp_max(1.0)
        found = wide(h + free.detach() * unit)
        z = z if z.numel() else found.new_empty(len(asked), found.shape[1])
        z[index] = found
    progress.finish()
    return z


def _add_at(stream: Tensor, *, rows: Tensor, last: Tensor, offset: Tensor) -> Tensor:
    return stream.index_put((rows, last), offset.to(stream.dtype), accumulate=True)


@torch.no_grad()
def read(
    model: LanguageModel, asked: Sequence[Window], writer: Writer, top: int, config: UniEraseConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys [n, d_in], writes before any norm [n, d_out], stream after block `top` [n, d]) at each prompt's end."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))

    found: list[list[Tensor]] = [[], [], []]
    order: list[int] = []
    handle = writer.module.register_forward_hook(hook)
    try:
        for index, b, last in _in_batches(model, asked, config.batch):
            stream = model.capture(b.ids, [top], b.attention_mask)[top]
            for kept, t in zip(found, (*seen.pop(), stream)):
                kept.append(wide(t[torch.arange(len(last), device=t.device), last]))
            order += index
    finally:
        handle.remove()
    back = torch.tensor(order).argsort()
    k, y, h = (torch.cat(f)[back.to(f[0].device)] for f in found)
    if not (k.isfinite().all() and h.isfinite().all()):
        raise NonFiniteError(f"{model.name}: NaN or infinity in the activations of block {writer.block}")
    return k, y, h


def before_norm(writer: Writer, y: Tensor, change: Tensor) -> Tensor:
    """What to add to the matrix's output y [n, d] so that the stream gets `change` [n, d] more.

    Behind a norm with gain g the stream gets g ⊙ y/rms(y). Adding rms(y)/g ⊙ change turns that write into the
    direction of the old one plus `change`; its length stays with the norm, so that the change is met in
    direction only. The next block's residual is measured again.
    """
    if writer.post_scale is None:
        return change
    rms = y.pow(2).mean(-1, keepdim=True).sqrt()
    return change * rms / writer.post_scale.to(change)


def new_delta(writer: Writer, left: Tensor, right: Tensor) -> Delta:
    """ΔW = left [d_out, n] @ right [n, d_in], as factors where these are smaller."""
    n, device = len(right), writer.weight.device
    if n * (writer.d_out + writer.d_in) < writer.d_out * writer.d_in:
        return Delta(writer, nn.Parameter(right.float().to(device)), left.float().to(device))
    return Delta(writer, nn.Parameter((left @ right).float().to(device)), None)


@torch.no_grad()
def share_next(model: LanguageModel, asked: Sequence[Window], config: UniEraseConfig) -> float:
    """Share of the prompts after which ⟨UNL⟩ is the most likely token."""
    at, hits = token_id(model, config.token), 0
    assert at is not None
    for _, b, last in _in_batches(model, asked, config.batch):
        logits = model.logits(b.ids, b.attention_mask)[torch.arange(len(last), device=last.device), last]
        hits += int(logits.argmax(-1).eq(at).sum())
    return hits / len(asked)


def _in_batches(model: LanguageModel, asked: Sequence[Window], size: int) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """(indices, batch on the device, last positions [b]) over prompts of similar length."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    for i in range(0, len(order), size):
        index = order[i : i + size]
        b = collate([asked[j] for j in index], model.pad_id).to(model.device)
        yield index, b, b.attention_mask.sum(-1) - 1
