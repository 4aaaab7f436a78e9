"""Logit offsets as parts of an Erasure, and the ensemble of a base model and its offsets.

The base model is a black box that gives logits; what runs at inference is in `saeunlearn.deploy.offset`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from .errors import ErasureError, ModelError, TokenizerMismatchError
from .models import LanguageModel
from .parts import WeightDelta

if TYPE_CHECKING:
    from .deploy.offset import OffsetRuntime

# Of a configuration: where it lay on disk, remote code, and what says nothing about the model.
_NOT_STORED = ("_name_or_path", "auto_map", "transformers_version", "architectures", "dtype")


class Logits(Protocol):
    """What a base model of an offset has to offer: a LanguageModel, or a few lines around a remote or closed model."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token → id."""

    def logits(self, ids: Tensor) -> Tensor:
        """Next-token logits [batch, position, d_vocab] of right-padded ids [batch, position]."""


@dataclass(frozen=True, eq=False)
class Offset:
    """ℓ_M + weight·(ℓ_o' − ℓ_o): the small model o whole, and o' as changes of it.

    `config`: the small model's Hugging Face configuration; `vocabulary`: `fingerprint_vocabulary` of the tokens that it
    shares with the base model, `tokens` their number (highest id + 1). Tensors are kept on the CPU in o's own dtype.
    Raises ErasureError where the changes do not fit o.
    """

    kind: ClassVar[str] = "offset"
    config: Mapping[str, Any]
    weight: float
    vocabulary: str
    tokens: int
    original: Mapping[str, Tensor]
    changes: Sequence[WeightDelta]

    def __post_init__(self) -> None:
        kept = {n: t.detach().cpu().contiguous() for n, t in self.original.items()}
        object.__setattr__(self, "original", kept)
        if not math.isfinite(self.weight):
            raise ErasureError(f"the weight of an offset must be finite, not {self.weight}")
        for change in self.changes:
            if change.name not in kept:
                raise ErasureError(f"the small model of the offset has no parameter {change.name}")
            change.check_stored(kept[change.name], f"{change.name} of the small model")

    @classmethod
    def of(cls, small: LanguageModel, changes: Sequence[WeightDelta], weight: float, dtype: torch.dtype) -> Offset:
        """The offset of a small model, as it is now, and changes of its weights; o is stored in `dtype`."""
        config = json.loads(small.model.config.to_json_string(use_diff=False))
        vocabulary = small.vocabulary
        original = {n: t.to(dtype, copy=True) for n, t in small._tensors_to_store().items()}
        return cls(
            {k: v for k, v in config.items() if k not in _NOT_STORED}, weight, fingerprint_vocabulary(vocabulary),
            max(vocabulary.values()) + 1, original, changes,
        )  # fmt: skip

    @classmethod
    def from_payload(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Offset:
        changes = []
        for i, change in enumerate(spec["changes"]):
            own = {n.removeprefix(f"change.{i}."): t for n, t in tensors.items() if n.startswith(f"change.{i}.")}
            changes.append(WeightDelta.from_payload(change, own))
        original = {n.removeprefix("original."): t for n, t in tensors.items() if n.startswith("original.")}
        part = cls(spec["config"], float(spec["weight"]), spec["vocabulary"], int(spec["tokens"]), original, changes)
        if tensors.keys() != part.tensors().keys():
            raise ErasureError("the payload of the offset has other tensors than erasure.json says")
        return part

    def spec(self) -> dict[str, Any]:
        return {
            "config": dict(self.config), "weight": self.weight, "vocabulary": self.vocabulary, "tokens": self.tokens,
            "changes": [c.spec() for c in self.changes],
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        out = {f"original.{n}": t for n, t in self.original.items()}
        for i, change in enumerate(self.changes):
            out |= {f"change.{i}.{n}": t for n, t in change.tensors().items()}
        return out

    def runtime(self) -> OffsetRuntime:
        """What computes the offset. Raises ErasureError where the tensors are not those of the configuration."""
        from .deploy.offset import OffsetRuntime

        try:
            return OffsetRuntime(self.spec(), self.tensors())
        except (ValueError, KeyError, TypeError) as e:
            raise ErasureError(f"the offset cannot be built: {e}") from e

    def check(self, model: LanguageModel) -> None:
        """Raises TokenizerMismatchError unless the model has the very tokens and ids that the offset was made for.

        Widths of the logits may differ: beyond the vocabulary there is only padding, which no tokenizer names.
        """
        if fingerprint_vocabulary(model.vocabulary) != self.vocabulary:
            raise TokenizerMismatchError(
                f"the offset was made for another tokenizer than that of {model.name}: tokens or their ids differ"
            )

    def apply(self, model: LanguageModel) -> Callable[[], None]:
        return self.runtime().attach(model.model)

    def changed(self) -> list[dict[str, Any]]:
        return []


def fingerprint_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """sha256 of the token → id map."""
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


AddedLogits = Callable[[Tensor, Tensor | None], Tensor]
"""offset(ids, attention_mask): what is added to the base model's logits, [batch, position, d_vocab]."""


class Ensemble:
    """A base model and the offsets that are on at present, with what tokenising, losses and metrics use of a model.

    `small`: a LanguageModel with the base model's vocabulary; where the base model is none itself, texts are tokenised
    as that one does. Raises TokenizerMismatchError where the vocabularies differ.
    """

    def __init__(self, base: Logits, small: LanguageModel, offsets: Sequence[AddedLogits] = ()) -> None:
        check_vocabularies(base, small)
        tokenises = base if isinstance(base, LanguageModel) else small
        self.base, self.small, self.offsets = base, small, list(offsets)
        self.vocabulary = dict(base.vocabulary)
        self.name = getattr(base, "name", "the base model")
        self.tokenizer, self.bos_id, self.pad_id = tokenises.tokenizer, tokenises.bos_id, tokenises.pad_id
        self.d_vocab = tokenises.d_vocab
        self.device = small.device
        self.max_length = min(tokenises.max_length, small.max_length)
        self._last: tuple[Tensor, Tensor] | None = None

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[batch, position, d_vocab] in float32 of right-padded ids; the graph reaches the offsets only."""
        from .deploy.offset import added

        logits = self._base_logits(ids, attention_mask)
        for offset in self.offsets:
            logits = added(logits, offset(ids, attention_mask))
        return logits

    @contextlib.contextmanager
    def with_offsets(self, offsets: Sequence[AddedLogits]) -> Iterator[Ensemble]:
        """Within the context these offsets are on, and no others."""
        before, self.offsets = self.offsets, list(offsets)
        try:
            yield self
        finally:
            self.offsets = before

    @torch.no_grad()
    def _base_logits(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Those of the base model, computed once for each tensor of ids (a step asks for them two times)."""
        if self._last is None or self._last[0] is not ids:
            own = isinstance(self.base, LanguageModel)
            logits = self.base.logits(ids, attention_mask) if own else self.base.logits(ids)  # type: ignore[call-arg]
            if logits.shape[:-1] != ids.shape or logits.shape[-1] < max(self.vocabulary.values()) + 1:
                raise ModelError(
                    f"{self.name} gives logits {list(logits.shape)} for ids {list(ids.shape)}; needed: one row a "
                    f"position, at least {max(self.vocabulary.values()) + 1} wide"
                )
            self._last = ids, logits.to(self.device, torch.float32)
        return self._last[1]


def check_vocabularies(base: Logits, small: LanguageModel) -> None:
    """Raises TokenizerMismatchError, with an example, unless both map the same tokens to the same ids."""
    a, b = base.vocabulary, small.vocabulary
    differ = sorted(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
    if differ:
        t = differ[0]
        raise TokenizerMismatchError(
            f"{small.name} cannot be the offset model of {getattr(base, 'name', 'the base model')}: {len(differ)} "
            f"tokens differ, such as {t!r} (id {b.get(t)} and {a.get(t)}); both need one token → id map"
        )
