"""LanguageModel: a plain Hugging Face causal model and its tokenizer, with the residual stream by block.

Layer l is the OUTPUT of block l, 0-based (TransformerLens `blocks.{l}.hook_resid_post`). The model that is
trained, edited and saved is always the Hugging Face one; TransformerLens is a read-only view on a copy.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .deploy.layout import DeployError, find_blocks
from .errors import ModelError, TokenizerMismatchError
from .stored import check_folder, fingerprint_tensors, lineage_fingerprint, stored_tensors

# Which matrices of a block WRITE to the residual stream.
_WRITERS = {
    "mlp": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"),
    "attn": ("self_attn.o_proj", "attn.c_proj", "attention.dense"),
}
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")
# Gemma-2 puts an RMSNorm between the matrix and the stream: matrix + norm together are the writer.
_POST_NORMS = {"mlp": "post_feedforward_layernorm", "attn": "post_attention_layernorm"}


class _Stop(Exception):
    """Ends a forward pass after the deepest block that was asked for."""


@dataclass(frozen=True)
class Writer:
    """A matrix that writes to the residual stream.

    `name` is the parameter's name in the state dict. `transposed` is True for GPT-2's Conv1D, which stores
    [d_in, d_out]; `delta` everywhere else means the canonical [d_out, d_in]. `post_scale` [d_model] is the
    gain of a norm between the matrix and the stream (Gemma-2), or None.
    """

    block: int
    name: str
    module: nn.Module
    transposed: bool
    post_scale: Tensor | None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def d_in(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU. Raises ModelError for a device that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ModelError(f"device {device!r} is not available: {e}") from e
    return torch.device(device)


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """`auto` keeps the stored dtype; else one of float32, bfloat16, float16."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if dtype not in names:
        raise ModelError(f"unknown dtype {dtype!r}; use one of {', '.join(names)}")
    return names[dtype]  # type: ignore[return-value]


