"""The parts of an Erasure: what each kind edits, how it is stored and undone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import ErasureError, NonFiniteError
from .models import LanguageModel
from .stored import parameter_key


class Part(Protocol):
    """One step of an Erasure. Parts are applied in order and undone in reverse."""

    kind: ClassVar[str]

    @classmethod
    def from_payload(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part: ...

    def spec(self) -> dict[str, Any]:
        """What erasure.json says about the part besides kind and payload; JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """The payload."""

    def check(self, model: LanguageModel) -> None:
        """Raises ErasureError where the part does not fit the model. Changes nothing."""

    def apply(self, model: LanguageModel) -> Callable[[], None]:
        """Edit the model in place; the result undoes exactly that."""

    def changed(self) -> list[dict[str, Any]]:
        """The parameters that it changes: name, count, rank (None: not low-rank). Empty for hooks."""


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """W′ = W + ΔW for one parameter, in fp32 on the CPU.

    `name` is the parameter's name in the Hugging Face state dict. `left` [d_out, K] @ `right` [K, d_in] or
    `dense` [d_out, d_in] (any shape for parameters that are not matrices) is ΔW; `transposed` says that the
    model stores [d_in, d_out] (GPT-2's Conv1D). With `rows` [n], int64, `dense` [n, d] holds these rows of the stored
    parameter, which has `height` of them, and the others stay (an embedding's tokens). Raises ErasureError for shapes
    that make no ΔW.
    """

    kind: ClassVar[str] = "weight_delta"
    name: str
    transposed: bool
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    rows: Tensor | None = None
    height: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name.replace(".base_layer", ""))  # a matrix under a PEFT layer
        for field in ("left", "right", "dense"):
            t = getattr(self, field)
            if t is not None:
                object.__setattr__(self, field, t.detach().to("cpu", torch.float32).contiguous())
        low_rank = self.left is not None and self.right is not None
        if (self.dense is not None) == low_rank or (self.left is None) != (self.right is None):
            raise ErasureError(f"the delta of {self.name} needs either `left` and `right` or `dense`")
        if self.left is not None and self.right is not None:
            shapes = tuple(self.left.shape), tuple(self.right.shape)
            if {len(s) for s in shapes} != {2} or shapes[0][1] != shapes[1][0]:
                raise ErasureError(f"the factors of {self.name} do not multiply: {shapes[0]} and {shapes[1]}")
        if self.rows is not None:
            object.__setattr__(self, "rows", self.rows.detach().to("cpu", torch.int64).contiguous())
            self._check_rows(self.rows)
        if self.transposed and self.dense is not None and self.dense.ndim != 2:
            raise ErasureError(f"the delta of {self.name} is not a matrix, so it cannot be transposed")

    def _check_rows(self, rows: Tensor) -> None:
        n = 0 if self.dense is None or self.transposed or self.dense.ndim != 2 else len(self.dense)
        fits = n > 0 and rows.shape == (n,) and len(rows.unique()) == n
        if not fits or int(rows.min()) < 0 or int(rows.max()) >= self.height:
            raise ErasureError(
                f"the delta of {self.name} names {list(rows.shape)} rows of {self.height}: it needs a different one "
                "for each row of `dense`, stored as the model stores it"
            )

    @classmethod
    def from_payload(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WeightDelta:
        height = int(spec["shape"][0]) if "rows" in tensors else 0
        part = cls(str(spec["name"]), bool(spec["transposed"]), **tensors, height=height)
        if part.spec() != dict(spec):
            raise ErasureError(f"the payload of {part.name} has other shapes than erasure.json says")
        return part

    def spec(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "transposed": self.transposed,
            "shape": list(self.stored_shape),
            "rank": self.rank,
        }

    def tensors(self) -> dict[str, Tensor]:
        named = {"left": self.left, "right": self.right, "dense": self.dense, "rows": self.rows}
        return {n: t for n, t in named.items() if t is not None}

    @property
    def rank(self) -> int | None:
        """K of the factors (an upper bound of the rank); None for a dense delta."""
        return None if self.left is None else self.left.shape[1]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the parameter as the model stores it."""
        if self.left is None or self.right is None:
            shape = tuple(self.dense.shape)  # type: ignore[union-attr]
            shape = (self.height, *shape[1:]) if self.rows is not None else shape
        else:
            shape = (self.left.shape[0], self.right.shape[1])
        return shape[::-1] if self.transposed else shape

    def changed(self) -> list[dict[str, Any]]:
        count = math.prod(self.stored_shape) if self.rows is None else self.dense.numel()  # type: ignore[union-attr]
        return [{"name": self.name, "count": count, "rank": self.rank}]

    def delta(self) -> Tensor:
        """ΔW, canonical [d_out, d_in], fp32."""
        if self.rows is not None and self.dense is not None:
            return torch.zeros(self.stored_shape).index_copy_(0, self.rows, self.dense)
        if self.left is None or self.right is None:
            return self.dense  # type: ignore[return-value]
        return self.left @ self.right

    def edit(self, weight: Tensor) -> Tensor:
        """weight + ΔW as stored, added in (at least) fp32, in the weight's dtype. Raises NonFiniteError."""
        delta = self.delta().to(weight.device)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        edited = (wide + (delta.T if self.transposed else delta)).to(weight.dtype)
        if not torch.isfinite(edited).all():
            raise NonFiniteError(f"{self.name} would hold NaN or infinity in {weight.dtype} after the edit")
        return edited

    def check_stored(self, weight: Tensor, where: str) -> None:
        """Raises ErasureError unless ΔW can be added to `weight`."""
        if tuple(weight.shape) != self.stored_shape or not weight.is_floating_point():
            raise ErasureError(
                f"{where} is {weight.dtype} {list(weight.shape)}, but the Erasure edits a float tensor "
                f"of shape {list(self.stored_shape)}"
            )

    def check(self, model: LanguageModel) -> None:
        self.check_stored(self._parameter(model), f"{self.name} of {model.name}")

    def apply(self, model: LanguageModel) -> Callable[[], None]:
        parameter = self._parameter(model)
        original = parameter.detach().clone()
        edited = self.edit(original)

        def put(value: Tensor) -> None:
            with torch.no_grad():
                parameter.copy_(value)

        put(edited)
        return lambda: put(original)

    def _parameter(self, model: LanguageModel) -> Tensor:
        found = base_parameters(model).get(parameter_key(self.name))
        if found is None:
            raise ErasureError(f"{model.name} has no parameter {self.name}, which the Erasure changes")
        return found


PART_KINDS = {
    "weight_delta": "saeunlearn.parts:WeightDelta",
    "token": "saeunlearn.tokens:TokenPart",
    "guard": "saeunlearn.guards:Guard",
    "offset": "saeunlearn.offsets:Offset",
}


def part_kind(kind: str) -> type[Part]:
    """The class of that kind. Raises ErasureError for an unknown one."""
    if kind not in PART_KINDS:
        raise ErasureError(f"there is a part of unknown kind {kind!r}; known: {', '.join(PART_KINDS)}")
    module, _, name = PART_KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def base_parameters(model: LanguageModel) -> dict[str, Tensor]:
    """`parameter_key` → parameter of the base model; a tied weight once, under its embedding's name."""
    return {parameter_key(name): parameter for name, parameter in model._base.named_parameters()}
