"""SSPU: SAE-guided subspace projection unlearning (Wang et al., EMNLP 2025, arXiv 2505.24428).

The paper's three stages are known, its formulas are reconstructed: forget activations at layer l are
driven towards a control vector in the irrelevant subspace, retain activations are kept, and the weight update is
confined to the relevant subspace: softly by a penalty (`form="soft"`), or exactly, W = W₀ + U_rel B (`form="hard"`,
ours). With `gated` (ours) the forget loss acts only where the relevant features fire, and the other positions of
the forget texts are held like retain text. Ours too: BOS is held; a forget position whose whole prefix begins a retain
text as well is never pushed; and a copy of the retain batch with some tokens exchanged is held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from ..corpus import Corpus, Window, endless, refuse_overlap, windows
from ..erasure import Erasure
from ..errors import ConfigError, ModelError
from ..features.gate import topic_votes
from ..features.selection import ProbeResult, Selection, check_selection
from ..features.subspace import orthonormal_basis, subspaces
from ..models import LanguageModel, Writer
from ..progress import Progress
from ..training import one_cycle
from ..updates import Rule, make_update
from .batches import known, shared_prefixes, stacked, with_swapped_tokens
from .budget import Budget, some
from .deltas import Delta, attached, frozen, new_deltas
from .trainable import rms


@dataclass(frozen=True)
class SSPUConfig:
    """Settings of SSPU. Losses are relative to the squared norm of each original activation, so that the settings
    carry over between models."""

    form: Literal["hard", "soft"] = "hard"  # ΔW = U_rel B exactly, or a penalty on what lies outside
    gated: bool = True  # forget loss only where relevant features fire (paper: everywhere)
    basis: Literal["relevant", "random_rows", "random_basis"] = "relevant"  # the last two are controls
    target: Literal["relevant", "irrelevant"] = "relevant"  # subspace of the control vector (paper: irrelevant)
    blocks: int = 3  # trained blocks l−blocks+1 … l (RMU and the paper: 3)
    attention: bool = False  # train attention output matrices too (paper: MLP only)
    gamma: float = 2.0  # ‖c‖ relative to the norm of the activation that is steered
    alpha: float = 10.0  # weight of keeping retain activations
    lam: float = 0.1  # soft form: weight of ‖(I − P_rel)ΔW‖² relative to ‖W₀‖²
    lr: float = 0.1  # AdamW step relative to the root mean square of each trained matrix
    swapped: float = 0.2  # share of exchanged tokens in a second, held copy of each retain batch; 0: no copy
    steps: int = 250
    batch: int = 16  # forget windows and retain windows a step
    max_length: int = 256  # tokens in a training window
    max_retain_rise: float = 0.01  # relative rise of the loss on held-out retain records that the result keeps to
    max_other_rise: float = 0.02  # gated: the same for the words of forget texts that are not about the topic
    check_every: int = 25  # steps between checks of the budget
    update: Rule = "plain"  # or restricted: gradients that do not hurt the other loss (arXiv 2412.07808)
    precondition: bool = True  # restricted: measure by a running mean of squared gradients, as Adam, not by plain ones


class SSPU:
    """The method object; see the module's docstring."""

    name = "sspu"
    Config = SSPUConfig
    needs = frozenset({"saes", "selection"})
    kind: Literal["weights"] = "weights"
    changes = "MLP output matrices of a few blocks, inside the span of the relevant features"
    paper = "Wang et al., EMNLP 2025, arXiv 2505.24428; hard form and gate: ours"
    cost = "trains up to the chosen layer; probe runs at every shortlisted layer"

    def check(self, model: LanguageModel, config: SSPUConfig) -> None:
        check_config(config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: SSPUConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """Train the update and return it; the model is unchanged.

        Forget loss: the forget texts' non-BOS positions (gated: those with an open gate), but none whose whole
        prefix begins a retain text. Retain loss: all other positions, BOS included.

        Raises ConfigError for bad settings, OverlapError, SelectionError for a foreign selection,
        NonFiniteError when a loss is not finite, Cancelled.
        """
        if selection is None:
            raise ConfigError("sspu needs a selection (saeunlearn select)")
        refuse_overlap(forget, retain)
        if not math.isfinite(config.max_retain_rise):
            raise ConfigError("max_retain_rise must be finite: without a budget a run can destroy the model")
        run = prepare(model, forget, retain, config, selection, saes, seed)
        losses = fit(run, progress)
        extra = {"budget": settle(run), "subspace": subspace_report(run)}
        return Erasure.create(
            model, [d.part() for d in run.deltas], method=self.name, config=asdict(config), seed=seed,
            forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(),
            selection=selection.to_dict(), losses=losses, extra=extra,
        )  # fmt: skip


@dataclass
class SSPURun:
    """Everything that the steps of one run share."""

    model: LanguageModel
    config: SSPUConfig
    selection: Selection
    sae: Any
    forget: list[Window]
    retain: list[Window]
    deltas: list[Delta]
    u_rel: Tensor  # [d, r] float32: the span that ΔW is confined to
    u_irr: Tensor  # [d, q]
    direction: Tensor  # u [d], the unit control direction; c = γ‖h‖u
    budget: Budget
    prefixes: frozenset[int]  # that forget and retain windows share
    seed: int


def prepare(model: LanguageModel, forget: Corpus, retain: Corpus, config: SSPUConfig, selection: Selection,
            saes: Mapping[int, Any], seed: int) -> SSPURun:  # fmt: skip
    """Check everything and set the run up; nothing long happens here."""
    check_config(config)
    w_dec = check_selection(selection, model, saes)
    layer, device = selection.layer, model.device
    rows = control_rows(w_dec, selection, config.basis, seed)
    u_rel, u_irr = subspaces(rows, list(range(selection.k)), list(range(selection.k, len(rows))))
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(model.d_model, generator=generator, dtype=torch.float64)
    span = u_irr if config.target == "irrelevant" else u_rel
    u = span @ (span.T @ r)
    blocks = list(range(max(0, layer - config.blocks + 1), layer + 1))
    writers = model.writers(blocks, ("mlp", "attn") if config.attention else ("mlp",))
    bases = [writer_basis(w, u_rel) if config.form == "hard" else None for w in writers]
    train_part, held = retain.split(0.2, seed)
    f_items, r_items = (windows(c, model, config.max_length) for c in (forget, train_part))
    budget = Budget(model)
    budget.watch("retain", some(windows(held, model, config.max_length), seed), config.max_retain_rise)
    if config.gated:
        sample = some(f_items, seed)
        votes = topic_votes(model, saes, selection.gates, sample)
        budget.watch("other", sample, config.max_other_rise, [v == 0 for v in votes])
    return SSPURun(
        model=model, config=config, selection=selection, sae=saes[layer], forget=f_items, retain=r_items,
        prefixes=shared_prefixes(f_items, r_items), deltas=new_deltas(writers, bases),
        u_rel=u_rel.float().to(device), u_irr=u_irr.float().to(device), direction=(u / u.norm()).float().to(device),
        budget=budget, seed=seed,
    )  # fmt: skip


def check_config(config: SSPUConfig) -> None:
    """Raises ConfigError naming the setting that is out of range."""
    kinds = get_type_hints(SSPUConfig)
    for name in ("form", "basis", "target", "update"):
        if getattr(config, name) not in (options := get_args(kinds[name])):
            raise ConfigError(f"unknown {name} {getattr(config, name)!r}; use {' or '.join(options)}")
    for name in ("steps", "batch", "blocks", "check_every", "gamma", "lr", "max_retain_rise",
                 "max_other_rise"):  # fmt: skip
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    for name in ("alpha", "lam"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must not be negative, not {getattr(config, name)}")
    if not 0 <= config.swapped < 1:
        raise ConfigError(f"swapped is a share of tokens from 0 to below 1, not {config.swapped}")


def control_rows(w_dec: Tensor, selection: Selection, basis: str, seed: int) -> Tensor:
    """[K + irrelevant, d]: the decoder rows of the selection, or the same number of random ones (the controls)."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = len(selection.relevant) + len(selection.irrelevant)
    if basis == "relevant":
        return w_dec[selection.relevant + selection.irrelevant]
    if basis == "random_rows":
        return w_dec[torch.randperm(w_dec.shape[0], generator=generator)[:n].to(w_dec.device)]
    return torch.randn(n, w_dec.shape[1], generator=generator)


def writer_basis(writer: Writer, u_rel: Tensor) -> Tensor:
    """Basis [d_out, r] in which ΔW of this matrix may move so that what reaches the stream stays in U_rel.

    Behind a post-norm with gain g the stream sees g ⊙ (ΔW x), up to the norm's own scaling: the basis is that of
    diag(1/g) U_rel. Raises ModelError where a gain is zero.
    """
    if writer.post_scale is None:
        return u_rel
    g = writer.post_scale.double().cpu()
    if (g.abs() < 1e-6).any():
        raise ModelError(f"the norm behind {writer.name} has gains of zero: no update there can stay in a subspace")
    return orthonormal_basis((u_rel / g[:, None]).T)


def fit(run: SSPURun, progress: Progress) -> list[dict[str, float]]:
    """Minimise E ‖h − γ‖h⁰‖u‖²/‖h⁰‖² + αE ‖h − h⁰‖²/‖h⁰‖² (soft: + λ‖(I − P_rel)ΔW‖²/‖W₀‖²).

    The budget steers α and stops a run that ruins the model.
    """
    cfg, model, layer = run.config, run.model, run.selection.layer
    sizes = [rms(d.writer.weight) for d in run.deltas]
    groups: list[dict[str, Any]] = [
        {"params": [d.free], "lr": cfg.lr * s, "peak": cfg.lr * s} for d, s in zip(run.deltas, sizes)
    ]
    update = make_update(cfg.update, groups, cfg.precondition, joint=True)
    w0 = sum(float(d.writer.weight.detach().float().pow(2).sum()) for d in run.deltas)
    f_batches = endless(run.forget, model.pad_id, cfg.batch, run.seed)
    r_batches = endless(run.retain, model.pad_id, cfg.batch, run.seed + 1)
    swaps = torch.Generator().manual_seed(run.seed)
    history: list[dict[str, float]] = []
    progress.start(f"SSPU ({cfg.form}) at layer {layer}", cfg.steps)
    for step in range(cfg.steps):
        for group in groups:
            group["lr"] = group["peak"] * one_cycle(step, cfg.steps, 0.05)
        f, r = next(f_batches), next(r_batches)
        if cfg.swapped > 0:
            r = stacked(r, with_swapped_tokens(r, cfg.swapped, swaps), model.pad_id)
        both = stacked(f, r, model.pad_id).to(model.device)
        with torch.no_grad():
            before = model.capture(both.ids, [layer], both.attention_mask)[layer].float()
        with frozen(model), attached(run.deltas):
            after = model.capture(both.ids, [layer], both.attention_mask)[layer].float()
        is_forget = torch.zeros_like(both.mask)
        is_forget[: len(f.ids)] = True
        push = both.mask & is_forget & ~known(both, run.prefixes)
        if cfg.gated:
            push &= run.selection.gate.open(run.sae, before)
        # BOS is held too: what a run did to this attention sink would reach every position of every text.
        hold = both.attention_mask.bool() & ~push
        zero = after.sum() * 0.0
        # Relative to each position's own norm: the blocks above normalise it away, and a few positions with a
        # huge norm (attention sinks, sentence starts) would otherwise be all that the loss sees.
        size = before.norm(dim=-1, keepdim=True)
        toward = (after - cfg.gamma * size * run.direction) / size
        moved = (after - before) / size
        forget_loss = toward[push].pow(2).sum(-1).mean() if push.any() else zero
        retain_loss = moved[hold].pow(2).sum(-1).mean() if hold.any() else zero
        kept = cfg.alpha * run.budget.factor * retain_loss
        if cfg.form == "soft":
            outside = sum((outside_part(d, run.u_rel).pow(2).sum() for d in run.deltas), start=zero)
            kept = kept + cfg.lam * outside / w0
        update(partial(_given, forget_loss), partial(_given, kept))
        losses = {"loss": forget_loss + kept, "forget": forget_loss, "retain": retain_loss}
        row = {"step": step, **{name: value.item() for name, value in losses.items()}}
        row |= stream_report(run, moved.detach()[push])
        if (step + 1) % cfg.check_every == 0 or step + 1 == cfg.steps:
            rises = run.budget.check(partial(attached, run.deltas))
            row |= {f"{name}_rise": rise for name, rise in rises.items() if math.isfinite(rise)}
        history.append(row)
        figures = {k: v for k, v in row.items() if k == "loss" or k.endswith("_rise")}
        progress.step(1, **figures)
        if run.budget.spent:
            break
    progress.finish(**{k: v for k, v in history[-1].items() if k == "forget" or k.endswith("_rise")})
    return history


def _given(loss: Tensor) -> Tensor:
    return loss


@torch.no_grad()
def settle(run: SSPURun) -> dict[str, float]:
    """Scale the deltas to the strength that the budget allows, and say what that costs. Raises ConfigError."""
    said = run.budget.settle(partial(attached, run.deltas))
    for d in run.deltas:
        d.free.mul_(said["scale"])
    return said


def outside_part(delta: Delta, u_rel: Tensor) -> Tensor:
    """(I − P_rel) g ⊙ ΔW: what the update writes outside the relevant subspace [d, d_in]; g is the post-norm gain."""
    write = delta.matrix()
    if delta.writer.post_scale is not None:
        write = delta.writer.post_scale[:, None] * write
    return write - u_rel @ (u_rel.T @ write)


def stream_report(run: SSPURun, dh: Tensor) -> dict[str, float]:
    """Mean ‖P_rel Δh‖, ‖P_irr Δh‖ (of the relative change Δh/‖h‖) and ‖(I − P_rel)Δh‖/‖Δh‖ where the loss pushed."""
    if not len(dh):
        return {}
    rel, irr = dh @ run.u_rel, dh @ run.u_irr
    total = dh.pow(2).sum()
    outside = (total - rel.pow(2).sum()).clamp_min(0)
    return {
        "p_rel_dh": float(rel.norm(dim=-1).mean()),
        "p_irr_dh": float(irr.norm(dim=-1).mean()),
        "outside_dh": float((outside / total.clamp_min(1e-30)).sqrt()),
        "outside_dw": outside_share(run),
    }


@torch.no_grad()
def outside_share(run: SSPURun) -> float:
    """‖(I − P_rel)ΔW‖ / ‖ΔW‖ over all trained matrices (what they write)."""
    out = sum(float(outside_part(d, run.u_rel).double().pow(2).sum()) for d in run.deltas)
    scales = [1.0 if d.writer.post_scale is None else d.writer.post_scale[:, None] for d in run.deltas]
    total = sum(float((s * d.matrix()).double().pow(2).sum()) for d, s in zip(run.deltas, scales))
    return math.sqrt(out / total) if total > 0 else 0.0


def subspace_report(run: SSPURun) -> dict[str, Any]:
    """What the manifest says about the subspaces."""
    d = run.model.d_model
    return {
        "k_over_d": run.selection.k / d, "rank_relevant": run.u_rel.shape[1], "rank_irrelevant": run.u_irr.shape[1],
        "outside_dw": outside_share(run), "blocks": [x.writer.block for x in run.deltas],
    }  # fmt: skip


PROBE_STEPS = 30  # at least
PROBE_SHARE = 0.2  # of the steps of a whole run; shorter probes rank layers by their transients
PROBE_SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


def probe_layer(
    model: LanguageModel,
    forget: Corpus,
    retain: Corpus,
    config: SSPUConfig,
    candidate: Selection,
    saes: Mapping[int, Any],
    seed: int,
    progress: Progress,
) -> ProbeResult:
    """A short run at the candidate's layer: how much forgetting does the retention budget buy there?

    The trained update is scaled, which gives a whole curve of forgetting against retention for a few forward
    passes; the forget rise is read off where the curve meets the budget. In gated runs it is that of the topic's words.
    """
    steps = max(PROBE_STEPS, round(PROBE_SHARE * config.steps))
    short = replace(config, steps=steps, check_every=steps, max_retain_rise=math.inf, max_other_rise=math.inf)
    run = prepare(model, forget, retain, short, candidate, saes, seed)
    fit(run, progress)
    sample = some(run.forget, seed)
    topic = [v >= 0.5 for v in topic_votes(model, saes, candidate.gates, sample)] if config.gated else None
    run.budget.watch("forget", sample, math.inf, topic)
    if "forget" not in run.budget.watches:  # the gates are open nowhere
        return ProbeResult(candidate.layer, 0.0, [])
    base = run.budget.watches["forget"].base
    curve: list[tuple[float, float, float]] = []
    for s in PROBE_SCALES:
        rises = run.budget.measure_rises(partial(attached, run.deltas), s)
        if not all(map(math.isfinite, rises.values())):
            break
        cost = rises["retain"]
        if "other" in rises:  # in units of the retain limit
            cost = max(cost, rises["other"] * config.max_retain_rise / config.max_other_rise)
        curve.append((s, base * rises["forget"], cost))
    return ProbeResult(candidate.layer, read_off(curve, config.max_retain_rise), curve)


def read_off(curve: Sequence[tuple[float, float, float]], limit: float) -> float:
    """Forget rise where the curve of (scale, forget rise, retain rise) points first meets `limit`, interpolated.

    A curve that never meets it gives its last forget rise.
    """
    last = (0.0, 0.0)
    for _, f, r in curve:
        if r > limit:
            share = (limit - last[1]) / (r - last[1]) if r > last[1] else 0.0
            return last[0] + max(0.0, share) * (f - last[0])
        last = (f, r)
    return last[0]
