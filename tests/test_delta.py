"""δ-unlearning: an offset trained beside a base model, which may be a black box."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import IDS, make, same, trained_twin, weights
from torch import Tensor
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, endless, windows
from saeunlearn.erasure import Erasure
from saeunlearn.errors import Cancelled, ConfigError, OverlapError, TokenizerMismatchError
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.delta import DeltaConfig, unlearn_offset
from saeunlearn.models import LanguageModel
from saeunlearn.offsets import Ensemble, Offset
from saeunlearn.progress import Progress
from saeunlearn.training import TrainConfig, train


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, small_folder: Path, checkpoints: Any) -> tuple[Path, Path]:
    """(a Llama, a GPT-2 with its tokenizer) that have learnt the forget and retain texts."""
    folder = tmp_path_factory.mktemp("learnt")
    for name, source in (("base", checkpoints("llama")), ("small", small_folder)):
        lm = LanguageModel.open(source, device="cpu")
        both = Corpus((*FORGET.records, *RETAIN.records), "both")
        train(lm, endless(windows(both, lm), lm.pad_id, 16, 0), TrainConfig(steps=60, lr=5e-3), Progress())
        lm.save(folder / name)
    return folder / "base", folder / "small"


def config(folder: Path | str = "", **given: Any) -> DeltaConfig:
    settings = {"weights": "lora", "rank": 4, "lr": 0.005, "steps": 12, "batch": 8, "max_length": 32,
                "retain_weight": 1.0, "max_retain_rise": 0.1, "check_every": 4, "loss": "npo"}  # fmt: skip
    return DeltaConfig(**{**settings, "offset_model": str(folder), **given})


def unlearn(lm: LanguageModel, settings: DeltaConfig, progress: Progress | None = None, seed: int = 0) -> Erasure:
    return get_method("delta").unlearn(
        lm, FORGET, RETAIN, config=settings, selection=None, saes={}, seed=seed, progress=progress or Progress()
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ga", "graddiff", "kl", "npo", "simnpo"])
def test_training_forgets_within_the_budget(learnt: tuple[Path, Path], loss: str) -> None:
    lm = LanguageModel.open(learnt[0], device="cpu")
    before, training = weights(lm), lm.model.training
    forget, held = windows(FORGET, lm, 32), windows(RETAIN.split(0.2, 0)[1], lm, 32)
    f0, r0 = mean_loss(lm, forget), mean_loss(lm, held)
    erasure = unlearn(lm, config(learnt[1], loss=loss, max_retain_rise=0.005))
    assert same(weights(lm), before)
    assert lm.model.training == training
    assert mean_loss(lm, forget) == f0
    (part,) = erasure.parts
    said = erasure.manifest["extra"]["budget"]
    assert isinstance(part, Offset)
    assert math.isclose(part.weight, said["scale"])
    with erasure.apply(lm):
        forget_rise, retain_rise = mean_loss(lm, forget) - f0, mean_loss(lm, held) / r0 - 1
    with make(lm, [replace(part, weight=1.0)]).apply(lm):  # what was trained is what is stored
        trained_rise = mean_loss(lm, held) / r0 - 1
    assert math.isclose(trained_rise, erasure.manifest["losses"][-1]["retain_rise"], abs_tol=1e-3)
    assert forget_rise > 0.05
    assert retain_rise <= 0.005 + 1e-4
    assert math.isclose(retain_rise, said["retain_rise"], abs_tol=1e-4)


@pytest.mark.slow
def test_it_is_deterministic_and_weights_may_be_trained_densely(learnt: tuple[Path, Path]) -> None:
    lm = LanguageModel.open(learnt[0], device="cpu")
    settings = config(learnt[1], weights="c_proj", steps=4, lr=0.01, update="restricted", offset_weight=2.0)
    one, two, other = (unlearn(lm, settings, seed=s) for s in (0, 0, 1))
    assert one.id == two.id != other.id
    assert {c.rank for c in one.parts[0].changes} == {None}  # type: ignore[attr-defined]
    assert math.isclose(one.parts[0].weight, 2.0 * one.manifest["extra"]["budget"]["scale"])  # type: ignore[attr-defined]


class BlackBox:
    """A model of which there is nothing but logits, with a vocabulary that is padded to a round number."""

    def __init__(self, model: Any, vocabulary: dict[str, int]) -> None:
        self.vocabulary, self._model, self.calls = vocabulary, model, 0

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        self.calls += 1
        logits = self._model(input_ids=ids).logits
        return torch.cat([logits, torch.full((*ids.shape, 8), -5.0)], -1).half()


@pytest.mark.slow
def test_a_base_model_may_be_any_callable(learnt: tuple[Path, Path]) -> None:
    lm, small = (LanguageModel.open(folder, device="cpu") for folder in learnt)
    box, before = BlackBox(lm.model, lm.vocabulary), weights(small)
    settings = config(steps=6, check_every=6)
    calls_before = box.calls
    got = unlearn_offset(box, small, FORGET, RETAIN, config=settings, seed=0)
    assert same(weights(small), before)
    assert not hasattr(small.model, "peft_config")
    (part,) = got.parts
    assert box.calls - calls_before < 2 * settings.steps + 20  # once a batch, and the checks of the budget
    forget = windows(FORGET, small, 32)
    plain, ensemble = Ensemble(box, small), Ensemble(box, small, [part.runtime()])
    assert mean_loss(ensemble, forget) > mean_loss(plain, forget) + 0.05  # type: ignore[arg-type]
    # The same as on the model itself, up to the box's half precision.
    reference = unlearn_offset(lm, small, FORGET, RETAIN, config=settings, seed=0)
    assert math.isclose(reference.losses[-1]["forget"], got.losses[-1]["forget"], rel_tol=0.05)
    ids = IDS[:, :6]
    expected = box.logits(ids).float()
    expected[..., : small.d_vocab] += part.weight * (trained_twin(small, part).logits(ids) - small.logits(ids))
    torch.testing.assert_close(ensemble.logits(ids), expected.detach(), atol=1e-4, rtol=1e-4)


def test_what_cannot_work_is_refused_before_training(learnt: tuple[Path, Path], tmp_path: Path) -> None:
    lm = LanguageModel.open(learnt[0], device="cpu")
    refused = [
        (config(""), "needs offset_model"),
        (config(learnt[1], loss="sspu"), "unknown loss 'sspu'; use one of ga"),
        (config(learnt[1], loss="delta"), "unknown loss"),
        (config(learnt[1], loss="ga", beta=0.1), "no beta"),
        (config(learnt[1], beta=-1.0), "beta must be positive"),
        (config(learnt[1], offset_weight=0.0), "offset_weight must be positive"),
        (config(learnt[1], weights="down_proj"), "no weights named down_proj"),
    ]
    events: list[Any] = []
    for settings, match in refused:
        with pytest.raises(ConfigError, match=match):
            unlearn(lm, settings, Progress(events.append))
    method, progress = get_method("delta"), Progress(events.append)
    with pytest.raises(OverlapError):
        method.unlearn(lm, FORGET, FORGET, config=config(learnt[1]), selection=None, saes={}, seed=0, progress=progress)
    assert not events
    progress = Progress()
    progress.cancelled = True
    with pytest.raises(Cancelled):
        unlearn(lm, config(learnt[1]), progress)
    with pytest.raises(TokenizerMismatchError):
        unlearn_offset(BlackBox(lm.model, {"a": 0}), lm, FORGET, RETAIN, config=config(), seed=0)
