"""Which weights of a whole model a method trains: all, those of the blocks, chosen ones, or a LoRA; in float32.

LoRA (PEFT) leaves the original at hand by switching it off, so no second copy is needed. Whole weights are trained in a
float32 copy of the model, which also serves as master weights where the model itself is bf16.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..corpus import Batch
from ..errors import ConfigError, ModelError
from ..models import LanguageModel, Writer
from ..parts import WeightDelta, base_parameters
from ..stored import parameter_key
from .budget import Edit
from .deltas import attached, frozen, new_deltas


@dataclass
class Trainable:
    """`net` computes with what is trained; within `original()` there is the model as it was.

    `sizes`: for each of `params`, the change of it that changes the weights behind it by their own root mean square.
    """

    net: LanguageModel
    params: list[nn.Parameter]
    sizes: list[float]
    original: Callable[[], contextlib.AbstractContextManager[LanguageModel]]
    parts: Callable[[], list[WeightDelta]]
    edit: Edit = lambda _scale: contextlib.nullcontext()

    def logits(self, batch: Batch) -> Tensor:
        """[batch, position, d_vocab] with a graph to `params`."""
        with self.edit(1.0):
            return self.net.logits(batch.ids, batch.attention_mask)

    @torch.no_grad()
    def original_logits(self, batch: Batch) -> Tensor:
        """The same of the model as it was, without a graph."""
        with self.original() as model:
            return model.logits(batch.ids, batch.attention_mask)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups whose steps are `lr` relative to the weights."""
        return [{"params": [p], "lr": lr * s, "peak": lr * s} for p, s in zip(self.params, self.sizes)]


def check_weights(model: LanguageModel, weights: str, rank: int) -> None:
    """Raises ConfigError for names that the model does not have and for ranks below 1."""
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    if hasattr(model.model, "peft_config"):
        raise ModelError(f"{model.name} carries a PEFT adapter: merge it first")
    for name in () if weights in ("all", "blocks", "lora") else weights.split(","):
        if not chosen(model, name):
            raise ConfigError(
                f"{model.name} has no weights named {name}; use all, blocks, lora, or names such as down_proj,o_proj"
            )


def chosen(model: LanguageModel, weights: str) -> list[str]:
    """Names of the parameters that `all`, `blocks` (their matrices) or a list of module names selects."""
    named = list(model.model.named_parameters())
    if weights == "blocks":
        inside = {id(p) for block in model.blocks for p in block.parameters() if p.ndim >= 2}
        return [n for n, p in named if id(p) in inside]
    return [n for n, _ in named if weights == "all" or set(n.split(".")) & set(weights.split(","))]


@contextlib.contextmanager
def trainable(model: LanguageModel, weights: str, rank: int, seed: int, modules: Sequence[str] | str | None = None
              ) -> Iterator[Trainable]:  # fmt: skip
    """`weights`: "all", "blocks", "lora", or the names of modules; the model is as before afterwards.

    A LoRA has that `rank`, alpha = rank, on `modules` ("all-linear": every matrix of the blocks; None: those that PEFT
    names for the architecture; query and value where they are matrices of their own).
    """
    if weights == "lora":
        with _lora(model, rank, seed, modules) as made:
            yield made
        return
    with whole(model, model.copy(), weights) as made:
        yield made


@contextlib.contextmanager
def whole(model: LanguageModel, net: LanguageModel, weights: str) -> Iterator[Trainable]:
    """The chosen parameters of `net`, a copy of the model that is used up; it may have been edited before."""
    net.model.float()
    names = set(chosen(model, weights))
    params, sizes, keys = [], [], []
    for name, p in net.model.named_parameters():
        p.requires_grad_(name in names)
        if name in names:
            params.append(p)
            sizes.append(max(rms(p), 1e-4))  # biases that are zero learn too
            keys.append(name)
    before = dict(model.model.named_parameters())

    def parts() -> list[WeightDelta]:
        changes = [(n, (p.detach() - before[n].detach().float())) for n, p in zip(keys, params)]
        return [WeightDelta(n, False, dense=c) for n, c in changes if bool(c.any())]

    yield Trainable(net, params, sizes, lambda: contextlib.nullcontext(model), parts)


@contextlib.contextmanager
def trainable_writers(model: LanguageModel, writers: Sequence[Writer], bases: Sequence[Tensor | None]
                      ) -> Iterator[Trainable]:  # fmt: skip
    """Matrices that write to the stream, whole (basis None) or as ΔW = basis @ B with basis [d_out, r] orthonormal."""
    deltas = new_deltas(writers, bases)
    sizes = [rms(w.weight) * (1.0 if b is None else (w.d_out / b.shape[1]) ** 0.5) for w, b in zip(writers, bases)]
    with frozen(model):
        yield Trainable(
            net=model, params=[d.free for d in deltas], sizes=sizes, original=lambda: contextlib.nullcontext(model),
            parts=lambda: [d.part() for d in deltas], edit=partial(attached, deltas),
        )  # fmt: skip


@contextlib.contextmanager
def _lora(model: LanguageModel, rank: int, seed: int, modules: Sequence[str] | str | None) -> Iterator[Trainable]:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    flags = [(p, p.requires_grad) for p in model.model.parameters()]
    named = modules if modules is None or isinstance(modules, str) else list(modules)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=named,
        fan_in_fan_out=model.writers([0])[0].transposed,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers; nothing for a user
                adapted: Any = get_peft_model(model.model, config)
        except ValueError as e:
            raise ConfigError(f"no LoRA for {model.name}: {e}") from e
    try:
        net = LanguageModel(adapted, model.tokenizer, model.name)
        layers: dict[str, Any] = {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)}
        params: list[nn.Parameter] = []
        sizes: list[float] = []
        for layer in layers.values():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = layer.get_base_layer().weight
            # ΔW = BA with B small at first: B's step for a ΔW as large as W.
            size = rms(weight) / (rms(down) * rank**0.5)
            params += [down, up]
            sizes += [size, size]

        def parts() -> list[WeightDelta]:
            out = []
            for name, m in layers.items():
                left = m.scaling["default"] * m.lora_B["default"].weight.detach()
                transposed = type(m.get_base_layer()).__name__ == "Conv1D"
                out.append(WeightDelta(f"{name}.weight", transposed, left, m.lora_A["default"].weight.detach()))
            return out

        @contextlib.contextmanager
        def original() -> Iterator[LanguageModel]:
            with adapted.disable_adapter():
                yield net

        yield Trainable(net, params, sizes, original, parts)
    finally:
        adapted.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(model.model):
                delattr(model.model, name)
        for p, flag in flags:
            p.requires_grad_(flag)


def rms(weight: Tensor) -> float:
    """Root mean square of all elements."""
    return float(weight.detach().float().pow(2).mean().sqrt())


@contextlib.contextmanager
def edited(model: LanguageModel, parts: Sequence[WeightDelta], scale: float) -> Iterator[None]:
    """Within the context the weights of the parts hold W + scale·ΔW; afterwards their old bits."""
    held = base_parameters(model)
    kept = [(held[parameter_key(p.name)], p) for p in parts]
    originals = [w.detach().clone() for w, _ in kept]
    try:
        with torch.no_grad():
            for (w, part), old in zip(kept, originals):
                change = part.delta().to(w.device)
                w.copy_(old.float() + scale * (change.T if part.transposed else change))
        yield
    finally:
        with torch.no_grad():
            for (w, _), old in zip(kept, originals):
                w.copy_(old)
