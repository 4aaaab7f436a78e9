"""Edits side by side, published claims, and the demo's configurations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import comparisons
import pytest
import torch

import saeunlearn
from saeunlearn import demo
from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import ConfigError
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.evaluation.points import at_strength, measures, sheet_of
from saeunlearn.evaluation.published import Claim, judge, less, markdown, verdict
from saeunlearn.evaluation.side_by_side import frontier_points, side_by_side
from saeunlearn.models import LanguageModel
from saeunlearn.sandbox.build import DEMO_SETTINGS, Sandbox


def noise(lm: LanguageModel, seed: int, size: float) -> Erasure:
    (w,) = lm.writers([1])
    dense = size * float(w.weight.detach().std()) * torch.randn(w.d_out, w.d_in, generator=_generator(seed))
    return Erasure.create(lm, [WeightDelta(w.name, w.transposed, dense=dense)], method="noise", config={}, seed=seed,
                          forget_fingerprint="f" * 64, retain_fingerprint="r" * 64)  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_strength_is_measured_and_ranges_over_runs_and_questions(llama: LanguageModel) -> None:
    questions = comparisons.case("a", llama).questions
    erasures = {"weak": [noise(llama, s, 0.5) for s in (0, 1)], "strong": [noise(llama, s, 6.0) for s in (0, 1)]}
    found = side_by_side(llama, questions, erasures, strengths=(1.0, 0.1))
    sheet = sheet_of(llama, questions)
    with at_strength(erasures["strong"][1], 0.1).apply(llama):
        expected = measures(sheet, multiple_choice(llama, questions).values)
    point = found["methods"]["strong"][1]
    run = point["runs"][1]
    assert (run["forgetting"], run["retention"]) == tuple(float(x[0]) for x in expected)
    for row in (p for points in found["methods"].values() for p in points):
        for outcome in ("forgetting", "retention"):
            values = [r[outcome] for r in row["runs"]]
            assert row[outcome]["mean"] == pytest.approx(sum(values) / 2)
            assert row[outcome]["low"] <= row[outcome]["high"]
    assert found["methods"]["strong"][0]["forgetting"]["mean"] > found["methods"]["weak"][0]["forgetting"]["mean"]
    (test,) = found["tests"]["forgetting"]
    assert (test["first"], test["second"]) == ("weak", "strong")
    points = frontier_points(found)
    assert [p["series"] for p in points] == ["weak"] * 2 + ["strong"] * 2
    assert points[2]["y"] == pytest.approx(1 - found["methods"]["strong"][0]["forgetting"]["mean"])
    with pytest.raises(ConfigError, match="same number of runs"):
        side_by_side(llama, questions, {**erasures, "one": erasures["weak"][:1]})


def test_a_verdict_follows_from_the_runs() -> None:
    claim = Claim("A", "forgets", "score", [0.2, 0.3, 0.4], at_most=0.4)
    assert verdict(claim) == "confirmed"
    assert verdict(replace(claim, at_most=0.3)) == "unsure"
    assert verdict(replace(claim, at_most=None, at_least=0.5)) == "not confirmed"
    assert verdict(replace(claim, at_least=0.25)) == "unsure"
    assert verdict(replace(claim, values=None)) == "not testable here"
    for bad in (replace(claim, values=[]), replace(claim, at_most=None)):
        with pytest.raises(ConfigError, match="values and a bound"):
            verdict(bad)
    rows = judge([claim, Claim("B", "draws | pictures", "no pictures here")])
    assert (rows[0]["mean"], rows[0]["low"], rows[0]["high"]) == (pytest.approx(0.3), 0.2, 0.4)
    text = markdown(rows)
    assert "| 0.3 (0.2 … 0.4), 3 | ≤ 0.4 | **confirmed** |" in text
    assert r"draws \| pictures | no pictures here | – | – | **not testable here**" in text
    assert less([0.5, 0.25], [1.0, 0.75, 9.0]) == [0.5, 0.5]


def test_the_demo_has_settings_for_its_own_size(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Sandbox(tmp_path)
    sizes = {"d_model": 128}
    monkeypatch.setattr(Sandbox, "describe", lambda _self: {"config": sizes})
    full = demo.config(box, select={"layer": 2}, settings={"basis": "random_rows"}, seed=3)
    assert full.settings == {**DEMO_SETTINGS, "basis": "random_rows"}
    assert (full.select["layer"], full.select["k"], full.seed, full.method) == (2, 32, 3, "sspu")
    assert full.model == str(box.model)
    assert demo.config(box, "npo").settings == {}
    sizes["d_model"] = demo.TINY.d_model
    assert demo.config(box).settings == demo.TINY_SETTINGS
    assert demo.config(box, "npo").settings == {"steps": 8}
    assert demo.config(box, "clamp").settings == {}


@pytest.mark.slow
def test_the_top_level_has_what_work_begins_with_and_imports_it_late() -> None:
    assert saeunlearn.Corpus is Corpus
    assert set(saeunlearn.__all__) <= set(dir(saeunlearn))
    assert all(getattr(saeunlearn, name) is not None for name in saeunlearn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        saeunlearn.nothing  # noqa: B018
    late = "import sys, saeunlearn; assert not {'torch', 'numpy'} & set(sys.modules); from saeunlearn import Corpus"
    subprocess.run([sys.executable, "-c", late], check=True)
