"""Evaluate a model on groups of questions and on texts, compare two evaluations, and print the comparison.

The results are plain JSON values. They identify records by the first 16 hex digits of `Record.id` and hold
no text, except `samples`, which quotes the prompts that were given: pass prompts only where text may be kept.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..corpus import Corpus, Record
from ..errors import ConfigError
from ..models import LanguageModel
from ..progress import Progress
from .meaning import is_forget
from .memorisation import NAMES, memorisation
from .metrics import Values, cloze, multiple_choice, nll, samples

SCHEMA = 1
DEFAULT = ("multiple_choice", "cloze", "nll")
METRICS = (*DEFAULT, *NAMES)
_RESAMPLES = 2000


def evaluate(
    model: LanguageModel,
    *,
    questions: Corpus | None = None,
    texts: Mapping[str, Corpus] | None = None,
    prompts: Sequence[str] = (),
    metrics: Sequence[str] = DEFAULT,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Multiple choice and cloze by group of questions, NLL by text corpus, greedy continuations of prompts.

    `metrics`: some of METRICS; "nll" is that of the texts, the others are measured on the questions.

    Returns a JSON-able document:

        {"schema": 1, "model": name,
         "questions": {"n", "fingerprint"} | None,
         "groups": {group: {"multiple_choice": M, "cloze": M}},      # a metric that fits no record is absent
         "texts": {name: {"n", "fingerprint", "per_token", "low", "high", "worst": [{"id", "value"}],
                          "ids": [...], "values": [...], "tokens": [...]}},
         "samples": [{"prompt", "text"}]}
        M = {"n", "mean", "low", "high", "chance", "subgroups": [{"label", "n", "mean"}], "ids", "values"}

    `group_of` builds the groups. `low` and `high` bound 95 %: Wilson for shares of right answers, a bootstrap over
    records for NLL (nats per token) and the other metrics. `subgroups` are the three worst topic × attribute: best
    remembered where the group is forgotten, least remembered elsewhere; `worst` records likewise. `chance` is None but
    for multiple choice. Raises ConfigError for an unknown metric.
    """
    progress = progress or Progress()
    check_metrics(metrics)
    groups: dict[str, dict[str, Any]] = {}
    if questions is not None:
        choice = [i for i, r in enumerate(questions) if r.choices]
        pairs = [i for i, r in enumerate(questions) if r.question and r.answer]
        parts = {n: Corpus(tuple(questions.records[i] for i in kept), questions.name)
                 for n, kept in (("choice", choice), ("pairs", pairs)) if kept}  # fmt: skip
        scored: list[tuple[str, Values]] = []
        for what, metric in (("choice", multiple_choice), ("pairs", cloze)):
            if what in parts and metric.__name__ in metrics:
                scored.append((what, metric(model, parts[what], progress=progress)))
        if "pairs" in parts and (further := [m for m in NAMES if m in metrics]):
            scored += [("pairs", v) for v in memorisation(model, parts["pairs"], further, progress=progress)]
        for what, values in scored:
            for group, summary in by_group(parts[what], values).items():
                groups.setdefault(group, {})[values.name] = summary
    return {
        "schema": SCHEMA,
        "model": model.name,
        "questions": {"n": len(questions), "fingerprint": questions.fingerprint()} if questions else None,
        "groups": dict(sorted(groups.items())),
        "texts": {
            name: _text_summary(name, corpus, nll(model, corpus, progress=progress))
            for name, corpus in ((texts or {}).items() if "nll" in metrics else ())
        },
        "samples": [{"prompt": p, "text": t} for p, t in zip(prompts, samples(model, prompts) if prompts else [])],
    }


