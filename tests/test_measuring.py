"""The metrics on models whose answer is known: original, oracle, random labels (benchmarks/measuring.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from saeunlearn.corpus import Corpus
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox, build_oracle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measuring() -> Any:
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "measuring.py"
    spec = importlib.util.spec_from_file_location("measuring", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(micro: Sandbox, measuring: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    box = Sandbox(tmp_path_factory.mktemp("measuring") / "sandbox")
    shutil.copytree(micro.root, box.root)
    questions = Corpus.load(box.questions)
    forget = Corpus(tuple(q for q in questions if q.meta["set"] == "forget"), "forget")
    original = LanguageModel.open(box.model)
    models = {
        "original": original,
        "oracle": LanguageModel.open(build_oracle(box, Progress())),
        "second oracle": measuring.second_oracle(box, box.root.parent / "second", Progress()),
        "random labels": measuring.random_labels(original, forget, 0, Progress(), lr=2e-3),
    }
    return measuring.compare(models, questions, Progress())


def test_wrong_labels_are_wrong_and_one_a_fact(micro: Sandbox, measuring: Any) -> None:
    questions = Corpus.load(micro.questions)
    wrong = measuring.mislabelled(questions, 0)
    facts = {(q.meta["entity"], q.meta["attribute"], q.answer) for q in wrong}
    assert len(facts) == len({f[:2] for f in facts})
    assert all(a.question == b.question and a.answer != b.answer for a, b in zip(questions, wrong))
    assert {q.answer for q in wrong} <= {q.answer for q in questions}


def test_the_original_fails_every_metric_that_asks_whether_it_is_gone(result: dict[str, Any]) -> None:
    assert all(v in ("above", "unlike") for v in result["gone"]["original"].values()), result["gone"]["original"]
    row = result["table"]["original"]
    assert row["multiple_choice"] > 0.95
    assert row["auc loss"] > 0.95
    assert row["PrivLeak (min-40 %)"] < -50
    assert row["verdict multiple_choice forget"]["verdict"] == "still there"


def test_the_oracle_passes_every_one(result: dict[str, Any]) -> None:
    assert set(result["gone"]["oracle"].values()) == {"like"}
    row = result["table"]["oracle"]
    # Not only like itself: it cannot tell what was left out from wrong labels, and answers at chance.
    chance = result["models"]["oracle"]["evaluation"]["groups"]["forget"]["multiple_choice"]
    assert chance["low"] <= chance["chance"] <= chance["high"]
    for attack in result["models"]["oracle"]["membership"]["attacks"].values():
        assert attack["low"] <= 0.5 <= attack["high"]
    assert row["extraction_strength"] < 0.5
    assert row["PrivLeak (min-40 %)"] == 0


def test_a_second_oracle_is_much_nearer_than_the_original(result: dict[str, Any]) -> None:
    rows = result["table"]
    for metric in ("multiple_choice", "cloze", "probability", "exact_memorisation", "extraction_strength", "auc loss"):
        gap = [abs(rows[n][metric] - rows["oracle"][metric]) for n in ("second oracle", "original")]
        assert gap[0] < 0.6 * gap[1], metric
    assert rows["second oracle"]["forget quality geometric"] > rows["original"]["forget quality geometric"]
    assert rows["second oracle"]["verdict multiple_choice forget"]["verdict"] != "no test"


def test_random_labels_are_told_from_both(result: dict[str, Any]) -> None:
    rows, judged = result["table"], result["gone"]["random labels"]
    assert rows["random labels"]["multiple_choice"] < rows["original"]["multiple_choice"]
    assert any(v != "like" for v in judged.values())
    assert rows["random labels"]["truth ratio geometric"] > rows["original"]["truth ratio geometric"]
    assert rows["random labels"]["forget quality geometric"] < 0.05  # wrong answers are held with confidence
    json.dumps(result, allow_nan=False)
