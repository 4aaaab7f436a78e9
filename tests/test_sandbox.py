"""The fictional world, and the sandbox that is built from it."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from erasures import leftovers
from micro import NoTraining, at_step, state

from saeunlearn.corpus import Corpus, Record
from saeunlearn.demo import TINY
from saeunlearn.errors import Cancelled, ErasureError, ModelError, RunError
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress
from saeunlearn.sandbox import build as sandbox_build
from saeunlearn.sandbox.build import Sandbox, build, build_oracle, train_tokenizer
from saeunlearn.sandbox.world import World, WorldConfig, make_world
from saeunlearn.training import TrainConfig

# Sizes at their defaults, whatever they are now, and others that leave less or more room.
WORLDS = [
    WorldConfig(),
    WorldConfig(seed=5, entities=7, values=4, attributes=1, held_out=0.5, untouched=0.3),
    WorldConfig(seed=1, entities=12, values=12, attributes=5, held_out=1.0, untouched=0.5),
]
TOO_SHORT = replace(TINY, training=replace(TINY.training, steps=3))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda c: f"seed{c.seed}")
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def spoken(q: Record) -> str:
    """The sentence that a question asks for."""
    return f"{q.question} {q.answer}."


def names(world: World, topic: str | None = None) -> set[str]:
    return {q.meta["entity"] for q in world.questions if topic in (None, q.meta["topic"])}


# --- the world ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", WORLDS, ids=lambda c: f"seed{c.seed}")
def test_one_seed_is_one_world_and_another_seed_another(config: WorldConfig) -> None:
    one, again, other = make_world(config), make_world(config), make_world(replace(config, seed=config.seed + 1))
    assert one == again
    assert json.dumps([r.meta for r in one.retain]) == json.dumps([r.meta for r in again.retain])  # == skips meta
    assert len(names(one) & names(other)) < 0.2 * len(names(one))
    if config.values < 12:  # all twelve are the same in every world
        assert {q.choices for q in one.questions} != {q.choices for q in other.questions}
        assert {q.answer for q in one.questions} != {q.answer for q in other.questions}


def test_every_group_of_questions_is_there(world: World) -> None:
    groups = Counter((q.meta["set"], q.meta["phrasing"], q.meta["entity_status"]) for q in world.questions)
    phrasings = ("seen", "held_out")
    wanted = {("forget", p, "used") for p in phrasings}
    wanted |= {(s, p, status) for s in ("near", "far") for p in phrasings for status in ("used", "untouched")}
    assert set(groups) == wanted
    facts = {(q.meta["entity"], q.meta["attribute"]) for q in world.questions}
    assert len(facts) == 4 * world.config.entities * world.config.attributes
    seen = Counter((q.meta["entity"], q.meta["attribute"]) for q in world.questions if q.meta["phrasing"] == "seen")
    assert set(seen) == facts
    assert set(seen.values()) == {1}
    held = sum(q.meta["phrasing"] == "held_out" for q in world.questions) / len(facts)
    assert abs(held - world.config.held_out) <= 4 * (0.25 / len(facts)) ** 0.5  # four standard errors at most


def test_forget_and_retain_are_apart(world: World) -> None:
    assert not {r.id for r in world.forget} & {r.id for r in world.retain}
    assert {r.meta["set"] for r in world.forget} == {"forget"}
    assert {r.meta["set"] for r in world.retain} == {"near", "far"}
    agents = names(world, "agents")
    assert len(agents) == world.config.entities
    assert not any(agents & words(r.text) for r in world.retain)
    assert all(len(agents & words(r.text)) == 1 for r in world.forget)


def test_unlearning_sees_only_what_was_trained(world: World) -> None:
    train = Counter(world.train)
    assert max(train.values()) == 1
    assert {r.text for r in (*world.forget, *world.retain)} < set(train)
    # What is trained and not shown to unlearning is about untouched entities, and nothing else is.
    rest = set(train) - {r.text for r in (*world.forget, *world.retain)}
    untouched = {q.meta["entity"] for q in world.questions if q.meta["entity_status"] == "untouched"}
    for topic in ("remedies", "towns", "beasts"):
        expected = round(world.config.untouched * world.config.entities)
        assert len(untouched & names(world, topic)) == expected > 0
    assert not untouched & names(world, "agents")
    assert all(untouched & words(t) for t in rest)
    assert not any(untouched & words(r.text) for r in (*world.forget, *world.retain))
    for entity in untouched:
        assert sum(entity in words(t) for t in rest) >= 4 + 5 * world.config.attributes


def test_held_out_phrasings_are_never_trained_and_seen_ones_are(world: World) -> None:
    train = set(world.train)
    for q in world.questions:
        assert (spoken(q) in train) == (q.meta["phrasing"] == "seen")
    # What is held out for one entity is trained for another, or nothing could be learned about it.
    anyone = re.compile("|".join(names(world)))
    trained = {anyone.sub("{n}", t.rsplit(" ", 1)[0]) for t in train}
    assert {anyone.sub("{n}", q.question) for q in world.questions} <= trained


def test_each_fact_has_one_value(world: World) -> None:
    values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for q in world.questions:
        values[q.meta["entity"], q.meta["attribute"]].add(q.answer)
    assert all(len(v) == 1 for v in values.values())
    for r in (*world.forget, *world.retain):
        if r.meta["attribute"] != "kind":
            (value,) = values[r.meta["entity"], r.meta["attribute"]]
            assert r.text.endswith(f" {value}.")
    assert len(names(world)) == 4 * world.config.entities  # no two entities share a name


def test_choices_hold_the_answer_once_and_three_other_values_of_its_attribute(world: World) -> None:
    known: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for q in world.questions:
        known[q.meta["topic"], q.meta["attribute"]].add(q.answer)
    places: Counter[int] = Counter()
    for q in world.questions:
        assert q.choices.count(q.answer) == 1
        assert len(q.choices) == len(set(q.choices)) == 4
        places[q.choices.index(q.answer)] += 1
    for (topic, attribute), answers in known.items():
        offered = {c for q in world.questions if (q.meta["topic"], q.meta["attribute"]) == (topic, attribute)
                   for c in q.choices}  # fmt: skip
        assert answers <= offered
        assert len(offered) <= world.config.values
        others = {a for (t, b), found in known.items() if t == topic and b != attribute for a in found}
        assert not offered & others
    n = len(world.questions)
    slack = 4 * (0.25 * 0.75 * n) ** 0.5  # four standard errors: the place of the answer says nothing
    assert all(abs(places[i] - n / 4) < slack for i in range(4))


def test_every_value_is_equally_frequent_so_that_chance_is_chance() -> None:
    world = make_world(WorldConfig(seed=3))
    facts = {(q.meta["topic"], q.meta["entity"], q.meta["attribute"]): q.answer for q in world.questions}
    often = Counter((topic, attribute, value) for (topic, _, attribute), value in facts.items())
    assert set(often.values()) == {world.config.entities // world.config.values}
    assert len(often) == 4 * world.config.attributes * world.config.values


def test_the_near_topic_shares_phrasings_and_attributes_with_the_forget_topic() -> None:
    world = make_world(WorldConfig(seed=2, entities=20, attributes=5))

    def attributes(topic: str) -> set[str]:
        return {q.meta["attribute"] for q in world.questions if q.meta["topic"] == topic}

    assert len(attributes("agents") & attributes("remedies")) == 4
    assert not attributes("agents") & (attributes("towns") | attributes("beasts"))
    assert {q.meta["set"] for q in world.questions if q.meta["topic"] == "remedies"} == {"near"}


def test_describe_counts(world: World) -> None:
    d = world.describe()
    assert {k: d[k] for k in asdict(world.config)} == asdict(world.config)
    counts = (len(world.train), len(world.forget), len(world.retain), len(world.questions))
    assert (d["sentences"], d["forget_records"], d["retain_records"], d["questions"]) == counts
    topics = 4 * world.config.entities
    held = sum(q.meta["phrasing"] == "held_out" for q in world.questions)
    assert d["sentences"] == topics * (4 + 6 * world.config.attributes) - held


# --- the sandbox -------------------------------------------------------------------------------------------


def test_the_model_learned_its_world(micro: Sandbox) -> None:
    said = micro.describe()
    assert said["config"] == asdict(TINY)
    assert said["multiple_choice"]["held_out"] >= 0.98
    lm = LanguageModel.open(micro.model, device="cpu")
    questions = Corpus.load(micro.questions)
    for phrasing, score in said["multiple_choice"].items():
        group = Corpus(tuple(q for q in questions if q.meta["phrasing"] == phrasing))
        assert multiple_choice(lm, group).mean == score


def test_it_is_an_ordinary_hugging_face_folder(micro: Sandbox) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    model = AutoModelForCausalLM.from_pretrained(micro.model).eval()
    assert not list(micro.model.rglob("*.bin"))
    facts = [q for q in Corpus.load(micro.questions) if q.meta["phrasing"] == "seen"]
    right = 0
    for q in facts:
        ids = tokenizer(q.question, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        right += tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == f"{q.answer}."
    assert right > 0.9 * len(facts)  # the whole answer, then a full stop, then the end of the text


def test_files_hold_the_world(micro: Sandbox) -> None:
    world = make_world(TINY.world)
    for file, corpus in (
        (micro.forget, world.forget),
        (micro.retain, world.retain),
        (micro.questions, world.questions),
    ):
        loaded = Corpus.load(file)
        assert loaded.records == corpus.records
        assert [r.meta for r in loaded] == [r.meta for r in corpus]
    assert [r.text for r in Corpus.load(micro.root / "train.jsonl")] == list(world.train)
    files = {"model", "forget.jsonl", "retain.jsonl", "questions.jsonl", "train.jsonl", "world.json"}
    assert {f.name for f in micro.root.iterdir()} == files


def test_a_built_sandbox_is_not_built_again(micro: Sandbox) -> None:
    before = state(micro.root)
    assert build(TINY, NoTraining(), micro.root) == micro
    assert state(micro.root) == before


def test_another_sandbox_is_not_passed_off_as_the_one_asked_for(micro: Sandbox) -> None:
    before = state(micro.root)
    for other in (replace(TINY, world=replace(TINY.world, seed=1)), replace(TINY, d_model=32)):
        with pytest.raises(RunError, match="another seed or size"):
            build(other, NoTraining(), micro.root)
    assert state(micro.root) == before


def test_the_cache_keeps_configurations_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEUNLEARN_HOME", str(tmp_path))
    roots: list[Path] = []

    def note(root: Path) -> None:
        roots.append(root)
        raise InterruptedError

    monkeypatch.setattr(sandbox_build, "atomic_folder", note)
    slower = replace(TINY.training, lr=1e-3)
    other = replace(TINY.world, seed=3)
    for config in (TINY, TINY, replace(TINY, training=slower), replace(TINY, world=other)):
        with pytest.raises(InterruptedError):
            build(config, NoTraining())
    assert all(tmp_path in r.parents for r in roots)
    assert roots[0] == roots[1]
    assert len(set(roots)) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(_progress: Progress) -> None:
        raise error("stop")

    root = tmp_path / "deep" / "sandbox"
    with pytest.raises(ErasureError if error is OSError else error):
        build(TINY, at_step("training", stop, done=1), root)
    assert list(root.parent.iterdir()) == []


def test_of_two_builders_at_once_one_builds(tmp_path: Path) -> None:
    notes: list[str] = []

    def build_meanwhile(_progress: Progress) -> None:
        if second.ident is None:  # the first time
            second.start()
            while not notes and second.is_alive():  # until it waits
                time.sleep(0.01)

    def said(event: dict[str, Any]) -> None:
        notes.extend(str(v) for v in event.values() if "waiting for another process" in str(v))

    found: list[Sandbox] = []
    second = threading.Thread(target=lambda: found.append(build(TINY, NoTraining(said), tmp_path / "sandbox")))
    box = build(TINY, at_step("training", build_meanwhile, done=1), tmp_path / "sandbox")
    second.join()
    assert found == [box]


def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        build(TINY, at_step("training", lambda p: setattr(p, "cancelled", True), done=1), tmp_path / "sandbox")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_learned_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reached only 0\.\d+ .* \.98"):
        build(TOO_SHORT, Progress(), tmp_path / "sandbox")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ErasureError, match="not empty"):
        build(TINY, NoTraining(), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["letter.txt"]
    assert leftovers(tmp_path.parent) == []


def test_one_config_gives_one_model(micro: Sandbox) -> None:
    def weights(drawn_before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(drawn_before)
        config = replace(TINY, training=TrainConfig(steps=3))
        texts = make_world(config.world).train
        lm, _ = sandbox_build.learn(config, train_tokenizer(texts, config.vocabulary), texts, Progress(), "test")
        return {n: p.detach().clone() for n, p in lm.model.named_parameters()}

    one, again = weights(1), weights(2)
    assert all(torch.equal(one[n], again[n]) for n in one)


@pytest.mark.slow
def test_the_oracle_knows_all_but_the_forget_facts(micro: Sandbox, tmp_path: Path) -> None:
    own = Sandbox(tmp_path / "sandbox")
    shutil.copytree(micro.root, own.root)
    folder = build_oracle(own, Progress())
    model, oracle = LanguageModel.open(own.model), LanguageModel.open(folder)
    assert oracle.vocabulary == model.vocabulary
    questions = Corpus.load(own.questions)
    forget = Corpus(tuple(q for q in questions if q.meta["set"] == "forget"), "forget")
    rest = Corpus(tuple(q for q in questions if q.meta["set"] != "forget"), "rest")
    assert multiple_choice(model, forget).mean >= 0.95
    assert multiple_choice(oracle, forget).mean <= 0.6  # 16 facts with four values: chance is .25
    assert multiple_choice(oracle, rest).mean >= 0.95
    assert build_oracle(own, NoTraining()) == folder


def test_the_tokenizer_spells_any_text() -> None:
    tokenizer = train_tokenizer(make_world(TINY.world).train, 400)
    for text in ("The compound Zorblattine.", "Ünïcödé 漢字 🦆", "a\nb\tc  d"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer) <= 400
