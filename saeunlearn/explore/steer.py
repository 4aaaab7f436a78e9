"""Steering: chosen SAE features are clamped or scaled while a model reads and writes, h' = h + dec(z') − dec(z).

It is a guard of mode `steer`, so what is seen here can be saved as an Erasure, evaluated and exported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..deploy.guard import RULES
from ..erasure import Erasure
from ..errors import ConfigError
from ..guards import Guard, guard_of
from ..models import LanguageModel
from .compare import NEW_TOKENS, changes, look_at
from .opened import ORIGINAL, OpenedRun

Choice = Mapping[int, Mapping[str, float]]
"""{feature: {"clamp": value} | {"scale": factor}}: z' = value at every position, or factor·z."""


@torch.no_grad()
def steer_view(
    run: OpenedRun, layer: int, choice: Choice, prompt: str, max_new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """The original with and without these features changed after block `layer`.

        {"prompt", "layer", "tokens": [str], "original": str, "steered": str, "loss": {"original", "steered": [None,
         then nats of each token of the prompt]}, "features", "residual": as in `compare_view`}

    The first position (BOS, or the attention sink in its place) is never changed. Raises ConfigError for a bad choice
    or prompt, SelectionError for a layer without SAE, SAEMismatchError for an SAE that no guard can be made from.
    """
    with run.edited(ORIGINAL) as model:
        before = look_at(run, model, prompt, (), max_new_tokens)
        with steering(run, layer, choice):
            after = look_at(run, model, prompt, (), max_new_tokens)
    return {
        "prompt": prompt, "layer": layer, "tokens": before.view["tokens"], "original": before.view["generated"],
        "steered": after.view["generated"], "loss": {"original": before.view["loss"], "steered": after.view["loss"]},
        **changes(run, before, after),
    }  # fmt: skip


@contextlib.contextmanager
def steering(run: OpenedRun, layer: int, choice: Choice) -> Iterator[LanguageModel]:
    """Within the context the original has these features changed after block `layer`, and no one else uses it.

    Raises as `steer_view` does.
    """
    guard = steering_guard(run, layer, choice)
    with run.edited(ORIGINAL) as model:
        undo = guard.apply(model)
        try:
            yield model
        finally:
            undo()


def save_guard(run: OpenedRun, layer: int, choice: Choice, out: str | Path) -> Erasure:
    """An Erasure that does what `steer_view` shows, written to `out`. Raises as that does, and ErasureError."""
    guard = steering_guard(run, layer, choice)
    with run.edited(ORIGINAL) as model:
        erasure = Erasure.create(
            model, [guard], method="steer", config={"layer": layer, "rules": guard.runtime.spec["rules"]},
            seed=run.config.seed, forget_fingerprint=run.forget.fingerprint(),
            retain_fingerprint=run.retain.fingerprint(),
        )  # fmt: skip
    erasure.save(out)
    return erasure


def steering_guard(run: OpenedRun, layer: int, choice: Choice) -> Guard:
    """The guard of a choice, features in ascending order."""
    sae = run.sae(layer)
    if not choice:
        raise ConfigError("choose at least one feature to steer")
    rules = []
    for feature, rule in sorted(choice.items()):
        if not 0 <= feature < sae.cfg.d_sae:
            raise ConfigError(f"the SAE of layer {layer} has features 0 … {sae.cfg.d_sae - 1}, not {feature}")
        if len(rule) != 1 or not set(rule) <= set(RULES):
            raise ConfigError(f"feature {feature}: give either clamp or scale, not {dict(rule)}")
        ((name, value),) = rule.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"feature {feature}: {name} must be a finite number, not {value!r}")
        rules.append({name: float(value)})
    return guard_of(sae, layer, sorted(choice), mode="steer", rules=rules)
