"""The battery: every attack on the unlearned model and on the oracle, and what it recovers. See `attack`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ...corpus import Corpus
from ...erasure import Erasure
from ...errors import ConfigError
from ...models import LanguageModel
from ...progress import Progress
from ..evaluate import bootstrap, wilson
from .ablate import ablate
from .bypass import bypass
from .case import Case, NotApplicable, Try, Victim, check_oracle, make_case
from .probes import lens, probes
from .prompting import few_shot, keyword, paraphrase, prefill, role_play
from .quantise import quantise
from .recovery import recovered
from .relearn import relearn

SCHEMA = 1
Attack = Callable[[Case, Victim], list[Try]]


def nothing(case: Case, victim: Victim) -> list[Try]:
    """No attack: what is left without one, the level that others are compared with."""
    return [Try({}, case.score(victim.model).values)]


ATTACKS: dict[str, tuple[str, Attack]] = {
    "none": ("baseline", nothing),
    "relearn-lora": ("relearning", partial(relearn, text="forget", weights="lora")),
    "relearn-full": ("relearning", partial(relearn, text="forget", weights="full")),
    "unrelated-lora": ("relearning", partial(relearn, text="unrelated", weights="lora")),
    "unrelated-full": ("relearning", partial(relearn, text="unrelated", weights="full")),
    "int8": ("quantisation", partial(quantise, bits=8)),
    "int4": ("quantisation", partial(quantise, bits=4)),
    "ablation": ("ablation", ablate),
    "lens": ("probing", lens),
    "probes": ("probing", probes),
    "few-shot": ("prompting", partial(few_shot, shots="forget")),
    "few-shot-retain": ("prompting", partial(few_shot, shots="retain")),
    "paraphrase": ("prompting", paraphrase),
    "role-play": ("prompting", role_play),
    "prefill": ("prompting", prefill),
    "bypass": ("bypass", bypass),
}
_NEED_QUESTIONS = ("probing", "prompting")
KEYWORD = "keyword"  # measures damage, so it has its own place in the document


def known_attacks(names: Sequence[str] | None) -> list[str]:
    """The attacks of these names, all without any. Raises ConfigError for an unknown one."""
    known = [*ATTACKS, KEYWORD]
    if unknown := [n for n in names or () if n not in known]:
        raise ConfigError(f"unknown attacks {unknown}; known: {', '.join(known)}")
    return [n for n in known if names is None or n in names]


def attack(
    original: LanguageModel,
    erasure: Erasure,
    forget: Corpus,
    retain: Corpus,
    questions: Corpus | None,
    *,
    oracle: LanguageModel | None = None,
    names: Sequence[str] | None = None,
    budget: str = "quick",
    seed: int = 0,
    progress: Progress | None = None,
    earlier: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Attack `original` with `erasure` applied, and `oracle` in the same way; no model given is changed.

    Returns a JSON-able document. `metric` is "accuracy" (multiple choice on V's questions) or, without questions, "nll"
    (nats a token on V's texts); [metric] stands for that name:

        {"schema": 1, "model", "oracle": {"name", "fingerprint"} | None, "erasure_id", "method", "seed", "budget",
         "metric", "questions": {"n", "fingerprint", "known", "training_records"}, "chance", "ids",
         "levels": {"original" | "unlearned" | "oracle": {[metric], "low", "high", "values"}},
         "attacks": [{"name", "kind", "seconds", "budget",
             "best": {"settings", [metric], "low", "high", "recovered", "recovered_low", "recovered_high",
                      "oracle_settings", "oracle_[metric]", "oracle_recovered"},
             "tried": [{"settings", [metric], "oracle_[metric]", "curve", "oracle_curve", "picked_by"}],
             "ids", "values", "oracle_values", "extra"}            # or {"name", "kind", "skipped": why}
         ], "damage": {…} as `prompting.keyword` returns it,
         "headline": {"attack", "recovered", "low", "high", [metric], "oracle_[metric]", "oracle": its recovered share}}

    "recovered": see `recovery.recovered`. An attack's reference is the oracle's own best try; without an oracle it is
    chance, and for texts the unlearned model as it is. The best try is the best on V (optimistic for both models alike)
    unless the attack chooses on T ("picked_by"). The headline is the attack that recovers most.
    `earlier`: a document to go on from: its attacks are not repeated. `save` gets the document after every attack.
    Raises ConfigError for too few facts or unknown names, ModelError for an oracle of another shape.
    """
    wanted = known_attacks(names)
    case = make_case(original, forget, retain, questions, budget, seed, progress or Progress())
    if oracle is not None:
        check_oracle(original, oracle)
    victims = {"unlearned": Victim(original, erasure)} | ({"oracle": Victim(oracle)} if oracle is not None else {})
    document = dict(earlier) if earlier else _start(case, victims, budget)
    done = {a["name"] for a in document["attacks"]} | ({KEYWORD} if document["damage"] else set())
    for name in [n for n in wanted if n not in done]:
        case.progress.note(f"attack: {name}")
        if name == KEYWORD:
            document["damage"] = _damage(case, victims)
        else:
            document["attacks"] = [*document["attacks"], _carry_out(name, case, victims, document["levels"])]
            document["headline"] = _headline(document)
        if save:
            save(document)
    return document


