"""What methods are compared on: halves of a user's questions, sandbox worlds, and the verb that does it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from micro import NoTraining, read, run_config, state
from sspu_runs import chosen

from saeunlearn import cases
from saeunlearn.cases import halves, own_plan, sandbox_case, sandbox_plan
from saeunlearn.cli import build_parser, main
from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError, CorpusError, ModelError, OverlapError
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.frontier import Plan, compare
from saeunlearn.methods import METHODS
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.sandbox.build import Sandbox


def question(at: int, group: str, **meta: Any) -> Record:
    return Record(question=f"{group} {at}?", answer="a", choices=("a", "b"), meta={"set": group, **meta})


def test_halves_share_no_fact_and_have_every_group() -> None:
    facts = [(s, e, a) for s in ("forget", "near") for e in range(6) for a in "xy"]
    asked = [
        question(i, s, entity=f"{s}{e}", attribute=a, phrasing=p)
        for i, ((s, e, a), p) in enumerate((f, p) for f in facts for p in ("seen", "held_out"))
    ]
    asked += [question(100 + i, "far") for i in range(9)]
    questions = Corpus(tuple(asked), "q")
    tune, score = halves(questions, 0)
    assert Counter(r.id for half in (tune, score) for r in half) == Counter(r.id for r in questions)
    sides = [{(r.meta["entity"], r.meta["attribute"]) for r in half if "entity" in r.meta} for half in (tune, score)]
    assert not sides[0] & sides[1]
    counts = [Counter(map(group_of, half)) for half in (tune, score)]
    assert counts[0].keys() == counts[1].keys() == set(map(group_of, questions))
    assert all(abs(counts[0][g] - counts[1][g]) <= 2 for g in counts[0])
    assert [r.id for r in halves(questions, 1)[0]] != [r.id for r in tune] == [r.id for r in halves(questions, 0)[0]]
    with pytest.raises(CorpusError, match="too few questions of lone"):
        halves(Corpus((*questions, question(0, "lone")), "q"), 0)


@pytest.mark.slow
def test_the_plan_of_a_model_of_ones_own(micro: Sandbox, llama: LanguageModel, tmp_path: Path) -> None:
    data = {n: str(getattr(micro, n)) for n in ("model", "forget", "retain", "questions")}
    plan, open_case = own_plan(["rmu"], 2, [0, 1], tmp_path, Progress(), **data, device="cpu")
    assert (plan.tune, plan.score, plan.seed) == (("tuning-half",), ("scoring-half",), 2)
    assert not {r.id for r in open_case("tuning-half").questions} & {r.id for r in open_case("scoring-half").questions}
    other, _ = own_plan(["rmu"], 2, [0, 1], tmp_path, Progress(), **{**data, "retain": data["questions"]})
    assert plan != other
    for change, error in (({"questions": None}, ConfigError), ({"model": str(tmp_path)}, ModelError),
                          ({"retain": data["forget"]}, OverlapError)):  # fmt: skip
        with pytest.raises(error):
            own_plan(["rmu"], 2, [0], tmp_path, Progress(), **{**data, **change})  # type: ignore[arg-type]
    made = chosen(llama)
    made.save(tmp_path / "selection.json")
    with pytest.raises(ConfigError, match="give --saes too"):
        own_plan(["rmu"], 2, [0], tmp_path, Progress(), **data, selection=str(tmp_path / "selection.json"))


@pytest.fixture
def wreck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "wreck", "comparisons:Wreck")


@pytest.mark.parametrize("argv", [
    ["--methods", "rmu"], ["--methods", "rmu", "--sandbox", "--model", "m"], ["--methods", "rmu", "--worlds", "1"],
    ["--methods", "rmu", "--sandbox", "--worlds", "0"], ["--methods", "rmu", "--sandbox", "--seeds", "0"],
    ["--methods", "delta", "--sandbox"], ["--methods", "rmu", "--sandbox", "--trials", "0"],
])  # fmt: skip
def test_what_the_verb_refuses(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *argv, "--out", str(tmp_path / "out")]) == 1
    assert "saeunlearn: ConfigError: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.slow
def test_the_verb_on_a_model_of_ones_own(
    micro: Sandbox, micro_data: Path, wreck: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [x for n in ("forget", "retain", "questions") for x in (f"--{n}", str(micro_data / f"{n}.jsonl"))]
    data[-1] = str(micro.questions)  # the other holds one question that the model cannot know
    command = ["compare", "--model", str(micro.model), *data, "--methods", "wreck", "--trials", "3", "--seeds", "0",
               "1", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    result = read(tmp_path / "out" / "results.json")
    row = result["methods"]["wreck"]["scoring"]["forgetting"]
    assert f"| wreck | {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |" in said
    assert {r["case"] for r in result["runs"]} == {"scoring-half"}
    assert result["plan"]["inputs"]["forget"] == Corpus.load(str(micro_data / "forget.jsonl")).fingerprint()
    asked = Corpus.load(micro.questions)
    for file in (tmp_path / "out").rglob("*.*"):  # nothing quotes a question
        text = file.read_bytes() if file.is_file() else b""
        assert not any(q.question.encode() in text for q in asked)
    before = state(tmp_path / "out" / "trials", tmp_path / "out" / "scores")
    assert main(command) == 0
    assert state(tmp_path / "out" / "trials", tmp_path / "out" / "scores") == before
    assert main([*command, "--seeds", "0"]) == 1
    assert "other settings or data" in capsys.readouterr().err


@pytest.mark.slow
def test_the_verb_on_worlds(micro: Sandbox, wreck: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(cases, "build", lambda config, _: built.append(config.world.seed) or micro)
    command = ["compare", "--sandbox", "--tune-worlds", "0", "11", "--worlds", "31", "32", "--methods", "wreck",
               "--trials", "2", "--seeds", "0", "1", "5", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    assert sorted(built) == [0, 11, 31, 32]
    result = read(tmp_path / "results.json")
    assert [(r["case"], r["seed"]) for r in result["runs"]] == [("world-31", 0), ("world-32", 1), ("world-31", 5)]
    attempts = read(tmp_path / "trials" / "wreck-001.json")["attempts"]
    assert [(a["case"], a["seed"]) for a in attempts] == [("world-0", 2), ("world-11", 2)]


def test_the_benchmark_is_a_command_of_the_verb() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        import compare as benchmark
    finally:
        sys.path.pop(0)
    args = build_parser().parse_args(benchmark.command(False, Path("o")))
    assert (len(args.methods), args.trials, args.seeds) == (6, 4, [0, 1, 2, 3, 4])
    for full in (False, True):
        args = build_parser().parse_args(benchmark.command(full, Path("o")))
        plan, _ = sandbox_plan(args.methods, args.trials, args.seeds, Path("o"), Progress(),
                               tune_worlds=args.tune_worlds, worlds=args.worlds)  # fmt: skip
        plan.check()
        assert plan.settings.keys() == {"sspu"}
        assert not set(args.tune_worlds) & {31, 32, 33}
    assert [plan.case_of(i) for i in range(5)] == [f"world-{w}" for w in (31, 32, 33, 31, 32)]


@pytest.mark.slow
def test_methods_that_need_saes_share_those_of_the_case(micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    said = run_config(micro, micro_data)
    sspu = {**said.settings, "lr": 0.3, "alpha": 3.0, "max_retain_rise": 0.08}
    plan = Plan(("sspu", "clamp", "rmu"), 1, (0,), ("tune",), ("score",),
                {"sspu": sspu, "rmu": {"steps": 6, "batch": 4, "check_every": 3}})  # fmt: skip

    def open_case(name: str, progress: Progress | None = None) -> Any:
        return sandbox_case(micro, name, tmp_path / "cases" / name, progress or Progress(), device="cpu",
                            sae=said.sae, select=said.select, probing=sspu)  # fmt: skip

    result = compare(plan, open_case, tmp_path, Progress())
    assert set(result["preparation_seconds"]) == {"tune/saes", "tune/selection-1", "score/saes", "score/selection-0"}
    again = open_case("score", NoTraining())
    assert again.selection(0).layer in again.saes()
    steps = {m: f["scoring"]["spent"]["steps_a_run"] for m, f in result["methods"].items()}
    assert steps == {"sspu": 8, "clamp": 0, "rmu": 6}
    budget = read(tmp_path / "scores" / "sspu-0.json")["attempts"][0]["budget"]
    assert budget["retain_limit"] == result["methods"]["sspu"]["chosen"]["settings"]["max_retain_rise"]
    with pytest.raises(ConfigError, match="scored where they were tuned"):
        compare(replace(plan, score=("tune",)), open_case, tmp_path, Progress())
