"""The removal report as one document (report.json), gathered from the JSON of a run directory and nothing else.

Read, each optional:

- run.json: {"status", "command": [argv], "config": {...}, "model": {"name", "fingerprint", "d_model", …},
  "data": {name: {"n", "fingerprint"}}, "seconds", "error"}
- selection.json: {"layer", "relevant", "irrelevant", "K", "d_model", "layers": rows of `figures.layer_table`,
  "forget_scores", "retain_scores"}
- erasure/erasure.json: the manifest of the Erasure; the numbers of its "extra" become the subspace report
- evaluation.json: what `evaluate.combine` returns
- attacks.json: {"schema": 1, "erasure_id", "metric", "levels", "attacks": [...], "headline"}
- oracle.json: what `evaluate` returns for the oracle, on the questions of the run
- examples.json: {"features": {index: [{"id", "activation", "context", "token"}]}}, only where text was asked for

Without text the document names features by index and score alone. The tokens that a feature promotes, and its top
contexts, say what the topic was.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoints import sha256_file
from ..errors import RunError, SaeunlearnError
from ..progress import Progress
from .claims import not_claimed
from .meaning import METRICS, is_forget, is_number
from .verdict import verdicts

SCHEMA = 1
SOURCES = ("run.json", "selection.json", "erasure/erasure.json", "evaluation.json", "attacks.json", "examples.json",
           "oracle.json")  # fmt: skip
DERIVED = ("report.json", "report.html", "report.md", "model_card.md")  # made from the sources by `write_report`
# Folders of a run; others in its directory (a merged model, say) are the user's.
ROOMS = ("erasure", "figures", "saes", "unhealed")
_OPTIONAL = ("attacks.json", "examples.json", "oracle.json")
_TEXT_KEYS = {"prompt", "prompts", "sample", "samples", "text", "question", "answer", "choices"}
_ATTACKED = ("low", "high", "recovered", "recovered_low", "recovered_high", "oracle_recovered")


def read_sources(run_dir: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """({file: content, {} without one}, what is missing or damaged). Raises RunError when there is nothing at all."""
    if not run_dir.is_dir():
        raise RunError(f"{run_dir} is not a run directory")
    found, missing = {}, []
    for name in SOURCES:
        found[name], problem = _read(run_dir / name)
        if problem and not (problem == "not there" and name in _OPTIONAL):
            missing.append(f"{name}: {problem}")
    if unselected(found["erasure/erasure.json"]) and "selection.json: not there" in missing:
        missing.remove("selection.json: not there")
    if not any(found.values()):
        raise RunError(f"{run_dir} holds none of {', '.join(SOURCES)}: there is nothing to report on")
    return found, missing


def gather(run_dir: Path, *, include_text: bool, progress: Progress | None = None) -> dict[str, Any]:
    """The document: what was asked, done, measured and attacked, what is not claimed, and the sha256 of every file.

    Equal files give an equal document. Raises RunError when `run_dir` holds nothing to report on.
    """
    found, missing = read_sources(run_dir)
    run, selection, manifest, evaluation, attacks, examples, oracle = found.values()
    clean = (lambda v: v) if include_text else without_text
    command = run.get("command") or []
    command = shlex.split(command) if isinstance(command, str) else list(command)
    model = run.get("model") or {}
    model = model if isinstance(model, dict) else {"name": model}
    rows = [r for r in evaluation.get("comparison") or [] if isinstance(r, dict)]
    attacked = read_attacks(attacks, manifest.get("id"))
    judged = _verdicts(evaluation, oracle)
    kinds = sorted({str(p.get("kind")) for p in manifest.get("parts") or []})
    return {
        "schema": SCHEMA,
        "saeunlearn": __version__,
        "include_text": include_text,
        "status": str(run.get("status", "unknown")),
        "error": run.get("error") if include_text else bool(run.get("error")),
        "missing": missing,
        "asked": {
            "model": model.get("name") or manifest.get("model"),
            "source": (run.get("config") or {}).get("model"),
            "fingerprint": manifest.get("parent_fingerprint") or model.get("fingerprint"),
            "data": _data(run, manifest, evaluation),
        },
        "done": {
            "method": manifest.get("method"),
            "kinds": kinds,
            "erasure_id": manifest.get("id"),
            "created": manifest.get("created"),
            "seed": manifest.get("seed"),
            "seconds": run.get("seconds"),
            "config": clean(manifest.get("config") or {}),
            "changed": manifest.get("changed"),
            "extra": clean(manifest.get("extra") or {}),
            "features": _features(selection, examples if include_text else {}),
            "versions": manifest.get("versions") or run.get("versions") or {},
            "threads": manifest.get("threads"),
        },
        "run_config": clean(run.get("config") or {}),
        "comparison": rows,
        "headlines": _headlines(rows),
        "verdicts": judged,
        "attacks": attacked,
        "not_claimed": not_claimed(run, kinds, rows, attacked, bool(selection), bool(judged)),
        "command": shlex.join(map(str, clean(command))) if command else None,
        "files": {name: sha256_file(run_dir / name) for name in (progress or Progress()).over(own_files(run_dir),
                                                                                              "hashing files")},
    }  # fmt: skip


def unselected(manifest: Mapping[str, Any]) -> bool:
    """Whether the Erasure says that no features were chosen for it."""
    return "selection" in manifest and manifest["selection"] is None


def own_files(run_dir: Path) -> list[str]:
    """The files of a run that its report vouches for: those of its top and of its rooms, without the report itself."""
    there = [f for f in run_dir.iterdir() if f.is_file() and f.name not in DERIVED]
    there += [f for room in ROOMS for f in (run_dir / room).rglob("*") if f.is_file()]
    return sorted(f.relative_to(run_dir).as_posix() for f in there if not f.name.startswith("."))


def read_attacks(content: Mapping[str, Any], erasure_id: str | None) -> dict[str, Any] | None:
    """Names and numbers of attacks.json; None without one. Strings among settings are left out: they can be prompts.

    `accuracy` is the score, whatever the metric.
    """
    if not content:
        return None
    score = "nll" if content.get("metric") == "nll" else "accuracy"

    def scores(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"accuracy": _finite(entry.get(score)), "oracle_accuracy": _finite(entry.get(f"oracle_{score}"))}

    rows, left_out = [], []
    for attack in _dicts(content.get("attacks")):
        if "skipped" in attack:
            left_out.append(_word(attack.get("name")))
            continue
        best = as_object(attack.get("best"))
        rows.append(
            {"name": _word(attack.get("name")), "kind": _word(attack.get("kind")),
             "budget": _plain(attack.get("budget")), "settings": _plain(best.get("settings")),
             "tried": len(_dicts(attack.get("tried"))), **scores(best), **{k: _finite(best.get(k)) for k in _ATTACKED}}
        )  # fmt: skip
    levels = as_object(content.get("levels"))
    questions = as_object(content.get("questions"))
    headline = as_object(content.get("headline"))
    return {
        "metric": _word(content.get("metric")),
        "erasure_id": _word(content.get("erasure_id")),
        "this_erasure": erasure_id is not None and content.get("erasure_id") == erasure_id,
        "seed": _finite(content.get("seed")),
        "questions": {"n": _finite(questions.get("n")), "fingerprint": _word(questions.get("fingerprint"))},
        "levels": {
            name: {**scores(levels[name]), **{k: _finite(levels[name].get(k)) for k in ("low", "high")}}
            if isinstance(levels.get(name), dict) else None
            for name in ("original", "unlearned", "oracle")
        },
        "attacks": rows,
        "left_out": left_out,
        "headline": {"attack": _word(headline.get("attack")), **scores(headline)}
        | {k: _finite(headline.get(k)) for k in ("recovered", "low", "high", "oracle")},
    }  # fmt: skip


def as_object(value: Any) -> dict[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _word(value: Any) -> str | None:
    """An identifier; anything else could be a text."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.:/+-]{1,64}", value) else None