def _start(case: Case, victims: Mapping[str, Victim], budget: str) -> dict[str, Any]:
    """The document without attacks."""
    unlearned, oracle = victims["unlearned"], victims.get("oracle")
    assert unlearned.erasure is not None
    models = {"original": case.original, **{name: v.model for name, v in victims.items()}}
    return {
        "schema": SCHEMA,
        "model": case.original.name,
        "oracle": {"name": oracle.base.name, "fingerprint": oracle.base.fingerprint()} if oracle else None,
        "erasure_id": unlearned.erasure.id,
        "method": unlearned.erasure.manifest["method"],
        "seed": case.seed,
        "budget": budget,
        "metric": case.metric,
        "questions": {"n": len(case.test), "fingerprint": case.test.fingerprint(), "known": len(case.known or ()),
                      "training_records": len(case.train)},
        "chance": case.mean(case.chance) if case.chance else None,
        "ids": [r.id[:16] for r in case.test],
        "levels": {n: {**_level(case, v), "values": v} for n, m in models.items() if (v := case.score(m).values)},
        "attacks": [],
        "damage": None,
        "headline": None,
    }  # fmt: skip


def _carry_out(name: str, case: Case, victims: Mapping[str, Victim], levels: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of one attack."""
    kind, run = ATTACKS[name]
    started = time.monotonic()
    if case.metric == "nll" and kind in _NEED_QUESTIONS:
        return {"name": name, "kind": kind, "skipped": "needs multiple-choice questions on the forget set"}
    try:
        tries = run(case, victims["unlearned"])
        oracles = run(case, victims["oracle"]) if "oracle" in victims else []
    except NotApplicable as e:
        return {"name": name, "kind": kind, "skipped": str(e)}
    best, theirs = _best(case, tries), _best(case, oracles) if oracles else None
    reference = theirs.values if theirs else None
    if theirs is None and case.chance is None:
        reference = levels["unlearned"]["values"]
    metric = case.metric

    def share(values: Sequence[float]) -> Any:
        up = [[case.sign * v for v in x] for x in (values, levels["original"]["values"], reference or ())]
        return recovered(up[0], up[1], up[2] if reference else None, case.chance, case.weights, case.seed)

    found = share(best.values)
    entry: dict[str, Any] = {
        "settings": best.settings, **_level(case, best.values),
        "recovered": found.share, "recovered_low": found.low, "recovered_high": found.high,
    }  # fmt: skip
    if theirs is not None:
        entry |= {"oracle_settings": theirs.settings, f"oracle_{metric}": case.mean(theirs.values),
                  "oracle_recovered": share(theirs.values).share}  # fmt: skip
    tried = []
    for i, t in enumerate(tries):
        row: dict[str, Any] = {"settings": t.settings, metric: case.mean(t.values), "curve": t.curve,
                               "picked_by": t.picked_by, **t.extra}  # fmt: skip
        if oracles:  # one try of an oracle stands for all where there is nothing to vary
            other = oracles[min(i, len(oracles) - 1)]
            row |= {f"oracle_{metric}": case.mean(other.values), "oracle_curve": other.curve}
        tried.append(row)
    return {
        "name": name, "kind": kind, "seconds": round(time.monotonic() - started, 1), "budget": asdict(case.budget),
        "best": entry, "tried": tried, "ids": [r.id[:16] for r in case.test], "values": best.values,
        "oracle_values": theirs.values if theirs else None, "extra": best.extra,
    }  # fmt: skip


def _best(case: Case, tries: Sequence[Try]) -> Try:
    """By the score on T where the attack has one, else by that on V; the first among equals."""
    return max(tries, key=lambda t: case.sign * case.mean(t.values) if t.picked_by is None else t.picked_by)


def _level(case: Case, values: Sequence[float]) -> dict[str, float]:
    mean = case.mean(values)
    bounds = wilson(sum(values), len(values)) if case.metric == "accuracy" else bootstrap(values, case.weights)
    return {case.metric: mean, "low": bounds[0], "high": bounds[1]}


def _headline(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The attack that recovers most, "none" aside; None before one has a share."""
    real = [a for a in document["attacks"] if a["name"] != "none" and "best" in a]
    shares = [a for a in real if a["best"]["recovered"] is not None]
    if not shares:
        return None
    top = max(shares, key=lambda a: a["best"]["recovered"])
    best, metric = top["best"], document["metric"]
    return {"attack": top["name"], "recovered": best["recovered"], "low": best["recovered_low"],
            "high": best["recovered_high"], metric: best[metric], f"oracle_{metric}": best.get(f"oracle_{metric}"),
            "oracle": best.get("oracle_recovered")}  # fmt: skip


def _damage(case: Case, victims: Mapping[str, Victim]) -> dict[str, Any]:
    try:
        return keyword(case, {"original": Victim(case.original), **victims})
    except NotApplicable as e:
        return {"skipped": str(e)}
