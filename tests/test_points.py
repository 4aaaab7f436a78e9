"""Points of the frontier, their intervals and tests: by hand and against scipy."""

from __future__ import annotations

from dataclasses import replace

import comparisons
import numpy as np
import pytest
import scipy.stats
import torch
from erasures import make
from sspu_runs import LAYER, sae_for

from saeunlearn.corpus import Corpus
from saeunlearn.errors import ConfigError
from saeunlearn.evaluation.points import (
    LIMITS,
    PENALTY,
    Sheet,
    at_strength,
    best_within,
    counted_steps,
    measures,
    objective,
    point,
    sheet_of,
)
from saeunlearn.evaluation.resampling import holm, paired_tests, resample
from saeunlearn.guards import guard_of
from saeunlearn.models import LanguageModel

CHANCE = 0.25
SHEET = Sheet(
    ids=[str(i) for i in range(12)],
    groups=["forget/seen"] * 4 + ["forget/held_out"] * 2 + ["near/seen"] * 2 + ["near/untouched"] * 2 + ["far"] * 2,
    before=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1], floor=[CHANCE] * 12, floor_is="chance",
)  # fmt: skip


# --- points ------------------------------------------------------------------------------------------------


def test_a_point_by_hand() -> None:
    after = [1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1]
    # seen: 1/4 right, the floor: all gone. held out: (1/2 − 1/4) / (1 − 1/4) = 1/3 left. near: 2 of 3; far: 2 of 2.
    got = point(SHEET, after)
    assert got["forgetting"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["retention"] == pytest.approx(2 / 3)
    assert got["groups"] == {"forget/seen": 0.25, "forget/held_out": 0.5, "near/seen": 1.0, "near/untouched": 0.0,
                             "far": 1.0}  # fmt: skip


def test_below_the_floor_earns_nothing_and_the_oracle_is_a_floor() -> None:
    nothing, chance = [0.0] * 6 + [1.0] * 6, [1.0] + [0.0] * 5 + [1.0] * 6
    assert point(SHEET, nothing)["forgetting"] == 1.0
    assert point(SHEET, chance)["forgetting"] == 1.0
    knows = replace(SHEET, floor=[1, 1, 0, 0, 1, 0, *[0.0] * 6], floor_is="oracle")
    assert point(knows, [1, 1, 0, 0, 0, 1, *[1.0] * 6])["forgetting"] == 1.0
    assert point(knows, [1, 1, 1, 0, 0, 1, *[1.0] * 6])["forgetting"] == pytest.approx(0.75)
    assert point(SHEET, SHEET.before)["forgetting"] == 0.0


def test_weights_count_questions_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    after = rng.integers(0, 2, 12).astype(float)
    weights = rng.integers(1, 4, (5, 12))
    got = measures(SHEET, after, weights)
    for b, row in enumerate(weights):
        index = [i for i, n in enumerate(row) for _ in range(n)]
        again = Sheet(*([x[i] for i in index] for x in (SHEET.ids, SHEET.groups, SHEET.before, SHEET.floor)), "chance")
        same = point(again, after[index])
        assert (got[0][b], got[1][b]) == pytest.approx((same["forgetting"], same["retention"]))


def test_what_tuning_maximises() -> None:
    assert objective(0.7, 0.97) == 0.7
    assert objective(0.7, LIMITS[-1]) == 0.7
    assert objective(0.9, LIMITS[-1] - 0.03) == pytest.approx(0.9 - 0.03 * PENALTY)


def test_the_best_within_a_limit() -> None:
    curve = [{"forgetting": f, "retention": r} for f, r in ((0.9, 0.9), (0.7, 0.96), (0.6, 0.97), (0.3, 0.995))]
    assert best_within(curve, 0.95) == curve[1]
    assert best_within(curve, 0.99) == curve[3]
    assert best_within(curve[:2], 0.99) is None


def test_half_an_edit(llama: LanguageModel) -> None:
    erasure = make(llama)
    weights = {n: p.detach().clone() for n, p in llama.model.named_parameters()}
    with at_strength(erasure, 0.5).apply(llama):
        for part in erasure.parts:
            now = llama.model.get_parameter(part.name).detach()
            torch.testing.assert_close(now, weights[part.name] + 0.5 * part.delta())
    assert at_strength(erasure, 1.0) is erasure
    guard = make(llama, [guard_of(sae_for(), LAYER, [0, 1], strength=3.0)])  # type: ignore[list-item]
    assert [p.runtime.spec["strength"] for p in at_strength(guard, 0.5).parts] == [1.5]  # type: ignore[attr-defined]
    assert all(torch.equal(p, weights[n]) for n, p in llama.model.named_parameters())


def test_optimiser_steps_are_counted() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimisers = [torch.optim.AdamW([p]), torch.optim.SGD([p], lr=0.1)]
    with counted_steps() as count:
        for o in [*optimisers, optimisers[0]]:
            p.grad = torch.ones(2)
            o.step()
    optimisers[0].step()
    assert count == [3]


def test_questions_that_show_nothing_are_refused(llama: LanguageModel) -> None:
    case = comparisons.case("a", llama)
    questions = case.questions
    kept = Corpus(tuple(q for q in questions if q.meta["set"] != "forget"), "q")
    with pytest.raises(ConfigError, match="field `set` says forget"):
        sheet_of(case.model, kept)
    wrong = tuple(replace(q, answer=next(c for c in q.choices if c != q.answer)) for q in questions)
    with pytest.raises(ConfigError, match="no more than the floor"):
        sheet_of(case.model, Corpus(wrong, "q"))
    with pytest.raises(ConfigError, match=r"oracle: 1\.000"):
        sheet_of(case.model, case.questions, llama)


# --- intervals and tests -----------------------------------------------------------------------------------


def flat(n: int, groups: tuple[str, ...] = ("forget", "near")) -> Sheet:
    """n questions of each group, all known, floor 0."""
    labels = [g for g in groups for _ in range(n)]
    return Sheet([str(i) for i in range(len(labels))], labels, [1.0] * len(labels), [0.0] * len(labels), "chance")


def test_questions_are_resampled_as_scipy_does() -> None:
    rng = np.random.default_rng(1)
    gone = rng.random(60) < 0.7
    answers = [*(~gone).astype(float), *[1.0] * 60]
    drawn, kept = resample({"w": flat(60)}, ["w"], {"m": [answers]}, 0)["m"]
    said = scipy.stats.bootstrap((gone,), np.mean, method="percentile", n_resamples=20_000, rng=2)
    assert np.percentile(drawn, [2.5, 97.5]) == pytest.approx(list(said.confidence_interval), abs=0.02)
    assert drawn.std() == pytest.approx(said.standard_error, rel=0.05)
    assert (kept == 1).all()


def test_runs_are_resampled_together_with_questions() -> None:
    sheet, shares = flat(40), [0.2, 0.5, 0.6, 0.9]
    runs = [[0.0] * round(40 * s) + [1.0] * (40 - round(40 * s)) + [1.0] * 40 for s in shares]
    drawn, _ = resample({"w": sheet}, ["w"] * 4, {"m": runs}, 0)["m"]
    # The same questions for all runs of a case, slowly.
    rng = np.random.default_rng(3)
    table = 1 - np.array(runs)[:, :40]
    slow = []
    for _ in range(4000):
        q, r = rng.integers(0, 40, 40), rng.integers(0, 4, 4)
        slow.append(table[r][:, q].mean())
    assert drawn.mean() == pytest.approx(0.55, abs=0.01)
    assert drawn.std() == pytest.approx(np.std(slow), rel=0.06)


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    sheets = {w: flat(80) for w in "ab"}
    shares = [0.3, 0.8, 0.4, 0.9]  # runs differ much
    weak = [[*(rng.random(80) > s).astype(float), *[1.0] * 80] for s in shares]
    strong = [[0.0 if i % 3 == 0 else v for i, v in enumerate(r[:80])] + [1.0] * 80 for r in weak]
    found = resample(sheets, ["a", "b", "a", "b"], {"weak": weak, "strong": strong, "same": weak}, 0)
    drawn = {m: f for m, (f, _) in found.items()}
    rows = {(r["first"], r["second"]): r for r in paired_tests(drawn)}
    assert rows["weak", "strong"]["p_holm"] < 0.01
    assert rows["weak", "strong"]["high"] < 0
    assert rows["weak", "same"]["p"] == 1.0
    assert np.percentile(drawn["weak"], 97.5) > np.percentile(drawn["strong"], 2.5)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