def combine(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The document of evaluation.json: {"schema", "before", "after", "comparison", "samples"}.

    `samples` pairs the two continuations of each prompt: [{"prompt", "before", "after"}].
    """
    later = {s["prompt"]: s["text"] for s in after["samples"]}
    side_by_side = [
        {"prompt": s["prompt"], "before": s["text"], "after": later[s["prompt"]]}
        for s in before["samples"]
        if s["prompt"] in later
    ]
    return {
        "schema": SCHEMA,
        "before": {k: v for k, v in before.items() if k != "samples"},
        "after": {k: v for k, v in after.items() if k != "samples"},
        "comparison": compare(before, after, seed),
        "samples": side_by_side,
    }


def named_metrics(text: str) -> tuple[str, ...]:
    """The metrics of `default`, `all`, or names with commas between them. Raises ConfigError for an unknown one."""
    if text in ("default", "all"):
        return DEFAULT if text == "default" else METRICS
    names = tuple(n.strip() for n in text.split(","))
    check_metrics(names)
    return names


def check_metrics(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not in METRICS."""
    if unknown := sorted(set(names) - set(METRICS)):
        raise ConfigError(f"unknown metrics {unknown}; known: {', '.join(METRICS)}")


def group_of(record: Record) -> str:
    """Group of a question from its `set`, `phrasing` and `entity_status`; "all" without a `set`.

    "forget/seen", "near/held_out", … ; entities that the edit never used form "near/untouched" whatever the
    phrasing; without a phrasing the group is the set itself.
    """
    name = record.meta.get("set")
    if not name:
        return "all"
    if record.meta.get("entity_status") == "untouched":
        return f"{name}/untouched"
    phrasing = record.meta.get("phrasing")
    return f"{name}/{phrasing}" if phrasing else str(name)


def without_labels(result: dict[str, Any]) -> dict[str, Any]:
    """The result of `evaluate` with the labels of subgroups hashed, in place.

    They come from the user's records and may name what is to be forgotten.
    """
    for metrics in result["groups"].values():
        for summary in metrics.values():
            for subgroup in summary["subgroups"]:
                subgroup["label"] = hashlib.sha256(subgroup["label"].encode()).hexdigest()[:12]
    return result


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of `successes` among `n`."""
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], weights: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the weighted mean, resampling records (2,000 times, seeded)."""
    v, w = np.asarray(values, float), np.asarray(weights, float)
    rng = np.random.default_rng(seed)
    step = max(1, 2_000_000 // len(v))  # bounds the memory of the index table
    means = []
    for at in range(0, _RESAMPLES, step):
        index = rng.integers(0, len(v), (min(step, _RESAMPLES - at), len(v)))
        means.append((v * w)[index].sum(1) / w[index].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """One row per group and metric of two results of `evaluate`, the same records scored by two models.

    Row: {"group", "metric", "n", "before", "after", "change", "low", "high", "ratio", "chance",
    "before_low", "before_high", "after_low", "after_high"}. `low` and `high`: paired bootstrap 95 % interval
    of the change, over records; it does not cover the choice of seed. `ratio` = after / before (None where
    before is 0). Metric "nll" is in nats per token, the others are shares.
    Raises ConfigError when the two were not measured on the same records.
    """
    rows = []
    for group, metrics in before["groups"].items():
        for metric, b in metrics.items():
            a = after["groups"].get(group, {}).get(metric)
            _same_records(b, a, f"{group} {metric}")
            rows.append(_row(group, metric, b, a, "mean", [1.0] * b["n"], seed))
    for name, b in before["texts"].items():
        a = after["texts"].get(name)
        _same_records(b, a, f"text {name}")
        rows.append(_row(name, "nll", b, a, "per_token", b["tokens"], seed))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare` as an aligned table for a terminal."""
    if not rows:
        return "nothing was compared"
    cells = [("group", "metric", "n", "before", "after", "change", "95 % interval", "ratio")]
    for r in rows:
        ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}"
        interval = f"{r['low']:+.3f} … {r['high']:+.3f}"
        numbers = (f"{r['before']:.3f}", f"{r['after']:.3f}", f"{r['change']:+.3f}", interval, ratio)
        cells.append((r["group"], r["metric"].replace("_", " "), str(r["n"]), *numbers))
    return aligned(cells)


def aligned(cells: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells in columns, the first row as a header; the first two columns are set left."""
    widths = [max(len(c[i]) for c in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


# --- shared ------------------------------------------------------------------------------------------------


def by_group(corpus: Corpus, scored: Values) -> dict[str, dict[str, Any]]:
    """{group: M} as in `evaluate`, from one value for every question of `corpus`."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, r in enumerate(corpus):
        members[group_of(r)].append(i)
    out = {}
    for group, index in members.items():
        records = [corpus.records[i] for i in index]
        values: list[float] = [scored.values[i] for i in index]
        if scored.name in ("multiple_choice", "cloze"):  # right or wrong
            values = [int(v) for v in values]
            low, high = wilson(sum(values), len(values))
        else:
            low, high = bootstrap(values, [1.0] * len(values))
        is_choice = scored.name == "multiple_choice"
        chance = sum(1 / len(r.choices) for r in records) / len(records) if is_choice else None
        out[group] = {
            "n": len(values),
            "mean": sum(values) / len(values),
            "low": low,
            "high": high,
            "chance": chance,
            "subgroups": _worst_subgroups(group, records, values),
            "ids": [r.id[:16] for r in records],
            "values": values,
        }
    return out


def _worst_subgroups(group: str, records: Sequence[Record], values: Sequence[float]) -> list[dict[str, Any]]:
    parts: dict[str, list[float]] = defaultdict(list)
    for r, v in zip(records, values):
        label = " × ".join(str(r.meta[k]) for k in ("topic", "attribute") if r.meta.get(k) is not None)
        if label:
            parts[label].append(v)
    rows: list[dict[str, Any]] = [{"label": k, "n": len(v), "mean": sum(v) / len(v)} for k, v in sorted(parts.items())]
    return sorted(rows, key=lambda r: -r["mean"] if is_forget(group) else r["mean"])[:3]


def _text_summary(name: str, corpus: Corpus, scored: Values) -> dict[str, Any]:
    ids = [corpus.records[i].id[:16] for i in scored.records]
    return {"n": scored.n, "fingerprint": corpus.fingerprint(), **summarise_text(name, ids, scored)}


def summarise_text(name: str, ids: Sequence[str], scored: Values) -> dict[str, Any]:
    """What `evaluate` says of a text corpus called `name`, from its values alone."""
    low, high = bootstrap(scored.values, scored.tokens)
    order = sorted(range(scored.n), key=lambda i: scored.values[i] * (1 if is_forget(name) else -1))
    return {
        "per_token": scored.per_token,
        "low": low,
        "high": high,
        "worst": [{"id": ids[i], "value": scored.values[i]} for i in order[:5]],
        "ids": list(ids),
        "values": scored.values,
        "tokens": scored.tokens,
    }


def _same_records(before: Mapping[str, Any], after: Mapping[str, Any] | None, where: str) -> None:
    if after is None or before["ids"] != after["ids"]:
        raise ConfigError(f"{where}: before and after were not measured on the same records")


def _row(
    group: str,
    metric: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    aggregate: str,
    weights: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    b, a = before[aggregate], after[aggregate]
    low, high = bootstrap([y - x for x, y in zip(before["values"], after["values"])], weights, seed)
    return {
        "group": group,
        "metric": metric,
        "n": before["n"],
        "before": b,
        "after": a,
        "change": a - b,
        "low": low,
        "high": high,
        "ratio": a / b if b else None,
        "chance": before.get("chance"),
        "before_low": before["low"],
        "before_high": before["high"],
        "after_low": after["low"],
        "after_high": after["high"],
    }
