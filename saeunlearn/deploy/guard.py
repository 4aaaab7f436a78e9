"""The runtime of a guard: SAE features are clamped in the residual stream after one block, weights stay as they are.

    h' = h + Σ_{j∈S} (z'_j − z_j) d_j      (= dec(z') + (h − dec(z)): the SAE's error term is kept)

Modes: `clamp` (arXiv 2410.19278), `conditional` (2503.11127), `dsg` (2504.08192), `steer`; see GuardRuntime.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .layout import DeployError, find_blocks

# What each mode's gate needs in the spec, and what each encoder needs besides `encoder`, `b_in` and `directions`.
GATES = {"clamp": None, "conditional": "min_active", "dsg": "threshold", "steer": None}
RULES = ("clamp", "scale")
ENCODERS = {"jumprelu": ("bias", "threshold"), "topk": ("bias",), "gated": ("b_gate", "b_mag", "gain")}
_HISTORY = "saeunlearn_guards"  # attribute of a KV cache: {guard's key: active positions so far}
_KEYS = itertools.count()


class GuardRuntime:
    """Encoder rows, decoder directions and gate of one guard.

    `spec`: `layer` (edits the output of this block), `features` (S, n indices), `encoder`, `mode`, `strength`,
    `min_active` or `threshold` as the mode needs, `k` for topk; for steer instead of `strength` `rules`, one for each
    feature: {"clamp": value} or {"scale": factor}.
    `tensors` (float32): `b_in` [d] is subtracted from h; `directions` [n, d]; `encoder` [n, d] (topk: [m, d]) with
    `bias`, and for jumprelu `threshold` (0: a plain ReLU), for gated `b_gate`, `b_mag`, `gain` (exp r_mag).

    Where z_j > 0 for j in S, z'_j = −strength
      clamp: at every position;
      conditional: where at least `min_active` features of S are active;
      dsg: where the share of active positions (some feature of S > 0) of the sequence up to here exceeds `threshold`;
      there every feature of S is set to −strength if one of them is active, as in the authors' code.
    steer: at every position z'_j = value, active or not (clamp), or factor·z_j (scale).
    The first real position (BOS, or the attention sink in its place) and padding are never edited or counted.
    Raises DeployError for a spec or tensors that are no guard.
    """

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.spec = dict(spec)
        self.tensors = dict(tensors)
        mode, encoder = spec.get("mode"), spec.get("encoder")
        if mode not in GATES or encoder not in ENCODERS:
            raise DeployError(f"a guard of mode {mode!r} with encoder {encoder!r} is unknown to this version")
        gate = GATES[mode]
        for name in ("layer", *([] if mode == "steer" else ["strength"]), *([gate] if gate else [])):
            value = spec.get(name)
            if not isinstance(value, int if name == "layer" else int | float) or not math.isfinite(value):
                raise DeployError(f"a guard of mode {mode} needs a finite {name}, not {value!r}")
        features = spec.get("features")
        if not isinstance(features, list) or not features or not all(isinstance(j, int) for j in features):
            raise DeployError(f"a guard needs a list of features to clamp, not {features!r}")
        if mode == "steer":
            _check_rules(spec.get("rules"), len(features))
        wanted = {"b_in", "directions", "encoder", *ENCODERS[encoder]}
        if self.tensors.keys() != wanted:
            raise DeployError(f"a guard with encoder {encoder} holds {sorted(wanted)}, not {sorted(self.tensors)}")
        n, d = len(features), self.d_model
        rows = self.tensors["encoder"].shape[0]
        shapes = {"b_in": (d,), "directions": (n, d), "encoder": (rows, d)}
        shapes |= {name: (rows,) for name in ENCODERS[encoder]}
        fits = all(tuple(self.tensors[name].shape) == shape for name, shape in shapes.items())
        if not fits or (rows <= max(features) if encoder == "topk" else rows != n):
            found = {name: list(t.shape) for name, t in self.tensors.items()}
            raise DeployError(f"the tensors of a guard of {n} features have shapes that do not fit together: {found}")
        if encoder == "topk" and not 1 <= spec.get("k", 0) <= rows:
            raise DeployError(f"a topk guard needs k between 1 and {rows}, not {spec.get('k')}")

    @property
    def layer(self) -> int:
        return self.spec["layer"]

    @property
    def d_model(self) -> int:
        return self.tensors["b_in"].numel()

    def to(self, device: torch.device) -> GuardRuntime:
        return GuardRuntime(self.spec, {n: t.to(device) for n, t in self.tensors.items()})

    def encode(self, h: Tensor) -> Tensor:
        """z_j [..., n] (float32) of the guard's features for a stream h [..., d]."""
        t, kind = self.tensors, self.spec["encoder"]
        pre = linear(h.float() - t["b_in"], t["encoder"])
        if kind == "gated":
            return (pre + t["b_gate"] > 0) * (pre * t["gain"] + t["b_mag"]).relu()
        pre = pre + t["bias"]
        if kind == "jumprelu":
            return pre.relu() * (pre > t["threshold"])
        top, where = torch.topk(pre, self.spec["k"], dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, where, top.relu())[..., self.spec["features"]]

    def edit(self, h: Tensor, counted: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(h', active positions [batch, past + position]) of a stream h [batch, position, d].

        `counted` (bool [batch, past + position]): neither padding nor first, for the past positions too. `before`:
        the active positions of the past, which dsg needs; None where there is no past.
        """
        z = self.encode(h)
        on, now = z > 0, counted[:, counted.shape[1] - h.shape[1] :]
        active = on.any(-1) & now
        history = active if before is None else torch.cat([before, active], 1)
        to: float | Tensor = -self.spec.get("strength", 0.0)
        if self.spec["mode"] == "steer":
            where = now[..., None].expand_as(on)
            values = [rule.get("clamp", 0.0) for rule in self.spec["rules"]]
            factors = [rule.get("scale", 0.0) for rule in self.spec["rules"]]
            to = z.new_tensor(values) + z.new_tensor(factors) * z
        elif self.spec["mode"] == "clamp":
            where = on & now[..., None]
        elif self.spec["mode"] == "conditional":
            where = on & (now & (on.sum(-1) >= self.spec["min_active"]))[..., None]
        else:
            rate = running_rate(history, counted)[:, -h.shape[1] :]
            where = (active & (rate > self.spec["threshold"]))[..., None].expand_as(on)
        change = torch.where(where, to - z, 0.0) @ self.tensors["directions"]
        edited = (h.to(torch.promote_types(h.dtype, torch.float32)) + change).to(h.dtype)
        return torch.where(where.any(-1, keepdim=True), edited, h), history

    def check(self, model: Any) -> None:
        """Raises DeployError where the guard does not fit a Hugging Face model."""
        _, blocks = find_blocks(model)
        width = model.config.get_text_config().hidden_size
        if not 0 <= self.layer < len(blocks) or width != self.d_model:
            raise DeployError(
                f"the guard edits block {self.layer} of a model of width {self.d_model}; this one has "
                f"{len(blocks)} blocks of width {width}"
            )

    def attach(self, model: Any) -> Callable[[], None]:
        """Hook the guard into a Hugging Face model; the result takes it off. Raises DeployError as `check` does."""
        self.check(model)
        backbone, blocks = find_blocks(model)
        hooks = _Hooks(self)
        handles = [
            backbone.register_forward_pre_hook(hooks.before, with_kwargs=True),
            blocks[self.layer].register_forward_hook(hooks.edit),
        ]
        if self.spec["mode"] == "dsg":
            handles.append(backbone.register_forward_hook(hooks.after, with_kwargs=True))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove


def _check_rules(rules: Any, n: int) -> None:
    """Raises DeployError unless these are the rules of n features."""
    for rule in rules if isinstance(rules, list) else [None]:
        values = list(rule.values()) if isinstance(rule, dict) and len(rule) == 1 and set(rule) <= set(RULES) else []
        if not values or not isinstance(values[0], int | float) or not math.isfinite(values[0]):
            raise DeployError(f"a steering rule is one of {' or '.join(RULES)} with a finite number, not {rule!r}")
    if len(rules) != n:
        raise DeployError(f"{n} features need as many steering rules, not {len(rules)}")


def running_rate(active: Tensor, counted: Tensor) -> Tensor:
    """Share of active positions among the counted ones up to and with each, [batch, position]; float32."""
    return active.cumsum(1).float() / counted.cumsum(1).clamp_min(1).float()


class _Hooks:
    """A guard on one model. What dsg saw of a sequence is kept on its KV cache, so that it lives as long as that."""

    def __init__(self, runtime: GuardRuntime) -> None:
        self.runtime = runtime
        self.key = next(_KEYS)
        self.counted: Tensor | None = None
        self.past: Tensor | None = None
        self.history: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which positions of this pass count, and what was active before it."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        batch, new = inputs.shape[:2]
        done = 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            real = torch.ones(batch, done + new, dtype=torch.bool, device=inputs.device)
        elif isinstance(mask, Tensor) and mask.shape == (batch, done + new):
            real = mask.bool()
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise DeployError(f"a guard reads an attention mask of shape {[batch, done + new]}, not {shape}")
        self.counted = real & (real.cumsum(1) > 1)
        self.past = None
        if done and self.runtime.spec["mode"] == "dsg":
            seen = getattr(cache, _HISTORY, {}).get(self.key)
            if seen is None or seen.shape[0] != batch or seen.shape[1] < done:
                raise DeployError("the guard did not see the beginning of this sequence: start it again, without cache")
            self.past = seen[:, :done]  # shorter than what was seen where the cache was cropped

    def edit(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        if self.counted is None:
            raise DeployError("a guarded block ran outside of its model")
        if self.runtime.tensors["b_in"].device != h.device:
            self.runtime = self.runtime.to(h.device)
        past = None if self.past is None else self.past.to(h.device)
        edited, self.history = self.runtime.edit(h, self.counted.to(h.device), past)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what was seen with the cache (which the model may have made itself)."""
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("past_key_values")
        if cache is not None:
            setattr(cache, _HISTORY, {**getattr(cache, _HISTORY, {}), self.key: self.history})
            for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
                setattr(cache, name, _refuse_reordering)


def _refuse_reordering(*_args: Any, **_kwargs: Any) -> None:
    raise DeployError("a dsg guard counts along each sequence, and beam search mixes them: use num_beams=1")