class LanguageModel:
    """A Hugging Face causal language model (plain or PEFT) and its tokenizer.

    Attributes: `model`, `tokenizer`, `name`, `n_layers`, `d_model`, `d_vocab`, `max_length`, `blocks`.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "in-memory", source: Path | None = None):
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._base: Any = base
        self.blocks: nn.ModuleList = _find_blocks(base)
        self.n_layers = len(self.blocks)
        self.d_model: int = base.config.get_text_config().hidden_size
        self.d_vocab: int = base.get_input_embeddings().weight.shape[0]
        self.max_length: int = int(getattr(base.config, "max_position_embeddings", 0) or 2048)
        self.lineage: list[str] = []  # ids of the Erasures applied in memory, oldest first
        self._fingerprint: str | None = None
        if len(tokenizer) > self.d_vocab:
            raise TokenizerMismatchError(
                f"the tokenizer has {len(tokenizer)} tokens but {name} embeds only {self.d_vocab}: "
                "they do not belong together"
            )

    @classmethod
    def open(cls, source: str | Path, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
        """Open a local folder or a hub id. Safetensors only, no remote code.

        Raises ModelError when the folder is missing, incomplete, pickled, or of an unsupported layout.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()  # the toolkit shows its own
        torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
        path = Path(source).expanduser()
        local = path.is_dir()
        if local:
            check_folder(path)
        elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
            raise ModelError(f"{source} is not a model folder (config.json and *.safetensors)")
        if local and (path / "adapter_config.json").exists():
            return cls._open_adapter(path, device, dtype)
        where = str(path) if local else str(source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=torch_dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True,  # refused by name below
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
            raise ModelError(f"cannot open {source}: {' '.join(str(e).split())[:300]}") from e
        model, info = loaded  # transformers only warns of tensors that it filled with random numbers
        if bad := sorted(info["missing_keys"]) + sorted(str(m[0]) for m in info["mismatched_keys"]):
            raise ModelError(f"{source} is damaged: {len(bad)} tensors missing or misshapen, like {bad[0]}")
        return cls(model.to(torch_device), tokenizer, name=path.name if local else str(source),
                   source=path if local else None)  # fmt: skip

    @classmethod
    def _open_adapter(cls, path: Path, device: str, dtype: str) -> LanguageModel:
        from peft import PeftModel

        base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"{path} is an adapter that does not say which model it belongs to")
        lm = cls.open(base, device=device, dtype=dtype)
        return cls(PeftModel.from_pretrained(lm.model, str(path)), lm.tokenizer, name=path.name)

    # --- shape and place -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def bos_id(self) -> int | None:
        """The token that the tokenizer itself puts first, or None (GPT-2 and GPT-NeoX put none)."""
        ids = self.tokenizer("a").input_ids
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        return dict(self.tokenizer.get_vocab())

    @property
    def pad_id(self) -> int:
        for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if i is not None:
                return i
        return 0  # padding is masked everywhere, so any valid id serves

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises ModelError for a layer outside 0 … n_layers − 1."""
        bad = [i for i in layers if not 0 <= i < self.n_layers]
        if bad or not layers:
            raise ModelError(f"layers {list(bad)} are outside 0 … {self.n_layers - 1} of {self.name}")

    def writers(self, blocks: Sequence[int], kinds: Sequence[str] = ("mlp",)) -> list[Writer]:
        """The matrices of `blocks` that write to the residual stream; kinds: "mlp", "attn".

        Raises ModelError where the layout has no such matrix.
        """
        self.check_layers(blocks)
        names = {id(p): n for n, p in self._base.named_parameters()}
        out = []
        for b in blocks:
            block = self.blocks[b]
            for kind in kinds:
                module = next((m for p in _WRITERS[kind] if (m := _submodule(block, p)) is not None), None)
                if module is None:
                    raise ModelError(f"block {b} of {self.name} has no known {kind} output matrix")
                post = _submodule(block, _POST_NORMS[kind])
                # In Llama `post_attention_layernorm` normalises the MLP's input, not the attention's output.
                is_gemma = _submodule(block, "pre_feedforward_layernorm") is not None
                scale = 1.0 + post.weight.detach().float() if is_gemma and post is not None else None
                module = getattr(module, "base_layer", module)  # the frozen matrix under a PEFT layer
                out.append(Writer(b, names[id(module.weight)], module, type(module).__name__ == "Conv1D", scale))
        return out

    # --- forward passes --------------------------------------------------------------------------------

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits [batch, position, d_vocab] in float32."""
        return self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits.float()

    def logits_and_states(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor]]:
        """`logits`, and the residual stream after each block [batch, position, d_model], the last behind the norm."""
        out = self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
        return out.logits.float(), out.hidden_states[1:]

    def capture(self, ids: Tensor, layers: Sequence[int], attention_mask: Tensor | None = None) -> dict[int, Tensor]:
        """Residual stream after each block of `layers`: {l: [batch, position, d_model]}.

        The pass stops after the deepest of them, and keeps the graph when gradients are enabled.
        """
        self.check_layers(layers)
        got: dict[int, Tensor] = {}
        deepest = max(layers)

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                got[layer] = output[0] if isinstance(output, tuple) else output
                if layer == deepest:
                    raise _Stop

            return hook

        handles = [self.blocks[i].register_forward_hook(keep(i)) for i in sorted(set(layers))]
        try:
            with contextlib.suppress(_Stop):
                self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        finally:
            for h in handles:
                h.remove()
        return got

    @contextlib.contextmanager
    def patch(self, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Within the context the residual stream after block l is replaced by edits[l](h)."""
        self.check_layers(list(edits))

        def make(fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (fn(output[0]), *output[1:])
                return fn(output)

            return hook

        handles = [self.blocks[i].register_forward_hook(make(fn)) for i, fn in edits.items()]
        try:
            yield
        finally:
            for h in handles:
                h.remove()

    # --- from the stream to the vocabulary -------------------------------------------------------------

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the output matrix. Raises ModelError where the layout has none."""
        backbone = find_blocks(self._base)[0]
        found = next((m for name in _FINAL_NORMS if (m := getattr(backbone, name, None)) is not None), None)
        if found is None:
            raise ModelError(f"{self.name} has no known norm before its output matrix")
        return found

    def unembed(self, h: Tensor) -> Tensor:
        """The logit lens: next-token logits [..., d_vocab] in float32 of a stream h [..., d_model] of any layer."""
        logits = self._base.get_output_embeddings()(self.final_norm(h.to(self.dtype))).float()
        cap = getattr(self._base.config.get_text_config(), "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def direction_logits(self, rows: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """What directions [n, d_model] of the last stream add to the logits (of `tokens`, else of all), [n, token] in
        float32, up to the norm's division by the stream's size: the rows, centred where the norm centres, times its
        gain and the output matrix.
        """
        norm, head = self.final_norm, self._base.get_output_embeddings().weight
        head = head if tokens is None else head[list(tokens)]
        rows = rows.to(head.device, torch.float32)
        if isinstance(norm, nn.LayerNorm):
            rows = rows - rows.mean(-1, keepdim=True)
        # Some layouts store the gain as it is, others its distance from 1: ask the norm itself.
        signs = torch.ones(self.d_model, device=head.device, dtype=self.dtype)
        signs[1::2] = -1
        gain = (norm(1024 * signs) - norm(-1024 * signs)).float() / 2 * signs.float()
        return ((rows * gain).to(head.dtype) @ head.T).float()

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 40, **kwargs: Any) -> list[str]:
        """Continuations of `prompts` (greedy unless `do_sample=True` …), without the prompt."""
        bos = [] if self.bos_id is None else [self.bos_id]
        room = self.max_length - max_new_tokens - len(bos)
        if room < 1:
            raise ModelError(f"{max_new_tokens} new tokens fill the context of {self.max_length}: use fewer")
        rows = [self.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        rows = [bos + r[-room:] or [self.pad_id] for r in rows]  # a long prompt loses its start, never BOS
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        kwargs = {"do_sample": False, **kwargs}
        kwargs |= {"max_new_tokens": max_new_tokens, "pad_token_id": self.pad_id}
        out = self.model.generate(input_ids=ids, attention_mask=mask, **kwargs)
        return self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    # --- views, identity, disk -------------------------------------------------------------------------

    def transformer_lens(self) -> Any:
        """A TransformerBridge on a COPY of the model, for hook names, logit lens and attribution.

        Read-only: nothing done to it reaches this model. Pass explicit token ids (its own BOS handling
        differs between architectures).
        """
        from transformer_lens.model_bridge import TransformerBridge

        model = self.model
        if hasattr(model, "merge_and_unload"):  # the bridge knows no adapters
            model = copy.deepcopy(model).merge_and_unload()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return TransformerBridge.boot_transformers(folder, device=str(self.device), dtype=self.dtype)

    def copy(self) -> LanguageModel:
        """An independent copy in memory."""
        twin = LanguageModel(copy.deepcopy(self.model), self.tokenizer, self.name, self.source)
        twin.lineage, twin._fingerprint = list(self.lineage), self._fingerprint
        return twin

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face folder (safetensors)."""
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def fingerprint(self) -> str:
        """sha256 over the stored base tensors (name, dtype, shape, bytes), then over the applied Erasures."""
        return lineage_fingerprint(self.base_fingerprint(), self.lineage)

    def base_fingerprint(self) -> str:
        """The fingerprint without the applied Erasures.

        Read from the folder where there is one, so it depends neither on sharding nor on the load dtype.
        """
        if self._fingerprint is None:
            # An adapter's folder does not hold the base weights, so those in memory have to serve.
            folder = self.source
            if folder is None or (folder / "adapter_config.json").exists():
                self._fingerprint = fingerprint_tensors(self._tensors_to_store().items())
            else:
                self._fingerprint = fingerprint_tensors(stored_tensors(folder))
        return self._fingerprint

    def _tensors_to_store(self) -> dict[str, Tensor]:
        seen: set[int] = set()
        out = {}
        for name, p in self._base.named_parameters():  # a tied weight comes once, as on disk
            if p.data_ptr() not in seen:
                seen.add(p.data_ptr())
                out[name.replace(".base_layer", "")] = p.detach()
        return out


def _find_blocks(base: nn.Module) -> nn.ModuleList:
    try:
        return find_blocks(base)[1]
    except DeployError as e:
        raise ModelError(str(e)) from e


def _submodule(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module
