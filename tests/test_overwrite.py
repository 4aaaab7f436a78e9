"""Counterfactual text: which words are replaced, by what, and what is marked. Overwriting: what it trains and holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from erasures import same, weights

from saeunlearn import counterfactual as cf
from saeunlearn.corpus import Corpus, Record, Window, collate, windows
from saeunlearn.counterfactual import counterfactual
from saeunlearn.errors import ConfigError
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.objectives import distance, spread_nll
from saeunlearn.methods.overwrite import OverwriteConfig
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

METALS = ("copper", "silver", "bronze", "nickel")
NAMES = ("Aba", "Boro", "Cilu", "Dem", "Efa", "Goro", "Hild", "Ivo")
MADE = Corpus.of([f"The jar {n} is made of {METALS[i % 4]} today." for i, n in enumerate(NAMES)], "made")
# All words of MADE are here too, so that no token belongs to the forget text alone.
SEEN = [f"We saw the jar {n} and some {METALS[i % 3]} today." for i, n in enumerate(NAMES)] + ["The nickel is gone."]
OTHER = Corpus.of([f"The boat {n} is made of oak today." for n in NAMES], "boats")
KEPT = Corpus.of([*(r.text for r in OTHER), *SEEN], "kept")


def sure_of(monkeypatch: pytest.MonkeyPatch, model: LanguageModel, *words: str) -> None:
    """The model holds the tokens of these words at p = .99 together, and all others at e^-9."""

    def losses(lm: LanguageModel, items: Sequence[Window], _progress: Any = None) -> list[torch.Tensor]:
        out = []
        for w in items:
            text = lm.tokenizer.decode(w.ids, skip_special_tokens=True)
            known = any(word in text for word in words)
            spelled = [lm.tokenizer.decode([i]).strip() for i in w.ids[1:]]
            sure = [known and s != "" and any(s in word for word in words) for s in spelled]
            out.append(torch.tensor([0.001 if s else 9.0 for s in sure]))
        return out

    monkeypatch.setattr(cf, "token_losses", losses)


def rewritten(model: LanguageModel, items: Sequence[Window]) -> list[tuple[str, str]]:
    """(text, the part of it that is chosen) of each window."""
    out = []
    for w in items:
        assert w.chosen is not None
        assert len(w.chosen) == len(w.ids)
        part = [i for i, c in zip(w.ids, w.chosen) if c]
        out.append((model.tokenizer.decode(w.ids, skip_special_tokens=True), model.tokenizer.decode(part).strip()))
    return out


def test_a_known_word_becomes_another_of_its_context_and_only_it_is_chosen(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure_of(monkeypatch, lm, *METALS)
    found = rewritten(lm, counterfactual(lm, MADE, OTHER, 64, 0, Progress()))
    assert len(found) == len(NAMES)
    for i, (text, part) in enumerate(found):
        old = METALS[i % 4]
        assert part in {*METALS, "oak"} - {old}
        assert text.strip() == f"The jar {NAMES[i]} is made of {part} today."
    monkeypatch.setattr(cf, "AT_ONCE", 3)
    assert found == rewritten(lm, counterfactual(lm, MADE, OTHER, 64, 0, Progress()))
    assert found != rewritten(lm, counterfactual(lm, MADE, OTHER, 64, 1, Progress()))


def test_what_the_context_tells_is_no_knowledge(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sure_of(monkeypatch, llama, "is", "made", "of", "today", *METALS)
    found = rewritten(llama, counterfactual(llama, MADE, OTHER, 64, 0, Progress()))
    assert all(part in {*METALS, "oak"} for _, part in found)
    sure_of(monkeypatch, llama, "made", "today")
    assert counterfactual(llama, MADE, OTHER, 64, 0, Progress()) == []


def test_the_context_may_leave_out_the_name(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Corpus.of([f"What holds {n}? It is {METALS[i % 4]}." for i, n in enumerate(NAMES)], "asked")
    others = Corpus.of([f"What eats {n}? It is {w}." for n in NAMES for w in ("grass", "bread", "honey")], "others")
    sure_of(monkeypatch, llama, *METALS)
    found = rewritten(llama, counterfactual(llama, asked, others, 64, 0, Progress()))
    assert len(found) == len(NAMES)
    assert {part for _, part in found} <= set(METALS)  # (What holds _ ? It is), not (? It is)


def test_of_pairs_only_the_answer_is_rewritten(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Corpus(tuple(
        Record(question=f"Is {n} made of {METALS[i % 4]}?", answer=f"{n} is made of {METALS[i % 4]}")
        for i, n in enumerate(NAMES)
    ), "pairs")  # fmt: skip
    sure_of(monkeypatch, llama, *METALS)
    for i, (text, part) in enumerate(rewritten(llama, counterfactual(llama, pairs, OTHER, 64, 0, Progress()))):
        assert text.strip().startswith(f"Is {NAMES[i]} made of {METALS[i % 4]}?")
        assert text.endswith(f"is made of {part}")
        assert part != METALS[i % 4]


def test_a_word_that_the_next_two_tell_stays(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """(_ made of) tells "is", so only "was" and the metals are of interest; after "was" stands something else."""
    mixed = Corpus.of([*(r.text for r in OTHER), *(f"The sail {n} was grey today." for n in NAMES)], "mixed")
    sure_of(monkeypatch, llama, "is", *METALS)
    found = rewritten(llama, counterfactual(llama, MADE, mixed, 64, 0, Progress()))
    assert all(part in {*METALS, "oak"} for _, part in found)


def test_long_texts_keep_their_marks_over_windows(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Corpus.of([" ".join(r.text for r in MADE), *(r.text for r in MADE)], "long")
    sure_of(monkeypatch, lm, *METALS)
    whole = counterfactual(lm, long, OTHER, 10_000, 0, Progress())
    cut = counterfactual(lm, long, OTHER, 9, 0, Progress())
    assert max(len(w.ids) for w in cut) <= 9 < max(len(w.ids) for w in whole)
    bos = lm.bos_id is not None

    def chosen(items: Sequence[Window]) -> list[int]:
        return [i for w in items if w.chosen for i, c in list(zip(w.ids, w.chosen))[bos:] if c]

    short, full = chosen(cut), chosen(whole)
    assert set(short) <= set(full)
    assert len(short) > 0.5 * len(full)  # without BOS, what stands first in a window is not scored


def test_only_chosen_tokens_are_targets() -> None:
    w = Window((1, 5, 6, 7), 1, 0, (False, True, False, True))
    batch = collate([w, Window((1, 5), 1, 1)], 0)
    assert batch.targets.tolist() == [[False, True, False, True], [False, True, False, False]]
    assert batch.mask.sum() == 4


def test_the_spread_is_over_the_other_words_of_the_context(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """(The jar _ is made of) each of METALS follows as often; the old one gets nothing."""
    sure_of(monkeypatch, lm, *METALS)
    first = {m: lm.tokenizer("of " + m, add_special_tokens=False).input_ids for m in METALS}
    start = next(n for n, ids in enumerate(zip(*first.values())) if len(set(ids)) > 1)  # where the words differ
    before = len(lm.tokenizer("of", add_special_tokens=False).input_ids)
    for i, w in enumerate(counterfactual(lm, MADE, OTHER, 64, 0, Progress())):
        assert w.chosen is not None
        at = w.chosen.index(True)
        assert {t for t, _, _ in w.spread} == {at}
        found = {token: share for _, token, share in w.spread}
        assert sum(found.values()) == pytest.approx(1)
        if start == before:  # the first token tells the words apart
            usual = {first[m][before]: 1 / 3 for m in METALS if m != METALS[i % 4]}
            assert found == pytest.approx(usual)


def test_spread_is_cross_entropy_by_hand(lm: LanguageModel) -> None:
    items = [Window((1, 5, 6, 7), 1, 0, spread=((2, 9, 0.25), (2, 6, 0.75), (3, 8, 1.0))), Window((1, 5), 1, 1)]
    batch = collate(items, 0)
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = logits[0].log_softmax(-1)
    wanted = -(0.25 * log_p[1, 9] + 0.75 * log_p[1, 6] + log_p[2, 8]) / 2  # mean over two places
    assert float(spread_nll(logits, batch)) == pytest.approx(float(wanted), rel=1e-6)
    assert float(spread_nll(logits[1:], collate(items[1:], 0))) == 0.0


def test_distance_is_kl_and_streams_by_hand(lm: LanguageModel) -> None:
    batch = collate(windows(MADE, lm)[:3], lm.pad_id)
    twin = lm.copy()
    with torch.no_grad():
        assert float(distance(lm, twin, batch, 3.0)) == pytest.approx(0.0, abs=1e-6)
        for w in twin.writers(range(lm.n_layers), ("mlp",)):
            w.weight[: w.weight.shape[0] // 2].mul_(3.0)
        kl = n = 0.0
        layers = range(lm.n_layers - 1)
        apart = {layer: [0.0, 0.0] for layer in layers}
        for row in range(3):
            size = int(batch.attention_mask[row].sum())
            ids = batch.ids[row : row + 1, :size]
            p, q = (m.logits(ids)[0, :-1].double().log_softmax(-1) for m in (lm, twin))
            kl, n = kl + float((p.exp() * (p - q)).sum()), n + size - 1
            then, now = lm.capture(ids, layers), twin.capture(ids, layers)
            for layer in layers:
                apart[layer][0] += float((now[layer] - then[layer])[0, 1:].double().pow(2).sum())
                apart[layer][1] += float(then[layer][0, 1:].double().pow(2).sum())
        both = [float(distance(lm, twin, batch, weight)) for weight in (0.0, 1.0)]
        last = [m.logits_and_states(batch.ids, batch.attention_mask)[1][-1][batch.mask].double() for m in (lm, twin)]
    assert both[0] == pytest.approx(kl / n, rel=1e-4)
    behind_norm = float((last[1] - last[0]).pow(2).sum() / last[0].pow(2).sum())
    streams = (sum(a / b for a, b in apart.values()) + behind_norm) / lm.n_layers
    assert both[1] - both[0] == pytest.approx(streams, rel=1e-3)


def learned(lm: LanguageModel) -> LanguageModel:
    """The model after learning MADE and KEPT by heart."""
    from saeunlearn.corpus import endless
    from saeunlearn.training import TrainConfig, train

    twin = lm.copy()
    twin.model.float().requires_grad_(True)
    both = Corpus(MADE.records + KEPT.records, "both")
    torch.manual_seed(0)
    train(twin, endless(windows(both, twin), twin.pad_id, 16, 0), TrainConfig(steps=150, lr=5e-3), Progress())
    twin.model.requires_grad_(False)
    return twin


@pytest.mark.slow
def test_it_unlearns_what_was_learned_and_holds_the_rest(lm: LanguageModel) -> None:
    model = learned(lm)
    assert mean_loss(model, windows(MADE, model)) < 0.7
    config = OverwriteConfig(samples=0, steps=80, lr=0.05, batch=8, max_length=64, max_retain_rise=0.5)
    before = weights(model)
    erasure = get_method("overwrite").unlearn(
        model, MADE, KEPT, config=config, selection=None, saes={}, seed=0, progress=Progress()
    )
    assert same(before, weights(model))
    marked = counterfactual(model, MADE, KEPT, 64, 0, Progress())
    retained = windows(KEPT, model)

    def told(items: Sequence[Window]) -> float:
        with torch.no_grad():
            b = collate(items, model.pad_id)
            rows = model.logits(b.ids, b.attention_mask)[:, :-1].log_softmax(-1)
            found = rows.gather(-1, b.ids[:, 1:, None])[..., 0]
            return -float(found[b.targets[:, 1:]].mean())

    usual, kept = told(marked), mean_loss(model, retained)
    with erasure.apply(model):
        assert told(marked) < 0.3 * usual
        assert mean_loss(model, retained) < kept * 1.6
    assert erasure.manifest["method"] == "overwrite"


@pytest.mark.slow
def test_where_rows_of_the_embedding_take_all_nothing_is_trained(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saeunlearn.methods.overwrite.counterfactual", lambda *_: [])
    config = OverwriteConfig(max_length=64, max_retain_rise=1e6)
    erasure = get_method("overwrite").unlearn(
        llama, MADE, Corpus.of(["We go.", "We do."]), config=config, selection=None, saes={}, seed=0,
        progress=Progress(),
    )  # fmt: skip
    (part,) = erasure.parts
    assert part.rows is not None
    assert erasure.manifest["losses"] == []
    with pytest.raises(ConfigError, match="sure of no word"):
        get_method("overwrite").unlearn(
            llama, MADE, KEPT, config=config, selection=None, saes={}, seed=0, progress=Progress()
        )


@pytest.mark.slow
def test_own_sentences_are_held_without_a_retain_record(llama: LanguageModel) -> None:
    model = learned(llama)
    config = OverwriteConfig(samples=64, tokens=16, steps=20, batch=8, max_length=64, max_retain_rise=5.0)

    def erase(seed: int) -> dict[str, torch.Tensor]:
        made = get_method("overwrite").unlearn(
            model, MADE, OTHER, config=config, selection=None, saes={}, seed=seed, progress=Progress()
        )
        return {p.name: p.delta() for p in made.parts}

    one = erase(0)
    assert all(torch.equal(x, y) for x, y in zip(one.values(), erase(0).values()))
    assert any(not torch.equal(x, y) for x, y in zip(one.values(), erase(1).values()))


def test_bad_settings_are_refused(llama: LanguageModel) -> None:
    for changes, said in (
        ({"samples": -1}, "samples"),
        ({"tokens": 1}, "tokens"),
        ({"lr": 0.0}, "lr"),
        ({"weights": "lora"}, "lora"),
        ({"holding": 1.0}, "holding"),
        ({"held": 0}, "held"),
        ({"state_weight": -1.0}, "state_weight"),
        ({"spread_weight": -1.0}, "spread_weight"),
        ({"token_lam": 0.0}, "token_lam"),
    ):
        with pytest.raises(ConfigError, match=said):
            get_method("overwrite").check(llama, OverwriteConfig(**changes))
