"""Batches that SSPU builds: what is kept, what is marked, what is exchanged."""

from __future__ import annotations

import torch
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, collate, windows
from saeunlearn.methods.batches import known, shared_prefixes, stacked, with_swapped_tokens
from saeunlearn.models import LanguageModel


def test_stacked_keeps_every_window(llama: LanguageModel) -> None:
    long, short = windows(FORGET, llama)[:3], windows(Corpus.of(["a map", "the old mill"]), llama)
    f, r = collate(short, llama.pad_id), collate(long, llama.pad_id)
    both = stacked(f, r, llama.pad_id)
    expected = collate([*short, *long], llama.pad_id)
    assert torch.equal(both.ids, expected.ids)
    assert torch.equal(both.attention_mask, expected.attention_mask)
    assert torch.equal(both.mask, expected.mask)


def test_known_marks_the_beginnings_that_retain_texts_share(llama: LanguageModel) -> None:
    items = windows(Corpus.of(["a red map of the mill", "the mill"]), llama)
    f = collate(items, llama.pad_id)
    r = windows(Corpus.of(["a red map is old", "mill the"]), llama)
    begun = {w.ids[: n + 1] for w in r for n in range(len(w.ids))}
    expected = [[tuple(ids[: n + 1]) in begun for n in range(len(ids))] for ids in f.ids.tolist()]
    got = known(f, shared_prefixes(items, r))
    assert got.tolist() == expected
    assert got[:, 0].all()  # BOS begins every text
    assert 3 < int(got.sum()) < int(f.attention_mask.sum())


def test_swapped_tokens_come_from_the_batch_and_leave_bos_and_padding(llama: LanguageModel) -> None:
    batch = collate(windows(RETAIN, llama)[:6] + windows(Corpus.of(["old mill"]), llama), llama.pad_id)
    swap = with_swapped_tokens(batch, 0.5, torch.Generator().manual_seed(0))
    changed = swap.ids != batch.ids
    assert not changed[~batch.mask].any()
    assert 0.2 < float(changed[batch.mask].double().mean()) < 0.6
    assert set(swap.ids[batch.mask].tolist()) <= set(batch.ids[batch.mask].tolist())
    again = with_swapped_tokens(batch, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(again.ids, swap.ids)
    assert torch.equal(with_swapped_tokens(batch, 0.0, torch.Generator()).ids, batch.ids)