def _finite(value: Any) -> float | int | None:
    return value if is_number(value) else None


def _plain(value: Any) -> dict[str, Any]:
    """The numbers and switches among settings."""
    return {k: v for k, v in as_object(value).items() if isinstance(v, bool) or is_number(v)}


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """(content, "") or ({}, why there is none)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "not there"
    except (OSError, ValueError) as e:
        return {}, f"cannot be read ({type(e).__name__})"  # the message could quote the file
    return (content, "") if isinstance(content, dict) else ({}, "is not a JSON object")


def _data(run: Mapping[str, Any], manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict]:
    """One row per input: {"name", "n", "fingerprint"}."""
    rows = {name: {"name": name, **entry} for name, entry in (run.get("data") or {}).items()}
    for name in ("forget", "retain"):
        if fingerprint := manifest.get(f"{name}_fingerprint"):
            rows.setdefault(name, {"name": name, "fingerprint": fingerprint})
    before = evaluation.get("before") or {}
    if before.get("questions"):
        rows.setdefault("questions", {"name": "questions", **before["questions"]})
    for name, text in (before.get("texts") or {}).items():
        label = f"evaluation text: {name}"
        rows.setdefault(label, {"name": label, "n": text.get("n"), "fingerprint": text.get("fingerprint")})
    return [{"n": None, "fingerprint": None, **r} for r in rows.values()]


def _features(selection: Mapping[str, Any], examples: Mapping[str, Any]) -> dict[str, Any] | None:
    """Layer, K, and the features by index and score; with their top contexts where there are `examples`."""
    if not selection:
        return None
    contexts = as_object(examples.get("features"))
    forget, retain = selection.get("forget_scores") or [], selection.get("retain_scores") or []

    def row(i: int) -> dict[str, Any]:
        scores = {name: part[i] if i < len(part) else None for name, part in (("forget", forget), ("retain", retain))}
        top = contexts.get(str(i)) if contexts else None
        return {"feature": i, **scores} | ({"examples": _dicts(top)} if top else {})

    return {
        "layer": selection.get("layer"),
        "K": selection.get("K"),
        "d_model": selection.get("d_model"),
        "relevant": [row(i) for i in selection.get("relevant") or []],
        "irrelevant": [row(i) for i in selection.get("irrelevant") or []],
    }


def _headlines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst case on each side, from the first metric that was measured there."""
    out = []
    for forget in (True, False):
        side = [r for r in rows if is_forget(r["group"]) == forget and r["group"] != "all"]  # all: unknown
        metric = next((m for m in METRICS if any(r["metric"] == m for r in side)), None)
        part = [r for r in side if r["metric"] == metric]
        if not part:
            continue
        sign = -1 if metric == "nll" else 1  # a high loss is a low score
        worst = max(part, key=lambda r: sign * r["after"]) if forget else min(part, key=lambda r: sign * r["change"])
        out.append({**worst, "forget": forget, "share": metric != "nll", "metric": METRICS[metric or ""],
                    "remark": _remark(worst, forget)})  # fmt: skip
    return out


