"""Direction ablation: project out of the stream what unlearning added to it on average (after arXiv 2409.18025).

d_l = mean(h_unlearned − h_original) over the positions of T's text,   h ← h − (h·d_l) d_l / ‖d_l‖²
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ...corpus import batches, windows
from ...models import LanguageModel
from .case import Case, NotApplicable, Try, Victim


def ablate(case: Case, victim: Victim) -> list[Try]:
    """At every layer together; in the full budget also at each alone. Raises NotApplicable for an unchanged stream."""
    found = directions(case, victim.model)
    if not found:
        raise NotApplicable("the stream is the original's at every layer: there is no direction to project out")
    choices = [sorted(found), *([[layer] for layer in sorted(found)] if case.budget.each_layer else [])]
    tries = []
    for layers in choices:
        with ablated(victim.model, {i: found[i] for i in layers}):
            tries.append(Try({"layers": layers}, case.score(victim.model).values))
    return tries


@torch.no_grad()
def directions(case: Case, model: LanguageModel) -> dict[int, Tensor]:
    """{l: unit vector [d_model]} for the layers at which the two streams differ."""
    layers = range(model.n_layers)
    total = {i: torch.zeros(model.d_model, dtype=torch.float64) for i in layers}
    items = windows(case.train, model)[: case.budget.windows]
    for batch in batches(items, model.pad_id):
        b = batch.to(model.device)
        now, before = (m.capture(b.ids, layers, b.attention_mask) for m in (model, case.original))
        for i in layers:
            total[i] += (now[i].double() - before[i].double())[b.mask].sum(0).cpu()
    return {i: (t / t.norm()).float() for i, t in total.items() if t.norm() > 0}


@contextlib.contextmanager
def ablated(model: LanguageModel, unit: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the context the stream has no part along `unit[l]` after block l."""

    def project(d: Tensor) -> Callable[[Tensor], Tensor]:
        d = d.to(model.device)
        return lambda h: (h.float() - (h.float() @ d)[..., None] * d).to(h.dtype)

    with model.patch({i: project(d) for i, d in unit.items()}):
        yield
