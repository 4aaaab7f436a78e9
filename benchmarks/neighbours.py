"""What else might take knowledge out for good: short forms of published ideas, and combinations, for `deep_erasure.py`.

Each function makes an Erasure from a world and a seed. Steps are chosen so that none costs more than about a fifth of
the oracle's training, which is measured and stands in the table.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sandbox_frontier import World
from torch import Tensor, nn

from saeunlearn.corpus import Batch, endless, windows
from saeunlearn.erasure import Erasure
from saeunlearn.healing import HealConfig, heal
from saeunlearn.methods import get_method
from saeunlearn.methods.objectives import distance
from saeunlearn.models import LanguageModel
from saeunlearn.options import settings_of
from saeunlearn.own_text import own_sentences
from saeunlearn.parts import WeightDelta
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import DEMO_SETTINGS
from saeunlearn.training import TrainConfig, next_token_loss, train

STATES = HealConfig.state_weight  # what is distilled follows the residual streams too, as overwriting does
FREE = 1e6  # a limit on the retain loss that is none
SUPPRESSING = {"weights": "blocks", "steps": 60, "max_retain_rise": FREE}  # of NPO, where something heals afterwards


def by_method(world: World, name: str, seed: int, model: LanguageModel | None = None, **settings: Any) -> Erasure:
    """A method with its defaults (SSPU with the settings of `saeunlearn demo`) and these settings."""
    method = get_method(name)
    given = {**(DEMO_SETTINGS if name == "sspu" else {}), **settings}
    return method.unlearn(
        model or world.model, world.forget, world.retain, seed=seed, progress=ConsoleProgress(),
        config=settings_of(method.Config, given, name),
        selection=world.case.selection(seed) if "selection" in method.needs else None,
        saes=world.saes if "saes" in method.needs else {},
    )  # fmt: skip


def healed(world: World, erasure: Erasure, seed: int, **settings: Any) -> Erasure:
    config = settings_of(HealConfig, settings, "healing")
    return heal(world.model, erasure, world.forget, world.retain, config, seed, ConsoleProgress())


def edited_by(model: LanguageModel, erasure: Erasure) -> LanguageModel:
    """A copy with the Erasure in its weights."""
    twin = model.copy()
    twin.model.float()
    erasure.apply(twin)
    return twin


def difference(world: World, edited: LanguageModel, name: str, seed: int) -> Erasure:
    """The Erasure that makes the world's model the edited one."""
    pairs = zip(world.model._base.named_parameters(), edited._base.parameters())
    parts = [WeightDelta(n, False, dense=p.detach() - old.detach()) for (n, old), p in pairs if not torch.equal(p, old)]
    return Erasure.create(
        world.model, parts, method=name, config={}, seed=seed, forget_fingerprint=world.forget.fingerprint(),
        retain_fingerprint=world.retain.fingerprint(), selection=None,
    )  # fmt: skip


def sentences(world: World, seed: int) -> Iterator[Batch]:
    """Batches of 32 sentences that the original wrote."""
    own = own_sentences(world.model, world.forget, world.retain, 3000, 32, seed, ConsoleProgress())
    return endless(windows(own, world.model), world.model.pad_id, 32, seed)


def distil(world: World, student: LanguageModel, teacher: LanguageModel, steps: int, seed: int) -> None:
    student.model.requires_grad_(True)
    plan = TrainConfig(steps=steps, lr=2e-3, weight_decay=0.0)
    train(student, sentences(world, seed), plan, ConsoleProgress(), "distilling", None,
          lambda b: distance(teacher, student, b, STATES))  # fmt: skip
    student.model.requires_grad_(False)


def noisy(model: LanguageModel, share: float, seed: int) -> LanguageModel:
    """A copy whose matrices are (1 − share) W + share · noise of W's own root mean square."""
    twin = model.copy()
    twin.model.float()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.model.parameters():
            if p.ndim >= 2:
                p.mul_(1 - share).add_(share * p.pow(2).mean().sqrt() / (1 - share) * torch.randn(p.shape, generator=g))
    return twin


def noise_and_retrain(world: World, seed: int, share: float = 0.6, steps: int = 280) -> Erasure:
    """Noise on the original, then distilled from it without forget text."""
    student = noisy(world.model, share, seed)
    distil(world, student, world.model, steps, seed)
    return difference(world, student, "noise-and-retrain", seed)


def undo(world: World, seed: int) -> Erasure:
    """UNDO (arXiv 2506.06278), short: suppress (NPO), noise on the suppressed model, distil from it."""
    suppressed = edited_by(world.model, by_method(world, "npo", seed, **SUPPRESSING))
    student = noisy(suppressed, 0.4, seed)
    distil(world, student, suppressed, 220, seed)
    return difference(world, student, "undo", seed)


def cycles(world: World, seed: int) -> Erasure:
    """Key erasure and healing, twice, each on the result of the one before."""
    model = world.model
    edited = model
    for turn in range(2):
        edited = edited_by(edited, by_method(world, "key-erasure", seed + turn, edited, lam=0.3, max_retain_rise=FREE))
        distil(world, edited, model, 110, seed + turn)
    return difference(world, edited, "cycles", seed)


