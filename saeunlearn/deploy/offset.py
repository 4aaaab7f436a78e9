"""Logit offsets at inference (δ-unlearning, Huang et al., TMLR 2025, arXiv 2404.11045):

    ℓ(y|·) = ℓ_M(y|·) + w·(ℓ_o'(y|·) − ℓ_o(y|·))

M gives logits only; o and o' are two copies of a small model that shares its vocabulary. M itself keeps the knowledge:
whoever takes the offset off has it. Self-contained: needs torch and transformers, nothing else of saeunlearn.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor

_PREPARE = "prepare_inputs_for_generation"
_ATTACHED = "_saeunlearn_offsets"


class OffsetRuntime:
    """o and o' of one offset, in float32 (their small difference is what counts); made of a part's spec and tensors.

    spec: "config" (Hugging Face configuration of the small model), "weight" (w), "tokens" (size of the vocabulary),
    "changes" (of o' against o: parameter "name", "transposed"). tensors: "original.NAME" of o, and "change.I.left" @
    "change.I.right" or "change.I.dense" of the I-th change. Raises ValueError where these make no model.
    """

    def __init__(self, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.weight = float(spec["weight"])
        self.tokens = int(spec["tokens"])
        originals = {n.removeprefix("original."): t for n, t in tensors.items() if n.startswith("original.")}
        self.original = _build(spec["config"], originals)
        self.trained = copy.deepcopy(self.original)
        weights = dict(self.trained.named_parameters())
        for i, change in enumerate(spec["changes"]):
            factors = {n: tensors[f"change.{i}.{n}"].float() for n in ("left", "right", "dense")
                       if f"change.{i}.{n}" in tensors}  # fmt: skip
            delta = factors["dense"] if "dense" in factors else factors["left"] @ factors["right"]
            weights[change["name"]].data += delta.T if change["transposed"] else delta
        self.max_length = int(getattr(self.original.config.get_text_config(), "max_position_embeddings", 0) or 0)

    @torch.no_grad()
    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, keep: int = 0) -> Tensor:
        """w·(ℓ_o' − ℓ_o), [batch, position, width of the small model] in float32, 0 at padding (left or right).

        `ids` are whole sequences; `keep`: of the last so many positions only (0: all). Raises ValueError beyond the
        small model's context: an offset that stops acting unnoticed would give the knowledge back.
        """
        if self.max_length and ids.shape[1] > self.max_length:
            raise ValueError(f"{ids.shape[1]} tokens: the offset's small model reads at most {self.max_length}")
        if next(self.original.parameters()).device != ids.device:
            self.original.to(ids.device)
            self.trained.to(ids.device)
        offset = _logits(self.trained, ids, attention_mask, keep) - _logits(self.original, ids, attention_mask, keep)
        if attention_mask is not None:
            shown = attention_mask[:, -offset.shape[1] :].to(ids.device)
            offset = offset.masked_fill(shown[..., None] == 0, 0.0)
        return self.weight * offset

    def attach(self, model: Any) -> Callable[[], None]:
        """Add the offset to the logits of a Hugging Face model, plain or PEFT; the result takes this one off again.

        Acts in calls over whole sequences (with `attention_mask` where there is padding; the logits come back in
        float32) and in `generate`. Other calls raise ValueError: with a cache outside `generate`, with embeddings
        instead of ids, with `return_dict=False`. Offsets on one model add up, and go in any order.
        Tokenizers are not compared here. Raises ValueError where the model has fewer logits than there are tokens.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        width = base.config.get_text_config().vocab_size
        if width < self.tokens:
            raise ValueError(f"the model has {width} logits, but the offset's vocabulary {self.tokens} tokens")
        attached = vars(base).get(_ATTACHED)
        if attached is None:
            attached = _Attached(base)
            setattr(base, _ATTACHED, attached)
        attached.runtimes.append(self)
        done = False

        def remove() -> None:
            nonlocal done
            if not done:
                attached.drop(self)
            done = True

        return remove


class OffsetProcessor(LogitsProcessor):
    """Adds offsets inside `model.generate(logits_processor=[…])` of a model that nothing is attached to.

    For one call of `generate`. `attention_mask` [batch, prompt]: that of the call, needed where prompts are padded.
    The scores come back as log-probabilities, because beam search adds them up. Of `generate`'s own processors those on
    repetition and forbidden tokens act before (on M alone), temperature, top-k and top-p after.
    Every step reads the whole prefix with both small models.
    """

    def __init__(self, offsets: Sequence[OffsetRuntime], attention_mask: Tensor | None = None) -> None:
        self.offsets = list(offsets)
        self.attention_mask = attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = self.attention_mask
        if mask is not None:
            copies, rest = divmod(len(input_ids), len(mask))  # beams and samples of a prompt are neighbours
            if rest:
                raise ValueError(f"the attention mask has {len(mask)} rows for {len(input_ids)} sequences")
            mask = mask.repeat_interleave(copies, 0).to(input_ids.device)
            mask = F.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)
        for offset in self.offsets:
            scores = added(scores[:, None], offset(input_ids, mask, keep=1))[:, 0]
        return scores.log_softmax(-1)


class _Attached:
    """What `attach` leaves on a model: one hook for all its offsets, and a record of what `generate` is at.

    In `generate` a call holds the last tokens only; `prepare_inputs_for_generation` sees the whole sequences before.
    Methods, not closures: a deep copy of the model then has offsets of its own.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.runtimes: list[OffsetRuntime] = []
        self.call: tuple[Tensor | None, Tensor, Tensor | None] | None = None  # ids of the call; all ids, their mask
        self.overridden = vars(model).get(_PREPARE)
        self.prepare_before = getattr(model, _PREPARE)
        setattr(model, _PREPARE, self.prepare)
        self.hook = model.register_forward_hook(self.add, with_kwargs=True)

    def drop(self, runtime: OffsetRuntime) -> None:
        del self.runtimes[next(i for i, r in enumerate(self.runtimes) if r is runtime)]
        if not self.runtimes:
            self.hook.remove()
            delattr(self.model, _PREPARE)
            delattr(self.model, _ATTACHED)
            if self.overridden is not None:
                setattr(self.model, _PREPARE, self.overridden)

    def prepare(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = self.prepare_before(input_ids, *args, **kwargs)
        self.call = (inputs.get("input_ids"), input_ids, kwargs.get("attention_mask"))
        return inputs

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if not hasattr(output, "logits"):
            raise ValueError("a model with an offset must be called with return_dict=True")
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError("a model with an offset takes a number for logits_to_keep, not indices")
        ids, mask = self.sequences(given, output)
        logits = output.logits
        for runtime in self.runtimes:
            logits = added(logits, runtime(ids, mask, keep=output.logits.shape[1]))
        output.logits = logits
        if output.get("loss") is not None:
            output.loss = self.model.loss_function(logits, given["labels"], vocab_size=logits.shape[-1])
        return output

    def sequences(self, given: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor | None]:
        """The whole sequences that end with this call's ids, and their attention mask. Raises ValueError."""
        ids: Tensor | None = given.get("input_ids")
        if ids is None:
            raise ValueError("a model with an offset needs input_ids: embeddings say nothing to the small model")
        prepared, self.call = self.call, None
        if prepared is not None and prepared[0] is ids:
            _, ids, mask = prepared
            ids = ids.to(given["input_ids"].device)
        else:
            mask = given.get("attention_mask")
            caches = (given.get("past_key_values"), output.get("past_key_values"))
            if any(c is not None and c.get_seq_length() != ids.shape[1] for c in caches):
                raise ValueError("a model with an offset needs whole sequences, or `generate`: it keeps no cache")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"ids {list(ids.shape)} and attention mask {list(mask.shape)} must be of whole sequences")
        return ids, mask


