"""Healing: what it must not touch, the guard on forget text, whose sentences it reads, and bad input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import applied_logits, deltas, make, same, weights
from micro import Finished, read, run_config
from toys import FORGET, RETAIN

from saeunlearn.cli import main
from saeunlearn.corpus import Corpus, windows
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import Cancelled, ConfigError
from saeunlearn.healing import ERASED, HealConfig, heal, held_by
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.keyerasure import KeyErasureConfig
from saeunlearn.models import LanguageModel
from saeunlearn.own_text import own_sentences
from saeunlearn.pipeline import unlearn
from saeunlearn.progress import Progress

CONFIG = HealConfig(steps=12, lr=3e-3, batch=8, samples=40, tokens=12, max_length=32, max_return=0.999)


def healed(lm: LanguageModel, erasure: Erasure, *, forget: Corpus = FORGET, seed: int = 0,
           progress: Progress | None = None, **changes: Any) -> Erasure:  # fmt: skip
    config = dataclasses.replace(CONFIG, **changes)
    return heal(lm, erasure, forget, RETAIN, config, seed, progress or Progress())


@torch.no_grad()
def distance(lm: LanguageModel, erasure: Erasure) -> float:
    """KL(original ‖ edited) over retain text, nats a token, by hand."""
    total, n = 0.0, 0
    with erasure.apply(twin := lm.copy()):
        for w in windows(RETAIN, lm, 32):
            p, q = (m.model(input_ids=torch.tensor([w.ids])).logits[0].double().log_softmax(-1) for m in (lm, twin))
            total += float((p.exp() * (p - q)).sum())
            n += len(w.ids)
    return total / n


@torch.no_grad()
def streams(lm: LanguageModel, erasure: Erasure) -> float:
    """E‖h − h₀‖² / E‖h₀‖² over retain text after the block before the last."""
    layer, apart, size = lm.n_layers - 2, 0.0, 0.0
    with erasure.apply(twin := lm.copy()):
        for w in windows(RETAIN, lm, 32):
            then, now = (m.capture(torch.tensor([w.ids]), [layer])[layer][0, 1:].double() for m in (lm, twin))
            apart, size = apart + float((now - then).pow(2).sum()), size + float(then.pow(2).sum())
    return apart / size


def matrices(erasure: Erasure) -> dict[str, torch.Tensor]:
    """ΔW by name, canonical."""
    return {p.name: p.delta() for p in erasure.parts if isinstance(p, WeightDelta)}


def test_it_comes_nearer_to_the_original_and_writes_to_no_erased_direction(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(lm)
    edit = make(lm, deltas(lm, (2, None), scale=0.5))
    result = healed(lm, edit, state_weight=0.0)
    assert same(before, weights(lm))
    assert distance(lm, result) < 0.9 * distance(lm, edit)
    stored = {p.name: p.transposed for p in edit.parts if isinstance(p, WeightDelta)}
    now = {n: d.T if stored.get(n) else d for n, d in matrices(result).items()}
    assert len(now) > len(edit.parts)  # it may repair elsewhere too
    for name, old in matrices(edit).items():
        _, sizes, right = torch.linalg.svd(old.double())
        energy = sizes.pow(2).cumsum(0) / sizes.pow(2).sum()
        r = int((energy < ERASED).sum()) + 1
        change = now[name].double() - old.double()
        assert float((change @ right[:r].T).norm()) < 1e-4 * max(1.0, float(change.norm()))
        if r < len(right):
            assert float(change.norm()) > 1e-3  # the rest is free
    monkeypatch.setattr("saeunlearn.healing.mean_loss", lambda *_: 1.0)  # no guard
    assert streams(lm, healed(lm, edit)) < streams(lm, healed(lm, edit, state_weight=0.0))


def own_text(lm: LanguageModel) -> Corpus:
    """What the random model itself goes on with: any other text an edit may only help it to read."""
    prompts = [" ".join(r.text.split()[:3]) for r in FORGET]
    return Corpus.of([f"{p} {g}" for p, g in zip(prompts, lm.generate(prompts, 12))], "own")


def test_rows_that_the_edit_moved_far_stay(lm: LanguageModel) -> None:
    own = own_text(lm)
    config = KeyErasureConfig(matrices="embed", token_lam=0.4, max_length=32, max_retain_rise=1e6)
    edit = get_method("key-erasure").unlearn(
        lm, own, RETAIN, config=config, selection=None, saes={}, seed=0, progress=Progress()
    )
    (part,) = edit.parts
    assert isinstance(part, WeightDelta)
    assert part.rows is not None
    embedding = lm.model.get_input_embeddings().weight
    with edit.apply(lm):
        held = held_by(part, embedding).rows
        edited = embedding.detach().clone()
    assert held is not None
    assert 0 < len(held) < len(embedding)
    with healed(lm, edit, forget=own).apply(lm):
        now = embedding.detach().clone()
    assert torch.allclose(now[held], edited[held], atol=1e-6)
    others = [i for i in range(len(now)) if i not in set(held.tolist())]
    assert not torch.allclose(now[others], edited[others], atol=1e-4)


def test_the_guard_takes_no_more_healing_than_forgetting_allows(llama: LanguageModel) -> None:
    own = own_text(llama)
    watched = windows(own, llama, 32)
    original = mean_loss(llama, watched)
    edit = make(llama, deltas(llama, (2, 3), scale=3.0))
    with edit.apply(llama):
        edited = mean_loss(llama, watched)
    assert edited > original + 0.1
    free = healed(llama, edit, forget=own).manifest["extra"]["heal"]
    assert free["scale"] == 1
    assert free["forget_loss"]["healed"] < edited - 0.05  # without a guard it walks back
    result = healed(llama, edit, forget=own, max_return=0.01)
    said = result.manifest["extra"]["heal"]
    assert 0 < said["scale"] < 1
    with result.apply(llama):
        loss = mean_loss(llama, watched)
    assert loss == pytest.approx(said["forget_loss"]["healed"], abs=1e-4)
    assert loss >= edited - 0.01 * (edited - original) - 1e-4
    assert said["forget_loss"]["edited"] == pytest.approx(edited, abs=1e-4)


def test_one_seed_one_result(llama: LanguageModel, tmp_path: Path) -> None:
    edit = make(llama)
    first = healed(llama, edit)
    assert healed(llama, edit).id == first.id != healed(llama, edit, seed=1).id
    assert first.manifest["config"]["heal"]["steps"] == 12
    assert first.manifest["method"] == edit.manifest["method"]
    assert len(first.manifest["extra"]["heal"]["kl"]) == 12
    first.save(tmp_path / "e")
    assert torch.equal(applied_logits(llama, Erasure.load(tmp_path / "e")), applied_logits(llama, first))


def test_sentences_are_the_originals_and_not_like_forget_text(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_sentences(llama, FORGET, RETAIN, CONFIG.samples, CONFIG.tokens, 0, Progress())
    assert len(own) == CONFIG.samples
    assert [r.text for r in own] == [
        r.text for r in own_sentences(llama, FORGET, RETAIN, CONFIG.samples, CONFIG.tokens, 0, Progress())
    ]
    # A model that writes nothing but one sentence of the forget set has nothing to say.
    ids = windows(FORGET, llama, 32)[0].ids[: CONFIG.tokens]
    monkeypatch.setattr(llama.model, "generate", lambda *, input_ids, **_: torch.tensor([ids] * len(input_ids)))
    with pytest.raises(ConfigError, match="look like forget text"):
        own_sentences(llama, FORGET, RETAIN, CONFIG.samples, CONFIG.tokens, 0, Progress())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0; use at least 1"),
        ({"batch": 0}, "batch = 0"),
        ({"samples": -1}, "samples = -1"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"max_return": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_settings(llama: LanguageModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        healed(llama, make(llama), **change)


def test_cancelled_leaves_the_model_as_it_was(llama: LanguageModel) -> None:
    before, progress = weights(llama), Progress()

    def stop(event: dict[str, Any]) -> None:
        progress.cancelled = event.get("what") == "healing"

    progress.on_event = stop
    with pytest.raises(Cancelled):
        healed(llama, make(llama), progress=progress)
    assert same(before, weights(llama))


@pytest.mark.slow
def test_a_run_heals_after_its_method(finished: Finished, micro: Any, micro_data: Path, tmp_path: Path) -> None:
    heal_settings = {"steps": 6, "batch": 8, "samples": 20, "tokens": 12}
    settings = {"matrices": "embed,down", "lam": 0.3, "max_retain_rise": 5.0}
    config = run_config(micro, micro_data, method="key-erasure", settings=settings, heal=heal_settings, saes=None)
    run = unlearn(config, tmp_path / "run", Progress())
    first, last = Erasure.load(run.root / "unhealed"), Erasure.load(run.erasure_dir)
    assert "heal" not in first.manifest["config"]
    assert last.manifest["config"]["heal"]["steps"] == 6
    assert last.id != first.id
    assert read(run.root / "run.json")["status"] == "done"
    assert any(n.startswith("unhealed/") for n in read(run.root / "report.json")["files"])
    assert main(["verify", str(run.root), "--sample", "8"]) == 0
    for method, said in (("clamp", "nothing to heal"), ("key-erasure", "healing: steps = 0")):
        bad = dataclasses.replace(config, method=method, settings={}, heal={"steps": 0 if method != "clamp" else 3})
        with pytest.raises(ConfigError, match=said):
            unlearn(bad, tmp_path / method, Progress())