def after(world: World, first: str, then: str, seed: int) -> Erasure:
    """Two methods one after the other: mild key erasure, shorter overwriting, others with their defaults."""
    settings: dict[str, dict[str, Any]] = {
        "key-erasure": {"lam": 0.1, "max_retain_rise": FREE}, "overwrite": {"steps": 310, "max_retain_rise": FREE},
    }  # fmt: skip
    edited = world.model
    for name in (first, then):
        edited = edited_by(edited, by_method(world, name, seed, edited, **settings.get(name, {})))
    return difference(world, edited, f"{first}, {then}", seed)


def tar(world: World, seed: int) -> Erasure:
    """Tamper-resistant training (TAR, arXiv 2408.00761), first order and short, after NPO.

    Each step: four steps of gradient descent on forget text, as an attacker would; the gradient of the entropy there,
    to be raised, together with that of KL to the original on its own sentences, at the weights before.
    """
    net = edited_by(world.model, by_method(world, "npo", seed, **SUPPRESSING))
    net.model.requires_grad_(True)
    params = list(net.model.parameters())
    optimiser = torch.optim.AdamW(params, lr=3e-4, weight_decay=0.0)
    attack = endless(windows(world.forget, world.model), world.model.pad_id, 16, seed)
    kept = sentences(world, seed)

    def run(b: Batch) -> Tensor:
        logits: Tensor = net.model(input_ids=b.ids, attention_mask=b.attention_mask, use_cache=False).logits
        return logits

    for _ in ConsoleProgress().over(range(60), "tamper-resistant training"):
        before = [p.detach().clone() for p in params]
        for b in itertools.islice(attack, 4):
            grads = torch.autograd.grad(next_token_loss(b, run(b)), params)
            with torch.no_grad():
                for p, g in zip(params, grads):
                    p.sub_(0.1 * g)
        b = next(attack)
        logp = run(b)[:, :-1][b.targets[:, 1:]].log_softmax(-1)
        against = torch.autograd.grad((logp.exp() * logp).sum(-1).mean(), params)
        with torch.no_grad():
            for p, old in zip(params, before):
                p.copy_(old)
        b = next(kept)
        optimiser.zero_grad()
        (4 * distance(world.model, net, b, STATES)).backward()
        for p, g in zip(params, against):
            p.grad = g if p.grad is None else p.grad + g
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
    net.model.requires_grad_(False)
    return difference(world, net, "tar", seed)


def value_edit(world: World, seed: int) -> Erasure:
    """After PISCES (arXiv 2505.22586): MLP value vectors lose what they write along relevant decoder directions.

    Of each block up to the selection's layer the tenth of the value vectors that lies most in their span.
    """
    selection = world.case.selection(seed)
    rows = world.saes[selection.layer].W_dec.detach()[selection.relevant].float()
    basis = torch.linalg.qr(rows.T)[0]
    net = world.model.copy()
    with torch.no_grad():
        for w in net.writers(range(selection.layer + 1), ("mlp",)):
            weight = w.weight.T if w.transposed else w.weight
            inside = basis @ (basis.T @ weight)
            share = inside.norm(dim=0) / weight.norm(dim=0)
            weight -= torch.where(share >= share.quantile(0.9), inside, 0.0)
    return difference(world, net, "value-edit", seed)


def blocks_healed(world: World, seed: int) -> Erasure:
    """Key erasure of all matrices at λ = 1, and healing."""
    return healed(world, by_method(world, "key-erasure", seed, lam=1.0, max_retain_rise=FREE), seed, lr=2e-3,
                  steps=270, max_return=0.9)  # fmt: skip


VARIANTS: dict[str, Callable[[World, int], Erasure]] = {
    "blocks-healed": blocks_healed, "cycles": cycles, "undo": undo, "tar": tar,
    "erased-first": lambda w, s: after(w, "key-erasure", "overwrite", s),
    "erased-npo": lambda w, s: after(w, "key-erasure", "npo", s),
    "sspu-erased": lambda w, s: after(w, "sspu", "key-erasure", s),
    "value-edit": value_edit, "noise-and-retrain": noise_and_retrain,
    "npo-healed": lambda w, s: healed(w, by_method(w, "npo", s, **SUPPRESSING), s, steps=150),
    **{f"noise-and-retrain-{n}": lambda w, s, n=n: noise_and_retrain(w, s, steps=n) for n in (70, 140, 560)},
    **{f"overwrite-{n}": lambda w, s, n=n: by_method(w, "overwrite", s, steps=n) for n in (115, 230, 920)},
    "overwrite-answers": lambda w, s: by_method(w, "overwrite", s, state_weight=0.0, retain_weight=3.0),
    "overwrite-unspread": lambda w, s: by_method(w, "overwrite", s, spread_weight=0.0),
}  # fmt: skip


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """{"units"}: tokens passed through any language model within the context, times three where a gradient follows."""
    found = {"units": 0}

    def hook(module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        if type(module).__name__.endswith("ForCausalLM"):
            found["units"] += kwargs["input_ids"].numel() * (3 if torch.is_grad_enabled() else 1)

    handle = nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
