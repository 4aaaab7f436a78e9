"""The two-sided verdict against hand-worked cases; its interval against the published one."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError
from saeunlearn.evaluation.evaluate import evaluate
from saeunlearn.evaluation.verdict import paired_interval, verdict, verdicts
from saeunlearn.models import LanguageModel


def scores(right: int, n: int) -> list[int]:
    return [1] * right + [0] * (n - right)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    return [1] * (both + first) + [0] * (second + neither), [1] * both + [0] * first + [1] * second + [0] * neither


@pytest.mark.parametrize(
    ("cells", "limits"),
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((20, 12, 2, 16), (0.0562, 0.3292)),
        ((18, 12, 2, 18), (0.0562, 0.3290)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((35, 14, 0, 1), (0.1461, 0.4175)),
        ((18, 14, 0, 18), (0.1441, 0.3963)),
        ((2, 97, 1, 0), (0.8721, 0.9854)),
    ],
)
def test_the_interval_is_newcombes(cells: tuple[int, int, int, int], limits: tuple[float, float]) -> None:
    """Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10."""
    first, second = pairs(*cells)
    assert paired_interval(first, second) == pytest.approx(limits, abs=5e-5)
    low, high = paired_interval(second, first)
    assert (-high, -low) == pytest.approx(limits, abs=5e-5)


def test_the_interval_covers_and_is_never_a_point() -> None:
    rng = np.random.default_rng(0)
    chances = np.array([0.3, 0.1, 0.05, 0.55])  # both, first only, second only, neither: a difference of .05
    tables = rng.multinomial(60, chances, 2000)
    inside = 0
    for cells in tables:
        low, high = paired_interval(*pairs(*cells))
        inside += low <= 0.05 <= high
    assert 0.93 < inside / len(tables) < 0.985
    for row in (scores(0, 5), scores(5, 5)):
        low, high = paired_interval(row, row)
        assert low < -0.2
        assert high > 0.2


@pytest.mark.parametrize(
    ("right", "said", "certain"),
    [
        (250, "like the oracle", True),  # the same questions as the oracle
        (300, "like the oracle", False),  # .05 above: on the edge, so the interval crosses it
        (301, "still there", False),
        (500, "still there", True),
        (200, "like the oracle", False),
        (199, "suppressed", False),
        (0, "suppressed", True),
    ],
)
def test_forget_groups(right: int, said: str, certain: bool) -> None:
    n = 1000
    got = verdict(scores(n, n), scores(right, n), scores(250, n))
    assert (got["verdict"], got["certain"]) == (said, certain)
    assert got["difference"] == pytest.approx((right - 250) / n)
    assert got["forgotten"] == pytest.approx((n - right) / 750)
    assert got["low"] <= got["difference"] <= got["high"]


def test_a_group_that_the_original_did_not_know_tests_nothing() -> None:
    for right, expected in ((24, "no test"), (30, "no test"), (60, "no test"), (0, "suppressed")):
        got = verdict(scores(30, 100), scores(right, 100), scores(25, 100))
        assert (got["verdict"], got["certain"]) == (expected, expected == "suppressed")
    assert verdict(scores(10, 100), scores(0, 100), scores(25, 100))["forgotten"] is None


@pytest.mark.parametrize(
    ("right", "said", "certain"), [(1000, "kept", True), (950, "kept", False), (949, "damaged", False)]
)
def test_other_groups_may_be_better_but_not_worse(right: int, said: str, certain: bool) -> None:
    n = 1000
    got = verdict(scores(n, n), scores(right, n), scores(n, n), forget=False)
    assert (got["verdict"], got["certain"], got["forgotten"]) == (said, certain, None)
    better = verdict(scores(n, n), scores(n, n), scores(500, n), forget=False)
    assert (better["verdict"], better["certain"]) == ("kept", True)


def test_few_questions_never_make_certain() -> None:
    got = verdict(scores(8, 8), scores(2, 8), scores(2, 8))
    assert (got["verdict"], got["certain"]) == ("like the oracle", False)


@pytest.mark.parametrize("bad", [([1], [1, 0], [1, 0]), ([], [], []), ([1, 1], [0, 0.5], [0, 1])])
def test_bad_scores(bad: tuple[list[float], ...]) -> None:
    with pytest.raises(ConfigError, match=r"same questions|right \(1\) or wrong"):
        verdict(*bad)


def test_verdicts_of_evaluations(llama: LanguageModel) -> None:
    questions = Corpus(
        tuple(
            Record(question=f"{name} keeps the", answer="old map", choices=("old map", "tower"), meta={"set": s})
            for s in ("forget", "near")
            for name in ("Mara", "Tobin", "Elsa")
        )
    )

    def measured() -> Any:
        return evaluate(llama, questions=questions, texts=None, prompts=())

    oracle = measured()
    with torch.no_grad():
        llama.model.lm_head.weight.neg_()
    original = measured()
    rows = verdicts(original, oracle, oracle)
    assert {(r["group"], r["metric"]) for r in rows} == {
        (g, m) for g in ("forget", "near") for m in ("multiple_choice", "cloze")
    }
    for r in rows:
        scored = {k: d["groups"][r["group"]][r["metric"]]["values"] for k, d in (("a", original), ("o", oracle))}
        expected = verdict(scored["a"], scored["o"], scored["o"], forget=r["group"] == "forget")
        assert {k: v for k, v in r.items() if k not in ("group", "metric")} == expected
    other = copy.deepcopy(oracle)
    other["groups"]["near"]["cloze"]["ids"][0] = "0" * 16
    with pytest.raises(ConfigError, match=r"near cloze: .* same records"):
        verdicts(original, oracle, other)
