"""A LanguageModel as the lm-evaluation-harness sees one. Importing this needs lm_eval.

Everything goes through LanguageModel, in the state that it is in: weights, tokens, guards and offsets that are applied
act here as they do in the toolkit's own metrics, and so do its BOS rule and its float32 logits.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import StoppingCriteria

from ..corpus import Window
from ..errors import CorpusError, ModelError
from ..losses import over_windows
from ..models import LanguageModel
from ..progress import Progress

_BATCH = 16  # prompts that are continued together
_NEW_TOKENS = 256  # where a task does not say; the harness's own default


class HarnessModel(TemplateLM):
    """Answers the harness's requests with `model`; for one state of it: make another after applying an Erasure.

    It differs from the harness's own `hf` model in what that one leaves to tokenizers: BOS comes first exactly where
    `LanguageModel.bos_id` says so, stays when a long context loses its start, and is never scored itself.
    """

    def __init__(self, model: LanguageModel, progress: Progress | None = None) -> None:
        super().__init__()
        self.model = model
        self.progress = progress or Progress()
        self.tokenizer = model.tokenizer
        self.bos_id = model.bos_id
        self.max_length = model.max_length
        self.max_gen_toks = _NEW_TOKENS
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS. Raises ModelError without one."""
        return self._id("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS (also of tokenizers that put none), else EOS."""
        return self._id("bos_token_id", "eos_token_id")

    def _id(self, *names: str) -> int:
        found = [i for n in names if (i := getattr(self.tokenizer, n)) is not None]
        if not found:
            raise ModelError(f"the tokenizer of {self.model.name} has no {' or '.join(names)}, which the task needs")
        return found[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, BOS first where the model has one and the text does not begin with it already."""
        bos = [self.bos_id] if self.bos_id is not None and add_special_tokens is not False else []
        if bos and string.startswith(self.tokenizer.bos_token):
            bos = []
        return bos + list(self.tokenizer(string, add_special_tokens=False).input_ids)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(summed log-probability in nats of the continuation, whether greedy decoding gives it) of each request."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        items = []
        for i, (_texts, context, continuation) in enumerate(requests):
            ids, n = context + continuation, len(continuation)
            if not context or not n:
                raise CorpusError(f"request {i + 1} of the task: nothing to score, or nothing to score it from")
            kept = [self.bos_id] if ids[0] == self.bos_id else []
            if len(ids) > self.max_length:
                ids = [*kept, *ids[len(kept) - self.max_length :]]
            if n >= len(ids):
                raise CorpusError(
                    f"request {i + 1} of the task: {n} tokens to score do not fit the context of {self.max_length}"
                )
            items.append(Window(tuple(ids), len(ids) - n, i))
        found = over_windows(self.model, items, _logprob_and_greedy, self.progress, "harness: likelihoods")
        answers = [f[w.answer_start - 1 :] for w, f in zip(items, found)]
        return [(float(a[:, 0].sum(dtype=torch.float64)), bool(a[:, 1].all())) for a in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Summed log-probability (nats) of whole texts, `prefix_token_id` before the first token.

        Texts longer than the context are cut into windows; each token is scored once.
        """
        pieces: list[tuple[int, tuple[Any, list[int], list[int]]]] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            cuts = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pieces += [(i, (None, *make_disjoint_window(cut))) for cut in cuts]
        totals = [0.0] * len(requests)
        for (i, _piece), (total, _) in zip(pieces, self._loglikelihood_tokens([p for _, p in pieces])):
            totals[i] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to the first of the task's stop strings; greedy unless the task says otherwise."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        out = [""] * len(requests)
        self.progress.start("harness: continuations", len(requests))
        for members in groups.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks))
            stops = [s for s in settings.pop("until") if s]
            new = settings.pop("max_gen_toks")
            if not settings["do_sample"]:
                settings.pop("temperature", None)
            members = sorted(members, key=lambda i: len(requests[i].args[0]))  # little padding
            for at in range(0, len(members), _BATCH):
                batch = members[at : at + _BATCH]
                prompts = [self._without_bos(requests[i].args[0]) for i in batch]
                stopping = [_AtStop(self.tokenizer, stops)] if stops else []
                texts = self.model.generate(prompts, new, stopping_criteria=stopping, **settings)
                for i, text in zip(batch, texts):
                    out[i] = postprocess_generated_text(text, stops, None)
                self.progress.step(len(batch))
        self.progress.finish()
        return out

    def _without_bos(self, text: str) -> str:
        """LanguageModel.generate puts BOS itself."""
        return text if self.bos_id is None else text.removeprefix(self.tokenizer.bos_token)


class _AtStop(StoppingCriteria):
    """Ends a row once its new text holds a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.start = self.start or input_ids.shape[1] - 1
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        return torch.tensor([any(s in t for s in self.stops) for t in texts], device=input_ids.device)


def _logprob_and_greedy(logits: Tensor, ids: Tensor) -> Tensor:
    """[batch, position, 2]: log-probability of each id, and 1.0 where it is the most likely one."""
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return torch.stack([-loss, (logits.argmax(-1) == ids).float()], -1)
