"""A new token as a part of an Erasure: its embedding row and, where the output matrix is its own, its row there.

`banned` keeps a token from being decoded, so that a model can be measured with and without it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import ConfigError, ErasureError
from .models import LanguageModel

_ADDED = "_tokens_of_erasures"  # on the tokenizer's copy: which tokens parts have added


@dataclass(frozen=True, eq=False)
class TokenPart:
    """The token `text` with its row [d_model] of the embedding, in fp32 on the CPU.

    `head_row` [d_model] is its row of the output matrix, None where the two matrices are tied. `name` and `head_name`
    are the parameters' names in the Hugging Face state dict. The id is the next free one of the tokenizer.
    """

    kind: ClassVar[str] = "token"
    text: str
    name: str
    row: Tensor
    head_name: str | None = None
    head_row: Tensor | None = None

    def __post_init__(self) -> None:
        check_text(self.text)
        if (self.head_name is None) != (self.head_row is None):
            raise ErasureError(
                f"the token {self.text} needs both the name and the row of the output matrix, or neither"
            )
        for field in ("row", "head_row"):
            t = getattr(self, field)
            if t is not None:
                if t.ndim != 1:
                    raise ErasureError(f"a row of the token {self.text} is {list(t.shape)}, not [d_model]")
                object.__setattr__(self, field, t.detach().to("cpu", torch.float32, copy=True).contiguous())

    @classmethod
    def of(cls, model: LanguageModel, text: str, row: Tensor, head_row: Tensor | None = None) -> TokenPart:
        """The part for this model; `head_row` is needed where (and only where) its matrices are not tied."""
        embedding, head = matrices(model)
        names = {id(p): n for n, p in model._base.named_parameters()}
        head_name = None if head is None else names[id(head.weight)]
        return cls(text, names[id(embedding.weight)], row, head_name, head_row)

    @classmethod
    def from_payload(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TokenPart:
        part = cls(str(spec["text"]), str(spec["name"]), tensors["row"], spec["head_name"], tensors.get("head_row"))
        if part.spec() != dict(spec):
            raise ErasureError(f"the payload of the token {part.text} has another width than erasure.json says")
        return part

    def spec(self) -> dict[str, Any]:
        return {"text": self.text, "name": self.name, "head_name": self.head_name, "width": len(self.row)}

    def tensors(self) -> dict[str, Tensor]:
        return {"row": self.row} | ({} if self.head_row is None else {"head_row": self.head_row})

    def changed(self) -> list[dict[str, Any]]:
        return [{"name": n, "count": len(self.row), "rank": None} for n in (self.name, self.head_name) if n is not None]

    def check(self, model: LanguageModel) -> None:
        fitting = TokenPart.of(model, self.text, self.row, self.row if matrices(model)[1] is not None else None)
        if (self.name, self.head_name) != (fitting.name, fitting.head_name):
            raise ErasureError(
                f"the token {self.text} has rows of {self.name} and {self.head_name or 'no output matrix'}, but those "
                f"of {model.name} are {fitting.name} and {fitting.head_name or 'tied to it'}"
            )
        for _, weight, row in self._rows(model):
            if len(row) != weight.shape[1]:
                raise ErasureError(f"the token {self.text} is {len(row)} wide, but {model.name} {weight.shape[1]}")
        at = token_id(model, self.text)
        if at is not None and any(not torch.equal(w[at].cpu(), r.to(w.dtype)) for _, w, r in self._rows(model)):
            raise ErasureError(f"{model.name} has a token {self.text} already, with another row: choose another text")

    def apply(self, model: LanguageModel) -> Callable[[], None]:
        """Add the token, or do nothing where it is there already with the same rows.

        An id inside the matrix (a padded vocabulary) takes over that row; else the matrix grows by one. Undoing
        restores the same parameter and tokenizer objects.
        """
        self.check(model)
        if token_id(model, self.text) is not None:
            return lambda: None
        old, at = model.tokenizer, len(model.tokenizer)
        tokenizer = _with_token(old, self.text)
        if tokenizer.convert_tokens_to_ids(self.text) != at or len(tokenizer) != at + 1:
            raise ErasureError(f"the ids of {model.name}'s tokenizer have gaps: it cannot take the token {self.text}")
        tied = matrices(model)[1] is None
        undo = [_put_row(module, at, row) for module, _, row in self._rows(model)]
        undo.append(_set(model, tokenizer=tokenizer))
        if at == model.d_vocab:
            undo.append(_set(model, d_vocab=at + 1))
            configs = {id(c): c for c in (model._base.config, model._base.config.get_text_config())}
            # Some models keep a copy of it for their own loss.
            undo += [_set(x, vocab_size=at + 1) for x in (*configs.values(), model._base) if hasattr(x, "vocab_size")]
        if tied and (head := model._base.get_output_embeddings()) is not None:
            undo.append(_set(head, weight=matrices(model)[0].weight, out_features=matrices(model)[0].num_embeddings))

        def back() -> None:
            for step in reversed(undo):
                step()

        return back

    def _rows(self, model: LanguageModel) -> list[tuple[Any, Tensor, Tensor]]:
        """(module, its weight, the row for it) of each matrix."""
        embedding, head = matrices(model)
        out = [(embedding, embedding.weight.detach(), self.row)]
        if head is not None and self.head_row is not None:
            out.append((head, head.weight.detach(), self.head_row))
        return out


def check_text(text: str) -> None:
    """Raises ErasureError for a text that no token can have without changing how ordinary text is read."""
    if len(text) < 3 or any(c.isspace() for c in text) or text.isalnum():
        raise ErasureError(
            f"{text!r} cannot be a new token: use at least three characters without spaces, not letters and digits "
            "only, like <|UNL|>"
        )


def matrices(model: LanguageModel) -> tuple[Any, Any | None]:
    """(input embedding, output matrix or None where it is tied to the first) of the base model.

    Raises ErasureError for an output matrix with a bias: no supported layout has one.
    """
    embedding, head = model._base.get_input_embeddings(), model._base.get_output_embeddings()
    if head is not None and getattr(head, "bias", None) is not None:
        raise ErasureError(f"the output matrix of {model.name} has a bias: new tokens are not supported there")
    return embedding, None if head is None or head.weight is embedding.weight else head


def token_id(model: LanguageModel, text: str) -> int | None:
    """The id of a text that is one token of the vocabulary, or None."""
    return model.tokenizer.get_vocab().get(text)


def is_added(model: LanguageModel, text: str) -> bool:
    """Whether the model has this token from a part that was applied in memory."""
    return text in getattr(model.tokenizer, _ADDED, ())


@contextlib.contextmanager
def banned(model: LanguageModel, token: str) -> Iterator[None]:
    """Within the context the token's logit is −inf, in `generate` and in `LanguageModel.logits`.

    Raises ConfigError where the model has no such token.
    """
    at = token_id(model, token)
    if at is None:
        raise ConfigError(f"{model.name} has no token {token!r} to ban")

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        index = torch.tensor([at], device=output.logits.device)
        output.logits = output.logits.index_fill(-1, index, -torch.inf)
        return output

    # PEFT calls the base model's forward without its hooks, but generates through them.
    modules = {id(m): m for m in (model.model, model._base)}
    handles = [m.register_forward_hook(hook) for m in modules.values()]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


@contextlib.contextmanager
def live_rows(model: LanguageModel, at: int, row: Tensor, head_row: Tensor | None) -> Iterator[None]:
    """Within the context token `at` has these rows [d_model], and the graph reaches them.

    `head_row` None: `row` serves both, as in tied models.
    """
    embedding = model._base.get_input_embeddings()
    # Gemma multiplies what it looks up.
    size = float(getattr(embedding, "embed_scale", 1.0))

    def embed(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((args[0] == at)[..., None], (size * row).to(output.dtype), output)

    def score(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        logit = args[0].float() @ (row if head_row is None else head_row)
        return output.index_copy(-1, torch.tensor([at], device=output.device), logit[..., None].to(output.dtype))

    handles = [
        embedding.register_forward_hook(embed),
        model._base.get_output_embeddings().register_forward_hook(score),
    ]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _with_token(tokenizer: Any, text: str) -> Any:
    """A copy of the tokenizer that reads `text` as one token and leaves it out of what it decodes."""
    from tokenizers import AddedToken

    out = copy.deepcopy(tokenizer)
    out.add_tokens([AddedToken(text, normalized=False, special=True)], special_tokens=True)
    setattr(out, _ADDED, (*getattr(tokenizer, _ADDED, ()), text))
    return out


def _put_row(module: Any, at: int, row: Tensor) -> Callable[[], None]:
    """Row `at` of a matrix becomes `row`; the matrix grows where it ends before."""
    old: nn.Parameter = module.weight
    value = row.to(old.device, old.dtype)
    if at < len(old):
        kept = old.detach()[at].clone()

        def put(x: Tensor) -> None:
            with torch.no_grad():
                old[at] = x

        put(value)
        return lambda: put(kept)
    new = nn.Parameter(torch.cat([old.detach(), value[None]]), requires_grad=old.requires_grad)
    size = "num_embeddings" if hasattr(module, "num_embeddings") else "out_features"
    return _set(module, **{"weight": new, size: at + 1})


def _set(target: Any, **values: Any) -> Callable[[], None]:
    """Set attributes; the result puts the old ones back."""
    old = {name: getattr(target, name) for name in values}

    def put(new: Mapping[str, Any]) -> None:
        for name, value in new.items():
            setattr(target, name, value)

    put(values)
    return lambda: put(old)
