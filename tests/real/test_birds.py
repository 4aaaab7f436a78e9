"""The main job on a real pretrained model, smaller than benchmarks/birds.py."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_training import SAEConfig, train_saes
from saeunlearn.corpus import Corpus
from saeunlearn.evaluation.attacks.battery import attack
from saeunlearn.evaluation.attacks.case import BUDGETS
from saeunlearn.features.selection import SelectConfig, select
from saeunlearn.methods.sspu import SSPU, SSPUConfig
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

LAYER = 4


@pytest.fixture(scope="module")
def birds() -> Any:
    file = Path(__file__).parents[2] / "benchmarks/birds.py"
    spec = importlib.util.spec_from_file_location("birds", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_birds_go_and_other_stories_stay(
    shared_data: Path, birds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {n: Corpus.load(shared_data / f"tinystories/{n}.jsonl")
            for n in ("forget_birds_train", "forget_birds_test", "retain_train", "retain_test")}  # fmt: skip
    model = LanguageModel.open(shared_data / "stories260K", device="cpu")
    forget, retain = data["forget_birds_train"], data["retain_train"].sample(200, 0)
    both = Corpus(forget.records + retain.records)
    layers = list(range(model.n_layers))
    saes = train_saes(model, both, layers, SAEConfig(tokens=300_000), seed=0, progress=Progress())
    selection = select(model, saes, forget, retain, SelectConfig(layer=LAYER), probe=None, seed=0, progress=Progress())
    config = SSPUConfig(steps=100, batch=8, max_length=128)
    erasure = SSPU().unlearn(
        model, forget, retain, config=config, selection=selection, saes=saes, seed=0, progress=Progress()
    )
    tests = data["forget_birds_test"], data["retain_test"].sample(60, 0)
    before = birds.measure(model, *tests)
    with erasure.apply(model):
        after = birds.measure(model, *tests)
        ids = torch.tensor([[1, 403, 407, 261, 378]])
        with torch.no_grad():
            edited = model.logits(ids)
    assert after["topic"] - before["topic"] > 1.0
    assert after["other"] / before["other"] - 1 < 0.05
    assert after["retain"] / before["retain"] - 1 < 0.02
    small = replace(BUDGETS["quick"], test=40, lora_rates=(2e-3,), steps=16, marks=(16,))
    monkeypatch.setitem(BUDGETS, "quick", small)
    attacked = attack(model, erasure, forget, retain, None, names=["none", "relearn-lora", "few-shot"])
    levels, (none, relearned, shots) = attacked["levels"], attacked["attacks"]
    assert attacked["metric"] == "nll"  # of other bird stories than the ones that are learned again
    assert none["best"]["nll"] == levels["unlearned"]["nll"] > levels["original"]["nll"] + 0.03
    assert relearned["best"]["nll"] < none["best"]["nll"] - 0.01
    assert none["best"]["recovered"] == 0 < relearned["best"]["recovered"]
    assert "needs multiple-choice questions" in shots["skipped"]
    erasure.merge(shared_data / "stories260K", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, edited, atol=1e-5, rtol=1e-5)
