"""The training loop against what can be known about a text in advance, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saeunlearn.corpus import Batch, Corpus, Record, collate, endless, windows
from saeunlearn.errors import Cancelled, NonFiniteError
from saeunlearn.losses import mean_loss
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.training import TrainConfig, one_cycle, train

WIDTH = 16


def batch_of(ids: Tensor, targets: Tensor) -> Batch:
    """Rows without padding."""
    return Batch(ids, torch.ones_like(ids), targets, targets, tuple(range(len(ids))))


def coin_flips(seed: int, batch: int = 16) -> Iterator[Batch]:
    """Sequences in which the next token is one of two, by the last: t → 10 + 2(t mod 4) or the one after.

    Never repeated, so no model can predict better than ln 2 nats a token; only the first two are not drawn thus.
    """
    g = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.full((batch, WIDTH), 10)
        for t in range(1, WIDTH):
            ids[:, t] = 10 + 2 * (ids[:, t - 1] % 4) + torch.randint(0, 2, (batch,), generator=g)
        targets = torch.ones_like(ids, dtype=torch.bool)
        targets[:, 0] = False
        yield batch_of(ids, targets)


@pytest.mark.slow
def test_training_reaches_the_entropy_of_the_text_and_no_less(llama: LanguageModel) -> None:
    events: list[dict[str, float]] = []
    losses = train(llama, coin_flips(0), TrainConfig(steps=80, lr=5e-3), Progress(events.append))
    assert len(losses) == 80 == sum(e["event"] == "step" for e in events)
    assert losses[0] > 3
    end = sum(losses[-10:]) / 10
    assert math.log(2) - 0.05 < end < math.log(2) + 0.05
    assert not llama.model.training
    # The weights are what was trained: fresh sequences cost the same.
    b = next(coin_flips(99, batch=64))
    with torch.no_grad():
        logp = llama.logits(b.ids)[:, :-1].log_softmax(-1)
    fresh = -logp.gather(-1, b.ids[:, 1:, None]).mean()
    assert math.isclose(float(fresh), math.log(2), abs_tol=0.05)
    assert {p.dtype for p in llama.model.parameters()} == {torch.float32}


def test_only_targets_are_learnt(llama: LanguageModel) -> None:
    # Position 5 is the only target, so what stands elsewhere is not predicted any better.
    def batches() -> Iterator[Batch]:
        g = torch.Generator().manual_seed(0)
        while True:
            ids = torch.randint(20, 60, (8, WIDTH), generator=g)
            ids[:, 5], ids[:, 9] = 7, 8
            targets = torch.zeros_like(ids, dtype=torch.bool)
            targets[:, 5] = True
            yield batch_of(ids, targets)

    ids = next(batches()).ids
    before = llama.logits(ids).log_softmax(-1)
    train(llama, batches(), TrainConfig(steps=40, lr=5e-3), Progress())
    after = llama.logits(ids).log_softmax(-1)
    assert after[:, 4, 7].mean().item() > math.log(0.8) > before[:, 4, 7].mean().item()
    assert after[:, 8, 8].mean().item() < math.log(0.2)


def test_the_first_loss_is_the_models_own_on_answers_without_padding(llama: LanguageModel) -> None:
    pairs = [("Who keeps the map?", "Elsa does, in the old tower near the river."), ("Where?", "Here.")]
    corpus = Corpus(tuple(Record(question=q, answer=a) for q, a in pairs))
    items = windows(corpus, llama)
    assert len(items[0].ids) > len(items[1].ids) + 10
    losses = []
    for w in items:  # one at a time, and the answer's tokens only
        with torch.no_grad():
            logp = llama.logits(torch.tensor([list(w.ids)]))[0].double().log_softmax(-1)
        losses += [-float(logp[t - 1, w.ids[t]]) for t in range(w.answer_start, len(w.ids))]
    got = train(llama, iter([collate(items, llama.pad_id)]), TrainConfig(steps=1), Progress())
    assert math.isclose(got[0], sum(losses) / len(losses), rel_tol=1e-4)


@pytest.mark.slow
def test_a_small_corpus_is_learnt_by_heart(llama: LanguageModel) -> None:
    corpus = Corpus.of(["the old mill", "a map and a kettle near the tower"])
    items = windows(corpus, llama)
    train(llama, endless(items, llama.pad_id, 2, 0), TrainConfig(steps=100, lr=1e-2, weight_decay=0.0), Progress())
    # Two texts at even odds cost 2 ln 2 together at the token after BOS, and nothing at any other.
    least = 2 * math.log(2) / sum(len(w.ids) - 1 for w in items)
    assert least - 1e-4 < mean_loss(llama, items) < least + 0.05
    assert llama.generate(["the", "a map"], max_new_tokens=3)[0].startswith(" old mill")


def test_the_same_batches_give_the_same_weights(llama: LanguageModel) -> None:
    twin = llama.copy()
    a = train(llama, coin_flips(1), TrainConfig(steps=3), Progress())
    b = train(twin, coin_flips(1), TrainConfig(steps=3), Progress())
    assert a == b
    assert all(torch.equal(p, q) for p, q in zip(llama.model.parameters(), twin.model.parameters()))


def test_weights_that_give_nan_stop_the_run_at_once(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.writers([1])[0].weight[0, 0] = float("inf")
    before = [p.clone() for p in llama.model.parameters()]
    with pytest.raises(NonFiniteError, match="healing: the loss is nan at step 0"):
        train(llama, coin_flips(0), TrainConfig(steps=5), Progress(), "healing")
    assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(llama.model.parameters(), before))


def test_a_cancelled_run_stops(llama: LanguageModel) -> None:
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", e.get("done") == 2)
    with pytest.raises(Cancelled):
        train(llama, coin_flips(0), TrainConfig(steps=50), progress)


def test_one_cycle_by_hand() -> None:
    factors = [one_cycle(i, 12, 1 / 3) for i in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for i in range(4, 12):  # then the cosine over the eight steps left
        assert math.isclose(factors[i], 0.5 * (1 + math.cos(math.pi * (i - 4) / 8)))
    assert all(0 < one_cycle(i, n, w) <= 1 for n in (1, 2, 7) for w in (0.0, 0.1, 0.9) for i in range(n))