def added(logits: Tensor, offset: Tensor) -> Tensor:
    """logits [batch, position, V] + offset [batch, position, V'], in float32, on the ids that both have.

    Widths differ where a vocabulary is padded to a round number; ids beyond the smaller width are no tokens.
    """
    width = logits.shape[-1]
    common = min(width, offset.shape[-1])
    return logits.float() + F.pad(offset[..., :common], (0, width - common)).to(logits.device)


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The model of `config` with these weights, in float32 on the CPU; no remote code. Raises ValueError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config["model_type"]
    made = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    with torch.random.fork_rng(devices=[]):  # its random weights must not shift the user's random numbers
        model = AutoModelForCausalLM.from_config(made, trust_remote_code=False, dtype=torch.float32)
    try:
        unknown = model.load_state_dict(dict(tensors), strict=False).unexpected_keys
    except RuntimeError as e:
        raise ValueError(f"the tensors are not those of the {kind} model that the offset names: {e}") from e
    missing = [n for n, _ in model.named_parameters() if n not in tensors]
    if unknown or missing:
        raise ValueError(f"the {kind} model of the offset lacks {missing} and does not know {unknown}")
    return model.eval().requires_grad_(False)


def _logits(model: Any, ids: Tensor, attention_mask: Tensor | None, keep: int) -> Tensor:
    accepted = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if attention_mask is not None:
        mask = attention_mask.to(ids.device)
        given["attention_mask"] = mask
        if "position_ids" in accepted:
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if keep and "logits_to_keep" in accepted:
        given["logits_to_keep"] = keep
    logits = model(**given).logits.float()
    return logits[:, -keep:] if keep else logits
