"""The battery on the tiny sandbox: what is known of its result beforehand, and the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from erasures import make, same, weights
from micro import MARKER, SECRET, Finished, read, state

from saeunlearn.corpus import Corpus
from saeunlearn.erasure import Erasure
from saeunlearn.evaluation.attacks import attack
from saeunlearn.evaluation.attacks.quantise import codes
from saeunlearn.evaluation.attacks.relearn import linear_names
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.methods import get_method
from saeunlearn.models import LanguageModel
from saeunlearn.parts import WeightDelta
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox, build_oracle
from saeunlearn.verify import report_checks

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class World:
    model: LanguageModel
    oracle: LanguageModel
    folder: Path
    forget: Corpus
    retain: Corpus
    questions: Corpus

    def attack(self, erasure: Erasure, *names: str, oracle: bool = True) -> dict[str, Any]:
        return attack(
            self.model, erasure, self.forget, self.retain, self.questions, oracle=self.oracle if oracle else None,
            names=names,
        )  # fmt: skip

    def unlearn(self, method: str, **settings: Any) -> Erasure:
        found = get_method(method)
        return found.unlearn(
            self.model, self.forget, self.retain, config=found.Config(**settings), selection=None, saes={}, seed=0,
            progress=Progress(),
        )  # fmt: skip

    def towards_oracle(self, share: float) -> Erasure:
        """Weights on the way from the model (0) to its oracle (1)."""
        theirs = dict(self.oracle.model.named_parameters())
        parts = [
            WeightDelta(n, False, dense=share * (theirs[n] - p).detach())
            for n, p in self.model.model.named_parameters()
        ]
        return make(self.model, parts)


@pytest.fixture(scope="module")
def world(micro: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> World:
    own = Sandbox(tmp_path_factory.mktemp("attacked") / "sandbox")
    shutil.copytree(micro.root, own.root)
    folder = build_oracle(own, Progress())
    models = (LanguageModel.open(p, device="cpu") for p in (own.model, folder))
    return World(*models, folder, *(Corpus.load(f) for f in (own.forget, own.retain, own.questions)))


def best(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(a for a in document["attacks"] if a["name"] == name)["best"]


def test_the_original_recovers_all_and_the_oracle_nothing(world: World) -> None:
    before = weights(world.model), weights(world.oracle)
    names = ("none", "int8", "relearn-full")
    unchanged = world.attack(world.towards_oracle(0.0), *names)
    assert best(unchanged, "none")["recovered"] == 1
    assert best(unchanged, "int8")["recovered"] >= 0.9
    assert best(unchanged, "relearn-full")["recovered"] >= 0.99
    oracle = world.attack(world.towards_oracle(1.0), *names)
    for name in names:
        assert best(oracle, name)["recovered"] <= 0.1
        assert best(oracle, name)["oracle_recovered"] == 0
    assert (same(weights(world.model), before[0]), same(weights(world.oracle), before[1])) == (True, True)


def test_rmu_is_relearned_from_other_facts(world: World) -> None:
    document = world.attack(
        world.unlearn("rmu", layer=0, blocks=1, steps=60, beta=10.0, lr=0.2, max_retain_rise=1.0),
        "none",
        "relearn-full",
        "ablation",
    )
    left = best(document, "none")["recovered"]
    assert left <= 0.4
    assert best(document, "relearn-full")["recovered"] >= left + 0.2  # of fifteen questions: three that came back
    assert best(document, "ablation")["recovered"] >= 0.8
    assert document["headline"]["recovered"] == max(a["best"]["recovered"] for a in document["attacks"][1:])


def test_the_command_line(world: World, finished: Finished, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished.root, tmp_path / "run"))
    given = ["attack", root, "--oracle", world.folder, "--attacks"]
    code, out, err = call(*given, "none,int4,bypass")
    assert code == 0, err
    first = read(root / "attacks.json")
    assert [a["name"] for a in first["attacks"]] == ["none", "int4", "bypass"]
    assert first["erasure_id"] == finished.erasure_id
    assert "The strongest attack, int4, recovers" in out
    assert "there is no hook" in out
    code, out, err = call(*given, "int8,lens,probes,few-shot,few-shot-retain,paraphrase,role-play,prefill,keyword")
    assert code == 0, err
    second = read(root / "attacks.json")
    assert second["attacks"][:3] == first["attacks"]
    assert len(second["attacks"]) == 11
    assert set(second["damage"]["models"]) == {"original", "unlearned", "oracle"}
    assert "keyword 1" in out
    before = state(root / "attacks.json")
    assert call(*given, "none").code == 0
    assert state(root / "attacks.json") == before  # nothing was done again
    assert {f.name for f in (root / "figures").iterdir()} >= {"attacks.png", "relearning.png"}
    questions = finished.run.questions
    assert questions is not None
    answers = multiple_choice(world.oracle, questions)
    rows = read(root / "report.json")["verdicts"]
    for row in [r for r in rows if r["metric"] == "multiple_choice"]:
        part = [v for r, v in zip(questions, answers.values) if group_of(r) == row["group"]]
        assert row["oracle"] == pytest.approx(sum(part) / len(part))
    assert {r["group"].split("/")[0] for r in rows} == {"forget", "near", "far"}
    for page in ("report.html", "report.md"):
        assert "Beside the oracle" in (root / page).read_text()
    assert [c for c in report_checks(root, Progress()) if c["status"] != "pass"] == []
    content = read(root / "oracle.json")
    content["groups"]["forget/seen"]["multiple_choice"]["values"][0] ^= 1
    (root / "oracle.json").write_text(json.dumps(content))
    wrong = [c["what"] for c in report_checks(root, Progress()) if c["status"] == "fail"]
    assert wrong == ["files: sha256", "report.json: numbers", "report.md, model_card.md"]
    for file in (root / "attacks.json", root / "oracle.json", *[f for f in root.rglob("*.html")]):
        assert MARKER not in file.read_text()
        assert SECRET not in file.read_text()
    for argv, said in (
        ([*given[:2], "--attacks", "none"], "another oracle"),
        ([*given, "none", "--seed", "3"], "another seed"),
        ([*given, "magic"], "unknown attacks"),
        (["attack", tmp_path], "run.json is missing"),
    ):
        code, out, err = call(*argv)
        assert (code, out) == (1, "")
        assert said in err
    info = read(root / "run.json")
    (root / "run.json").write_text(json.dumps({**info, "status": "cancelled"}))
    assert "not a finished run" in call(*given, "none").err


def test_int4_brings_back_what_tiny_steps_hid(world: World) -> None:
    """Weights of a 4-bit grid, and steps too small to leave their cells: rounding undoes them."""
    grid = world.model.copy()
    with torch.no_grad():
        for block in grid.blocks:
            for name in linear_names(block):
                weight = block.get_submodule(name).weight
                level, scale = codes(weight, 4)
                weight.copy_(level * scale)
    grid = LanguageModel(grid.model, grid.tokenizer, "grid")
    world = replace(world, model=grid)
    erasure = world.unlearn("ga", weights="all", lr=0.008, steps=30, max_retain_rise=1.0)
    document = world.attack(erasure, "none", "int8", "int4")
    none, eight, four = (best(document, n) for n in ("none", "int8", "int4"))
    changed = {a["name"]: a["extra"].get("changed_codes") for a in document["attacks"]}
    assert document["levels"]["original"]["accuracy"] >= 0.9
    assert changed["int4"] < 0.15
    assert changed["int8"] > 0.5
    assert none["recovered"] <= 0.6
    assert eight["recovered"] <= none["recovered"] + 0.15
    assert four["recovered"] >= 0.85
