"""The cases that methods are compared on: a user's model and data, or sandbox worlds.

SAEs and selections are made once, in the comparison's folder, and shared by its processes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoints import sha256_file, write_json
from .corpus import Corpus, Record, refuse_overlap
from .errors import ConfigError, CorpusError
from .evaluation.evaluate import group_of
from .evaluation.frontier import OpenCase, Plan
from .evaluation.points import Case
from .features.selection import SelectConfig, Selection
from .locks import locked
from .methods import get_method
from .methods.sspu import SSPUConfig
from .models import LanguageModel
from .options import settings_of
from .pipeline import choose, ready_saes, train_into
from .progress import Progress
from .sandbox.build import DEMO_SAE, DEMO_SELECT, DEMO_SETTINGS, Sandbox, SandboxConfig, WorldConfig, build


def sandbox_case(
    box: Sandbox, name: str, folder: Path, progress: Progress, *, device: str = "auto", dtype: str = "auto",
    sae: Mapping[str, Any] = DEMO_SAE, select: Mapping[str, Any] = DEMO_SELECT,
    probing: Mapping[str, Any] = DEMO_SETTINGS,
) -> Case:  # fmt: skip
    """A sandbox world. Its SAEs (once, seed 0) and SSPU's selection (one a seed) are made in `folder` when they are
    first asked for, with the settings of `saeunlearn demo`."""
    model = LanguageModel.open(box.model, device=device, dtype=dtype)
    forget, retain, questions = (Corpus.load(f) for f in (box.forget, box.retain, box.questions))
    saes, selection = prepared(
        model, forget, retain, folder, progress, sae, SelectConfig(**select),
        settings_of(SSPUConfig, probing, "sspu"),
    )  # fmt: skip
    return Case(name, model, forget, retain, questions, saes, selection)


def prepared(
    model: LanguageModel, forget: Corpus, retain: Corpus, folder: Path, progress: Progress, sae: Mapping[str, Any],
    select: SelectConfig, probing: SSPUConfig, source: str | None = None, given: Selection | None = None,
) -> tuple[Callable[[], Mapping[int, Any]], Callable[[int], Selection]]:  # fmt: skip
    """(SAEs, selection by seed), each made by the first who asks; the others wait for it. `source`: ready SAEs;
    `given`: a ready selection, for every seed. What took how long is in seconds-….json."""
    kept: dict[str, Any] = {}

    def once(name: str, file: Path, make: Callable[[], None]) -> None:
        with locked(folder / f"{name}.lock", progress, f"it makes {name} in {folder}"):
            if not file.exists():
                started = time.monotonic()
                make()
                write_json(folder / f"seconds-{name}.json", round(time.monotonic() - started, 1))

    def saes() -> Mapping[int, Any]:
        if "saes" not in kept:
            from sae_training import load_saes

            if source:
                kept["saes"] = ready_saes(model, source, "all")
            else:
                own = folder / "saes"
                train = partial(train_into, own, model, forget, retain, "all", sae, 0, progress)
                once("saes", own / "saes.json", train)
                kept["saes"] = load_saes(own, model)
        return kept["saes"]

    def selection(seed: int) -> Selection:
        if given is not None:
            return given
        file = folder / f"selection-{seed}.json"
        found = saes()
        once(f"selection-{seed}", file, lambda: choose(
            model, found, forget, retain, select, probing, seed, progress).save(file))  # fmt: skip
        return Selection.load(file)

    return saes, selection


# --- plans -------------------------------------------------------------------------------------------------


def sandbox_plan(
    methods: Sequence[str], trials: int, seeds: Sequence[int], out: Path, progress: Progress, *,
    tune_worlds: Sequence[int] = (0,), worlds: Sequence[int] = (31, 32, 33), device: str = "auto", dtype: str = "auto",
) -> tuple[Plan, OpenCase]:  # fmt: skip
    """Tuning and scoring on different worlds; SSPU starts from the settings of `saeunlearn demo`."""
    settings = {"sspu": DEMO_SETTINGS} if "sspu" in methods else {}
    inputs = {"sae": DEMO_SAE, "select": DEMO_SELECT, "probing": DEMO_SETTINGS, "dtype": dtype}
    tune, score = (tuple(f"world-{w}" for w in part) for part in (tune_worlds, worlds))

    def open_case(name: str) -> Case:
        seed = int(name.removeprefix("world-"))
        with locked(out / "locks" / name, progress, f"it builds {name}"):
            box = build(SandboxConfig(world=WorldConfig(seed=seed)), progress)
        return sandbox_case(box, name, out / "cases" / name, progress, device=device, dtype=dtype)

    return Plan(tuple(methods), trials, tuple(seeds), tune, score, settings, inputs), open_case


def own_plan(
    methods: Sequence[str], trials: int, seeds: Sequence[int], out: Path, progress: Progress, *,
    model: str | None = None, forget: str | None = None, retain: str | None = None, questions: str | None = None,
    saes: str | None = None, selection: str | None = None, oracle: str | None = None, device: str = "auto",
    dtype: str = "auto",
) -> tuple[Plan, OpenCase]:  # fmt: skip
    """One model and its data: tuning sees one half of the questions, scoring the other, with other seeds.

    Raises ConfigError where something is missing, the typed errors of what cannot be opened, and OverlapError.
    """
    if not (model and forget and retain and questions):
        raise ConfigError("a comparison needs --model, --forget, --retain and --questions, or --sandbox")
    f, r, q = Corpus.load(forget), Corpus.load(retain), Corpus.load(questions)
    refuse_overlap(f, r)
    lm = LanguageModel.open(model, device=device, dtype=dtype)
    base = LanguageModel.open(oracle, device=device, dtype=dtype) if oracle else None
    needs = {n for m in methods for n in get_method(m).needs}
    if unknown := needs - {"saes", "selection"}:
        raise ConfigError(f"a comparison cannot provide {', '.join(sorted(unknown))}")
    given = Selection.load(selection) if selection else None
    if given is not None and saes is None:
        raise ConfigError("a selection belongs to its SAEs: give --saes too")
    inputs = {
        "model": lm.fingerprint(), "oracle": base.fingerprint() if base else None, "saes": saes,
        "selection": sha256_file(Path(selection)) if selection else None, "dtype": dtype,
        **{n: c.fingerprint() for n, c in (("forget", f), ("retain", r), ("questions", q))},
    }  # fmt: skip
    plan = Plan(tuple(methods), trials, tuple(seeds), ("tuning-half",), ("scoring-half",), {}, inputs)
    parts = dict(zip((*plan.tune, *plan.score), halves(q, plan.seed)))
    make = prepared(lm, f, r, out / "cases" / "own", progress, {}, SelectConfig(), SSPUConfig(), saes, given)
    return plan, lambda name: Case(name, lm, f, r, parts[name], *make, base)


def halves(questions: Corpus, seed: int) -> tuple[Corpus, Corpus]:
    """Two halves of the questions, each with every `set`, and groups split evenly as far as they can be; questions on
    one fact (the same `set`, `entity` and `attribute`, where they say so) stay together.

    Raises CorpusError for a set too small to halve.
    """
    facts: dict[tuple[Any, ...], list[int]] = {}
    for i, q in enumerate(questions):
        fact = (q.meta.get("entity"), q.meta.get("attribute"))
        facts.setdefault((q.meta.get("set"), *(fact if None not in fact else (i,))), []).append(i)
    sets: dict[Any, list[list[int]]] = {}
    for key, members in facts.items():
        sets.setdefault((key[0], *sorted({group_of(questions.records[i]) for i in members})), []).append(members)
    rng = random.Random(seed)
    for alike in sets.values():
        rng.shuffle(alike)
    sides: tuple[list[int], list[int]] = ([], [])
    for k, members in enumerate(m for alike in sets.values() for m in alike):
        sides[k % 2].extend(members)
    out: list[Sequence[Record]] = [[questions.records[i] for i in sorted(side)] for side in sides]
    wanted = {str(q.meta.get("set")) for q in questions}
    for half in out:
        if lacks := sorted(wanted - {str(q.meta.get("set")) for q in half}):
            raise CorpusError(f"{questions.name}: too few questions of {', '.join(lacks)} to tune on one half of them")
    return Corpus(tuple(out[0]), "tuning-half"), Corpus(tuple(out[1]), "scoring-half")
