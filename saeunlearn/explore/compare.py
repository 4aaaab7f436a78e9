"""One prompt through the original and its edits: what each says, what it holds on the way, and what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..corpus import Corpus, Record
from ..errors import ConfigError, NonFiniteError
from ..evaluation.metrics import answer_losses
from ..models import LanguageModel
from .opened import ORIGINAL, OpenedRun

LENS = 5  # tokens of the lens at each position
CHANGED = 10  # features that changed most, of each layer
NEW_TOKENS = 24


@dataclass(frozen=True)
class Look:
    """One model on one prompt: streams {layer: [position, d_model]} and logits [position, d_vocab], float32."""

    ids: list[int]
    streams: dict[int, Tensor]
    logits: Tensor
    view: dict[str, Any]


@torch.no_grad()
def compare_view(
    run: OpenedRun, prompt: str, names: Sequence[str], answers: Sequence[str] = (), layer: int | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """The original and these Erasures of the run on one prompt.

        {"prompt", "models": {"original" | name: {"tokens": [str], "generated": str,
         "answers": [{"text", "probability", "per_token"}], "loss": [None, then nats of each token],
         "lens": [{"layer", "tokens": [[{"token", "probability"}] of each position]}],
         "features": [{"layer", "feature", "before", "after"}], "residual": [{"layer", "relevant", "irrelevant",
         "other", "total"}]}}}

    Answers: probability of the answer after the prompt, and the geometric mean over its tokens. The lens of the last
    layer is the model's own output, its offsets included. Features: of each layer with an SAE (or of `layer`), the
    CHANGED whose mean over the prompt's positions but the first changed most in units of the mean ‖h‖, largest first.
    Residual: `residual_shares`. Both are empty for the original, and where an Erasure's new token changes what the
    prompt's tokens are. The model is held for one name at a time.
    Raises ConfigError for an unknown name or layer, an empty prompt or answer, or a prompt that does not fit.
    """
    for name in names:
        run.check_name(name)
    if layer is not None:
        run.sae(layer)
    before = look(run, ORIGINAL, prompt, answers, max_new_tokens)
    models = {ORIGINAL: before.view}
    for name in dict.fromkeys(n for n in names if n != ORIGINAL):
        after = look(run, name, prompt, answers, max_new_tokens)
        models[name] = {**after.view, **changes(run, before, after, layer)}
    return {"prompt": prompt, "models": models}


def look(run: OpenedRun, name: str, prompt: str, answers: Sequence[str], max_new_tokens: int) -> Look:
    """A model on a prompt, with Erasure `name` (or ORIGINAL) applied; `view` as in `compare_view`, without changes."""
    with run.edited(name) as model:
        return look_at(run, model, prompt, answers, max_new_tokens)


@torch.no_grad()
def look_at(run: OpenedRun, model: LanguageModel, prompt: str, answers: Sequence[str], max_new_tokens: int) -> Look:
    """The same of a model as it is now; the caller holds it."""
    ids = prompt_ids(model, prompt, max_new_tokens)
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(h: Tensor) -> Tensor:
            streams[layer] = h[0].float()
            return h

        return hook

    with model.patch({i: keep(i) for i in range(model.n_layers)}):
        logits = model.logits(torch.tensor([ids], device=model.device))[0]
    if not torch.isfinite(logits).all():
        raise NonFiniteError(f"{model.name} gives NaN or infinite logits on this prompt")
    loss = cross_entropy(logits[:-1], torch.tensor(ids[1:], device=logits.device), reduction="none")
    rows = {i: model.unembed(h) for i, h in streams.items()} | {model.n_layers - 1: logits}
    view = {
        "tokens": run.token_texts(ids, model),
        "generated": model.generate([prompt], max_new_tokens)[0],
        "answers": answer_probabilities(model, prompt, answers),
        "loss": [None, *loss.tolist()],
        "lens": [{"layer": i, "tokens": _most_probable(run, model, rows[i])} for i in sorted(rows)],
        "features": [],
        "residual": [],
    }
    return Look(ids, streams, logits, view)


def prompt_ids(model: LanguageModel, prompt: str, max_new_tokens: int) -> list[int]:
    """Token ids with BOS. Raises ConfigError for an empty prompt, or one that leaves no room to generate."""
    ids = model.tokenizer(prompt, add_special_tokens=False).input_ids
    room = model.max_length - max_new_tokens - 1
    if not prompt.strip() or max_new_tokens < 1:
        raise ConfigError("a prompt of at least one word and at least one new token are needed")
    if len(ids) > room:
        raise ConfigError(f"the prompt has {len(ids)} tokens; with {max_new_tokens} new ones at most {room} fit")
    bos = [] if model.bos_id is None else [model.bos_id]
    return [*bos, *ids]


def answer_probabilities(model: LanguageModel, prompt: str, answers: Sequence[str]) -> list[dict[str, Any]]:
    """{"text", "probability", "per_token"} of each answer, tokenised and scored as `saeunlearn evaluate` does."""
    if not answers:
        return []
    if not all(a.strip() for a in answers):
        raise ConfigError("an answer is empty")
    asked = Corpus(tuple(Record(question=prompt, answer=a) for a in answers), "answers")
    losses = [row.double() for row in answer_losses(model, asked)]
    return [{"text": a, "probability": math.exp(-float(x.sum())), "per_token": math.exp(-float(x.mean()))}
            for a, x in zip(answers, losses)]  # fmt: skip


def _most_probable(run: OpenedRun, model: LanguageModel, logits: Tensor) -> list[list[dict[str, Any]]]:
    values, ids = logits.softmax(-1).topk(min(LENS, logits.shape[-1]))
    return [[{"token": t, "probability": p} for t, p in zip(run.token_texts(row, model), ps)]
            for row, ps in zip(ids.tolist(), values.tolist())]  # fmt: skip


# --- changes -----------------------------------------------------------------------------------------------


def changes(run: OpenedRun, before: Look, after: Look, layer: int | None = None) -> dict[str, Any]:
    """{"features", "residual"} of `compare_view`."""
    if before.ids != after.ids:
        return {"features": [], "residual": []}
    features = []
    for i in sorted(run.saes) if layer is None else [layer]:
        features += changed_features(run, i, before.streams[i][1:], after.streams[i][1:])
    residual = [{"layer": i, **residual_shares(run, before.streams[i][1:], after.streams[i][1:])}
                for i in sorted(before.streams)]  # fmt: skip
    return {"features": sorted(features, key=lambda r: -r.pop("size")), "residual": residual}


def changed_features(run: OpenedRun, layer: int, before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """The CHANGED features of one layer whose mean over positions changed most, for streams [position, d_model]; `size`
    is the change in units of the mean ‖h‖ before."""
    if not len(before):
        return []
    sae = run.sae(layer)
    means = [sae.encode(h.to(sae.dtype)).float().mean(0) for h in (before, after)]
    size = (means[1] - means[0]).abs() / before.norm(dim=-1).mean()
    best = size.topk(min(CHANGED, len(size)))
    return [{"layer": layer, "feature": int(j), "before": float(means[0][j]), "after": float(means[1][j]),
             "size": float(s)} for s, j in zip(*best) if s > 0]  # fmt: skip


def residual_shares(run: OpenedRun, before: Tensor, after: Tensor) -> dict[str, float | None]:
    """How the change Δh of a stream [position, d_model] divides over the selection's subspaces.

    {"relevant": ‖U_relᵀ Δh‖² / ‖Δh‖², "irrelevant": ‖U_irrᵀ Δh‖² / ‖Δh‖², "other": the rest, "total": ‖Δh‖² / ‖h‖²},
    sums over positions. U_rel spans the relevant decoder rows of the SELECTION'S layer, U_irr what the irrelevant ones
    add to it. Blocks add to one stream, so these directions exist at every layer; but at another layer than the
    selection's a share says only how much of the change lies in the directions that carried the topic there, not that
    features of this layer carry it (its own SAE does: see the changed features). Later blocks also react to the change,
    in directions of their own, which is `other`. Shares are None where nothing changed or nothing was selected.
    """
    delta = (after - before).double()
    whole, size = float(delta.pow(2).sum()), float(before.double().pow(2).sum())
    bases = run.bases()
    out: dict[str, float | None] = {"relevant": None, "irrelevant": None, "other": None}
    if whole > 0 and bases is not None:
        shares = [float((delta @ u.to(delta)).pow(2).sum()) / whole for u in bases]
        out = {"relevant": shares[0], "irrelevant": shares[1], "other": max(0.0, 1 - sum(shares))}
    return {**out, "total": whole / size if size else 0.0}