def _verdicts(evaluation: Mapping[str, Any], oracle: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `verdict.verdicts`; none without an oracle, or where a file is not what `evaluate` wrote."""
    try:
        return verdicts(evaluation["before"], evaluation["after"], oracle) if oracle else []
    except (KeyError, TypeError, AttributeError, SaeunlearnError):
        return []


def _remark(row: Mapping[str, Any], forget: bool) -> str:
    chance, low, high = row.get("chance"), row.get("after_low"), row.get("after_high")
    if not forget or chance is None or low is None or high is None:
        return ""
    if low > chance:
        return f"above chance ({chance:.0%}): part of it is still there"
    if high < chance:
        return f"below chance ({chance:.0%}): a mark of suppression rather than of not knowing"
    return f"not told apart from chance ({chance:.0%})"


def without_text(value: Any, key: str = "") -> Any:
    """The value without the strings that could be texts: under a telling key, or with a space in them."""
    if isinstance(value, Mapping):
        return {k: without_text(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        if key in _TEXT_KEYS and value:
            return f"({len(value)} left out)"
        return [without_text(v, key) for v in value]
    if isinstance(value, str) and value:
        path = value.startswith(("/", "~", "./", "../")) or value[1:3] in (":\\", ":/")
        if key in _TEXT_KEYS or ("\n" in value or (not path and len(value.split()) > 1)):
            return "(text left out)"
    return value


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, printable value) pairs."""
    if isinstance(value, Mapping) and value:
        for k, v in value.items():
            yield from flat(v, f"{prefix}.{k}" if prefix else str(k))
    elif prefix:
        if isinstance(value, list):
            shown = ", ".join(num(v) for v in value[:12]) + (f" … ({len(value)})" if len(value) > 12 else "")
        else:
            shown = num(value)
        yield prefix, shown or "none"


def num(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)
