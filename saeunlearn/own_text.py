"""Sentences that a model writes itself: what it is to keep, where no record at hand says it.

A sentence is like forget text as far as its token pairs have, in the mean, a log-ratio of their frequencies in forget
and retain set above 0. What is more like it than nearly all held-out retain records (SEEN_SHARE of them), and above 0,
is left out. Of the rest, what is more like it comes more often: an edit harms first what is near to the forget set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from .corpus import Corpus, windows
from .errors import ConfigError
from .models import LanguageModel
from .progress import Progress

SEEN_SHARE = 0.95
SAMPLES_AT_ONCE = 128


@torch.no_grad()
def own_sentences(
    model: LanguageModel, forget: Corpus, retain: Corpus, n: int, tokens: int, seed: int, progress: Progress
) -> Corpus:
    """`n` sentences of at most `tokens` tokens that the model writes after its first token, sampled at temperature 1.

    Of those that are kept, `n` are drawn with replacement, odds e^likeness. Where the tokenizer begins with no token
    of its own, they begin as retain records do.

    Raises ConfigError where hardly any (one in twenty) may be kept.
    """
    tokenizer, kept = model.tokenizer, list[tuple[float, str]]()
    limit, ratios = _telling(model, forget, retain)
    firsts = [w.ids[0] for w in windows(retain, model)]
    start = model.model.generation_config.eos_token_id
    tried = done = 0
    progress.start("sentences of the original", n)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while len(kept) < n:
            if tried >= 20 * (len(kept) + SAMPLES_AT_ONCE):
                raise ConfigError(
                    f"{tried - len(kept)} of {tried} sentences that {model.name} wrote look like forget text: use the "
                    "retain records instead (samples=0)"
                )
            at = torch.randint(len(firsts), (SAMPLES_AT_ONCE,))
            ids = torch.tensor([[firsts[int(i)]] for i in at], device=model.device)
            out = model.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                max_new_tokens=tokens, eos_token_id=start, pad_token_id=model.pad_id,
            )  # fmt: skip
            for row in out.tolist():
                tried += 1
                text = tokenizer.decode(row, skip_special_tokens=True)
                like = _likeness(row, ratios)
                if text.strip() and like <= limit:
                    kept.append((like, text))
            progress.step(max(0, min(len(kept), n) - done))
            done = min(len(kept), n)
        odds = torch.tensor([like for like, _ in kept[:n]]).exp()
        drawn = odds.multinomial(n, replacement=True).tolist()
    progress.finish()
    return Corpus.of([kept[i][1] for i in drawn], "the original's own sentences")


def _telling(model: LanguageModel, forget: Corpus, retain: Corpus) -> tuple[float, dict[tuple[int, int], float]]:
    """(likeness to forget text up to which a sentence is kept, log-ratios of token pairs)."""
    used, held = retain.split(0.2, 0)
    n_f, n_r = (Counter(p for w in windows(c, model) for p in pairwise(w.ids)) for c in (forget, used))
    more = math.log((n_r.total() + 1) / (n_f.total() + 1))
    ratios = {p: math.log((n_f[p] + 1) / (n_r[p] + 1)) + more for p in {*n_f, *n_r}}
    likeness = [_likeness(w.ids, ratios) for w in windows(held, model)]
    return max(0.0, float(torch.tensor(likeness).quantile(SEEN_SHARE))), ratios


def _likeness(ids: Sequence[int], ratios: Mapping[tuple[int, int], float]) -> float:
    """Mean log-ratio of the token pairs; those of neither set count as 0."""
    return sum(ratios.get(p, 0.0) for p in pairwise(ids)) / max(1, len(ids) - 1)
