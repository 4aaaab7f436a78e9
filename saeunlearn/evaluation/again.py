"""Whether the numbers of evaluation.json follow from its per-example values, and those from the model."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch

from ..corpus import Corpus
from ..erasure import Erasure
from ..errors import SaeunlearnError
from ..models import LanguageModel
from ..progress import Progress
from .evaluate import SCHEMA, by_group, compare, group_of, summarise_text, wilson, without_labels
from .metrics import Values, cloze, multiple_choice, nll

PASS, FAIL, OPEN = "pass", "fail", "not checkable"
SAME = 1e-9  # relative; for numbers computed again from stored values
NLL_TOLERANCE = {torch.float32: 1e-3}  # nats a token, for scores measured anew; batches round differently
COARSE_TOLERANCE = 2e-2  # in half precision, where up to COARSE_FLIPS of the 0/1 scores may differ too
COARSE_FLIPS = 0.05
_SCORES = {"multiple_choice": multiple_choice, "cloze": cloze}
BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OSError, SaeunlearnError)

Check = dict[str, str]  # {"what", "status", "detail"}


def check(what: str, status: str, detail: str = "") -> Check:
    return {"what": what, "status": status, "detail": detail}


def outcome(what: str, problems: list[str], fine: str) -> Check:
    """One check; the first few problems, if there are any."""
    more = f" … and {len(problems) - 4} more" if len(problems) > 4 else ""
    return check(what, FAIL if problems else PASS, "; ".join(problems[:4]) + more if problems else fine)


def differences(stored: Any, again: Any, where: str = "") -> list[str]:
    """Paths at which two JSON values differ; numbers up to rounding."""
    if isinstance(stored, dict) and isinstance(again, dict):
        keys = {**stored, **again}
        return [p for k in keys for p in differences(stored.get(k), again.get(k), f"{where}.{k}" if where else str(k))]
    if isinstance(stored, list) and isinstance(again, list) and len(stored) == len(again):
        return [p for i, (a, b) in enumerate(zip(stored, again)) for p in differences(a, b, f"{where}[{i}]")]
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (stored, again)]
    same = math.isclose(stored, again, rel_tol=SAME, abs_tol=1e-12) if all(numbers) else stored == again
    return [] if same and numbers[0] == numbers[1] else [where or "the whole"]


# --- numbers that follow from others -----------------------------------------------------------------------


def evaluation_checks(
    evaluation: Mapping[str, Any], questions: Corpus | None, sets: Mapping[str, Corpus], seed: int, labels: bool
) -> list[Check]:
    """Every number of evaluation.json that follows from its per-example values, computed again.

    `questions`, `sets`: the data where they are at hand; without them chance and subgroups stay unchecked, and whether
    the ids are those of the data. `labels`: subgroups are named, not hashed.
    """
    checks = []
    for when in ("before", "after"):
        result = evaluation.get(when)
        try:
            problems, unknown = _derived(result, questions, sets, labels)  # type: ignore[arg-type]
        except BROKEN as e:
            problems, unknown = [f"cannot be read as an evaluation ({type(e).__name__}: {e})"], []
        checks.append(outcome(f"evaluation.json: {when}", problems, "follows from its per-example values"))
        if unknown:
            checks.append(check(f"evaluation.json: {when}, rest", OPEN, ", ".join(unknown)))
    try:
        stale = differences(evaluation["comparison"], compare(evaluation["before"], evaluation["after"], seed))
        problems = [f"comparison{p}" for p in stale]
    except BROKEN as e:
        problems = [f"cannot be computed again ({type(e).__name__})"]
    return [*checks, outcome("evaluation.json: comparison", problems, "follows from before and after")]


def _derived(
    result: dict[str, Any], questions: Corpus | None, sets: Mapping[str, Corpus], labels: bool
) -> tuple[list[str], list[str]]:
    """(paths that differ when computed again, what could not be)."""
    bad = differences(result["schema"], SCHEMA, "schema")
    unknown: list[str] = []
    for metric in dict.fromkeys(m for metrics in result["groups"].values() for m in metrics):
        stored = {g: metrics[metric] for g, metrics in result["groups"].items() if metric in metrics}
        if metric not in _SCORES:
            unknown.append(f"{metric} is not computed again")
            continue
        if questions is None:
            for group, m in stored.items():
                low, high = wilson(sum(m["values"]), len(m["values"]))
                again = {"n": len(m["ids"]), "mean": sum(m["values"]) / len(m["values"]), "low": low, "high": high}
                bad += differences({k: m[k] for k in again}, again, f"{group}.{metric}")
            continue
        part = Corpus(tuple(questions.records[i] for i in _scored(questions, metric)), "questions")
        rest = {g: iter(m["values"]) for g, m in stored.items()}
        values = [next(rest[group_of(r)], math.nan) for r in part]
        made = {g: {metric: m} for g, m in by_group(part, Values(metric, values, [], [])).items()}
        again = without_labels({"groups": made}) if not labels else {"groups": made}
        bad += differences({g: {metric: m} for g, m in stored.items()}, again["groups"])
    if questions is None and result["groups"]:
        unknown.append("chance and subgroups need the questions")
    elif questions is not None:
        given = {"n": len(questions), "fingerprint": questions.fingerprint()}
        bad += differences(result["questions"], given, "questions")
    for name, t in result["texts"].items():
        scored = Values("nll", t["values"], [], t["tokens"])
        again = {"n": len(t["ids"]), "fingerprint": t["fingerprint"], **summarise_text(name, t["ids"], scored)}
        if name not in sets:
            unknown.append(f"whether the records are those of the text {name}")
        else:
            ids = [r.id[:16] for r in sets[name]]
            again["fingerprint"] = sets[name].fingerprint()
            if [i for i in ids if i in set(t["ids"])] != t["ids"]:
                bad.append(f"texts.{name}.ids")
        bad += differences(t, again, f"texts.{name}")
    return bad, unknown


def _scored(questions: Corpus, metric: str) -> list[int]:
    """The questions that a metric fits, as `evaluate` chooses them."""
    return [
        i for i, r in enumerate(questions) if (r.choices if metric == "multiple_choice" else r.question and r.answer)
    ]


# --- scores measured anew ----------------------------------------------------------------------------------


def score_again(
    model: LanguageModel,
    erasure: Erasure,
    evaluation: Mapping[str, Any],
    questions: Corpus | None,
    sets: Mapping[str, Corpus],
    sample: int,
    seed: int,
    progress: Progress,
) -> list[Check]:
    """A seeded sample of questions and texts, scored before and after the Erasure, against the stored values."""
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(questions)), min(sample, len(questions)))) if questions else []
    pairs = [(name, i) for name, corpus in sets.items() for i in range(len(corpus))]
    texts = sorted(rng.sample(pairs, min(sample, len(pairs))))
    checks = []
    for when in ("before", "after"):
        applied = None
        try:
            applied = erasure.apply(model) if when == "after" else None
            stored = evaluation[when]
            for metric, score in _SCORES.items():
                if any(metric in metrics for metrics in stored["groups"].values()):
                    checks.append(_scores(model, stored, questions, chosen, metric, score, when, progress))
            if stored["texts"]:
                checks.append(_losses(model, stored["texts"], sets, texts, when, progress))
        except BROKEN as e:
            checks.append(check(f"scores {when}, anew", FAIL, f"cannot be compared ({type(e).__name__}: {e})"))
        finally:
            if applied:
                applied.revert()
    return checks


def _scores(model: LanguageModel, stored: Mapping[str, Any], questions: Corpus | None, chosen: list[int], metric: str,
            score: Any, when: str, progress: Progress) -> Check:  # fmt: skip
    what = f"{metric.replace('_', ' ')} {when}, anew"
    if questions is None:
        return check(what, OPEN, "the questions are not at hand")
    rest = {g: iter(m[metric]["values"]) for g, m in stored["groups"].items() if metric in m}
    kept = _scored(questions, metric)
    said = {i: next(rest[group_of(questions.records[i])]) for i in kept}
    part = [i for i in chosen if i in said]
    if not part:
        return check(what, OPEN, "no question of the sample has such a score")
    now = score(model, Corpus(tuple(questions.records[i] for i in part), "questions"), progress=progress).values
    wrong = [
        f"{questions.records[i].id[:16]}: stored {said[i]:g}, now {v:g}" for i, v in zip(part, now) if said[i] != v
    ]
    allowed = 0 if model.dtype in NLL_TOLERANCE else math.ceil(COARSE_FLIPS * len(part))
    fine = f"{len(part)} of {len(kept)} questions, {len(wrong)} differ, {allowed} may in {str(model.dtype)[6:]}"
    return outcome(what, wrong if len(wrong) > allowed else [], fine)


def _losses(model: LanguageModel, stored: Mapping[str, Any], sets: Mapping[str, Corpus], chosen: list[tuple[str, int]],
            when: str, progress: Progress) -> Check:  # fmt: skip
    what = f"nll {when}, anew"
    tolerance = NLL_TOLERANCE.get(model.dtype, COARSE_TOLERANCE)
    wrong, n, worst = [], 0, 0.0
    for name in sets:
        records = tuple(sets[name].records[i] for at, i in chosen if at == name)
        if not records or name not in stored:
            continue
        places, said = [i for at, i in chosen if at == name], _in_place(sets[name], stored[name])
        now = nll(model, Corpus(records, name), progress=progress)
        for i, value, tokens in zip(now.records, now.values, now.tokens):
            record = records[i].id[:16]
            old, old_tokens = said.get(places[i], (math.nan, 0))
            off = abs(value - old) / max(1.0, abs(old))
            n, worst = n + 1, max(worst, off)
            if not off <= tolerance or tokens != old_tokens:
                wrong.append(f"{record}: stored {old:.4f} over {old_tokens} tokens, now {value:.4f} over {tokens}")
    if not n:
        return check(what, OPEN, "no text is at hand")
    total = sum(len(t["ids"]) for t in stored.values())
    return outcome(what, wrong, f"{n} of {total} texts, largest difference {worst:.1e}, allowed {tolerance:g}")


def _in_place(corpus: Corpus, stored: Mapping[str, Any]) -> dict[int, tuple[float, int]]:
    """(value, tokens) by place in the corpus. Equal ids can come twice, so the order decides."""
    rows = iter(zip(stored["ids"], stored["values"], stored["tokens"]))
    out, row = {}, next(rows, None)
    for i, r in enumerate(corpus):
        if row and row[0] == r.id[:16]:
            out[i], row = (row[1], row[2]), next(rows, None)
    return out
