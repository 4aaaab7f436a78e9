"""Steering is the formula with the error term, as a view and as a saved guard."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import IDS, same, weights
from explored import LAYER, opened, saes
from guarded import D_SAE, FEATURES, KINDS, hooks, random_sae
from safetensors.torch import load_file
from torch import Tensor

from saeunlearn.cli import main
from saeunlearn.deploy import DeployError
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError, ErasureError, SelectionError
from saeunlearn.explore.compare import prompt_ids
from saeunlearn.explore.steer import save_guard, steer_view
from saeunlearn.guards import guard_of
from saeunlearn.models import LanguageModel

CHOICE = {40: {"clamp": 3.0}, 5: {"scale": 0.0}, 77: {"scale": 2.5}, 12: {"clamp": -1.0}}
PROMPT = " ".join(SENTENCES[0].split()[:6])


def slow(sae: Any, h: Tensor, choice: dict[int, dict[str, float]]) -> Tensor:
    """h' [position, d] of one sequence through sae_lens: dec(z') + (h − dec(z)), but at the first position."""
    z = sae.encode(h)
    edited = z.clone()
    for j, rule in choice.items():
        edited[:, j] = rule["clamp"] if "clamp" in rule else rule["scale"] * z[:, j]
    out = sae.decode(edited) + (h - sae.decode(z))
    out[0] = h[0]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_is_the_formula(kind: str) -> None:
    sae, h = random_sae(kind), 2 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    rules = [{"clamp": 2.0}, {"scale": 0.0}, {"scale": 3.0}, {"clamp": 0.0}, {"scale": 1.0}]
    guard = guard_of(sae, LAYER, FEATURES, mode="steer", rules=rules)
    counted = torch.ones(1, 40, dtype=torch.bool)
    counted[0, 0] = False
    got, _ = guard.runtime.edit(h[None], counted)
    expected = slow(sae, h, dict(zip(FEATURES, rules)))
    assert torch.allclose(got[0], expected, atol=1e-4, rtol=0)
    assert float((expected - h).abs().max()) > 0.1
    assert sae.cfg.d_sae == D_SAE


@torch.no_grad()
def test_the_view_is_what_the_edited_stream_says(lm: LanguageModel) -> None:
    run, before = opened(lm), weights(lm)
    view = steer_view(run, LAYER, CHOICE, PROMPT, max_new_tokens=4)
    json.dumps(view, allow_nan=False)
    ids = torch.tensor([prompt_ids(lm, PROMPT, 4)])
    assert view["original"] == lm.generate([PROMPT], 4)[0]
    sequence = ids
    with lm.patch({LAYER: lambda h: slow(saes()[LAYER], h[0], CHOICE)[None]}):
        logits = lm.logits(ids)[0]
        for _ in range(4):  # without a cache
            sequence = torch.cat([sequence, lm.logits(sequence)[:, -1:].argmax(-1)], 1)
    eos = lm.tokenizer.eos_token_id
    new = sequence[0, ids.shape[1] :].tolist()
    new = new[: new.index(eos)] if eos in new else new
    assert view["steered"] == lm.tokenizer.decode(new, skip_special_tokens=True)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
    assert view["loss"]["steered"][1:] == pytest.approx(loss, abs=1e-3)
    assert view["loss"]["original"][1:] != pytest.approx(loss, abs=1e-3)
    assert [r["total"] > 0 for r in view["residual"]] == [False, True, True, True]
    assert view["layer"] == LAYER
    assert len(view["tokens"]) == ids.shape[1]
    assert same(before, weights(lm))
    assert hooks(lm) == 0


def test_a_scale_of_one_changes_nothing(llama: LanguageModel) -> None:
    view = steer_view(opened(llama), LAYER, {j: {"scale": 1.0} for j in range(96)}, PROMPT, max_new_tokens=4)
    assert view["steered"] == view["original"]
    assert view["loss"]["steered"] == view["loss"]["original"]


def test_the_hook_comes_off_when_something_breaks(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeunlearn.explore import steer

    run, calls = opened(llama), []

    def broken(*_args: Any) -> Any:
        calls.append(hooks(llama))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr(steer, "look_at", broken)
    with pytest.raises(KeyboardInterrupt):
        steer_view(run, LAYER, CHOICE, PROMPT)
    assert calls[0] < calls[1]
    assert hooks(llama) == 0


# --- as an Erasure -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_guard_does_what_was_shown(lm: LanguageModel, tmp_path: Path) -> None:
    run = opened(lm)
    made = save_guard(run, LAYER, CHOICE, tmp_path / "guard")
    loaded = Erasure.load(tmp_path / "guard")
    assert loaded.id == made.id
    assert loaded.manifest["method"] == "steer"
    assert loaded.manifest["config"] == {"layer": LAYER, "rules": [CHOICE[j] for j in sorted(CHOICE)]}
    assert loaded.manifest["forget_fingerprint"] == run.forget.fingerprint()
    with lm.patch({LAYER: lambda h: slow(saes()[LAYER], h[0], CHOICE)[None]}):
        expected = lm.logits(IDS)
    with loaded.apply(lm):
        assert torch.allclose(lm.logits(IDS), expected, atol=1e-3, rtol=1e-3)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(ErasureError, match="not empty"):
        save_guard(run, LAYER, CHOICE, tmp_path / "taken")


def test_the_verbs_open_it(checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    save_guard(opened(lm), LAYER, CHOICE, tmp_path / "guard")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES[:4]))
    assert main(["inspect", str(tmp_path / "guard")]) == 0
    assert "steer" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(checkpoints("llama")), "--erasure", str(tmp_path / "guard"), "--text",
                 f"retain={tmp_path / 'text.txt'}"]) == 0  # fmt: skip
    assert "nll" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "guard"), str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_it_works_without_the_library(checkpoints: Any, tmp_path: Path) -> None:
    from saeunlearn.export import export

    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    erasure = save_guard(opened(lm), LAYER, CHOICE, tmp_path / "guard")
    export(erasure, tmp_path / "out")
    with erasure.apply(lm), torch.no_grad():
        expected = lm.logits(IDS)
    code = f"""
import sys
sys.modules["saeunlearn"] = None
sys.path.insert(0, {str(tmp_path / "out")!r})
import torch
from safetensors.torch import save_file
from saeunlearn_deploy import attach
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoints("llama"))!r}).eval()
attach(model, {str(tmp_path / "out")!r})
with torch.no_grad():
    save_file({{"logits": model(input_ids=torch.tensor({IDS.tolist()})).logits}}, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.allclose(load_file(tmp_path / "logits")["logits"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "match"),
    [({}, "at least one"), ({96: {"clamp": 1.0}}, "features 0 … 95"), ({-1: {"clamp": 1.0}}, "features 0 … 95"),
     ({5: {}}, "either clamp or scale"), ({5: {"add": 1.0}}, "either clamp or scale"),
     ({5: {"clamp": 1.0, "scale": 2.0}}, "either clamp or scale"), ({5: {"clamp": math.nan}}, "finite number"),
     ({5: {"scale": "2"}}, "finite number"), ({5: {"scale": True}}, "finite number")],
)  # fmt: skip
def test_bad_choices(llama: LanguageModel, tmp_path: Path, choice: Any, match: str) -> None:
    run = opened(llama)
    with pytest.raises(ConfigError, match=match):
        steer_view(run, LAYER, choice, PROMPT)
    with pytest.raises(ConfigError, match=match):
        save_guard(run, LAYER, choice, tmp_path / "guard")
    with pytest.raises(SelectionError, match="has SAEs for"):
        steer_view(run, 0, CHOICE, PROMPT)
    assert not (tmp_path / "guard").exists()


@pytest.mark.parametrize("rules", [None, [], [{"clamp": 1.0}] * 4, [{"clamp": 1.0}] * 4 + [{"add": 1.0}],
                                   [{"clamp": 1.0}] * 4 + [{"scale": math.inf}]])  # fmt: skip
def test_bad_rules_make_no_guard(rules: Any) -> None:
    with pytest.raises(DeployError, match="rule"):
        guard_of(random_sae(), LAYER, FEATURES, mode="steer", rules=rules)
    with pytest.raises(DeployError, match="finite strength"):
        guard_of(random_sae(), LAYER, FEATURES, mode="clamp")
