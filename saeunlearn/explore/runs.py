"""Several finished runs at once, as their JSON files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..erasure import Erasure
from ..errors import RunError
from ..evaluation.evaluate import is_forget
from ..reopen import read_object

_SHORT = {"multiple_choice": "choice", "cloze": "said"}
Runs = Mapping[str, Sequence[str | Path]]
"""{method: [run directory of each seed]}"""


def erasures_of(runs: Runs) -> dict[str, list[Erasure]]:
    """The Erasure of every run. Raises ErasureError for one that is missing or damaged."""
    return {m: [Erasure.load(Path(r) / "erasure") for r in roots] for m, roots in runs.items()}


def document_of(root: str | Path, name: str) -> dict[str, Any]:
    """A JSON file of a run directory: run, evaluation, attacks, selection … Raises RunError where it is not there."""
    return read_object(Path(root) / f"{name}.json", f"no {name} there")


def scores_of(runs: Runs) -> list[dict[str, Any]]:
    """What finished runs say in evaluation.json, one row a method, group and metric.

    [{"method", "group", "metric", "measure": both in a few words, "forget", "chance", "before": mean over the runs,
    "runs": [score after, of each run]}], for `figures_methods.scores`. Raises RunError for a run without evaluation, or
    runs of a method that were measured on other groups.
    """
    out = []
    for method, roots in runs.items():
        tables = [document_of(root, "evaluation")["comparison"] for root in roots]
        if len({tuple((r["group"], r["metric"]) for r in table) for table in tables}) > 1:
            raise RunError(f"the runs of {method} were measured on different groups")
        for same in zip(*tables):
            r = same[0]
            out.append({
                "method": method, "group": r["group"], "metric": r["metric"],
                "measure": f"{r['group']}\n{_SHORT.get(r['metric'], r['metric'])}", "forget": is_forget(r["group"]),
                "chance": r["chance"], "before": sum(x["before"] for x in same) / len(same),
                "runs": [x["after"] for x in same],
            })  # fmt: skip
    return out


def kept_by(scores: Sequence[Mapping[str, Any]], metric: str, *groups: str) -> dict[str, list[float]]:
    """{method: [after / before of the worst of its groups, of each run]} from `scores_of`; `groups`: how their names
    begin (near, far …). Groups that the original answers none of are left out."""
    out: dict[str, list[float]] = {}
    for method in dict.fromkeys(r["method"] for r in scores):
        own = [r for r in scores if r["method"] == method and r["metric"] == metric and r["group"].startswith(groups)]
        shares = [[v / r["before"] for v in r["runs"]] for r in own if r["before"]]
        out[method] = [min(column) for column in zip(*shares)]
    return out


def left_of(scores: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    """{method: [mean over the forget groups after, of each run]} from `scores_of`."""
    out: dict[str, list[float]] = {}
    for method in dict.fromkeys(r["method"] for r in scores):
        found = [r["runs"] for r in scores if r["method"] == method and r["metric"] == metric and r["forget"]]
        out[method] = [sum(column) / len(column) for column in zip(*found)]
    return out


def recovered_by(document: Mapping[str, Any], name: str) -> list[float] | None:
    """[share that an attack recovers] from attacks.json; None where it was left out or is not measurable."""
    found = [a["best"]["recovered"] for a in document["attacks"] if a["name"] == name and "best" in a]
    return found if found and found[0] is not None else None


def worst_of(document: Mapping[str, Any], *names: str) -> float | None:
    """The largest share that one of these attacks recovers, from attacks.json; None where none has a share."""
    return max((share for n in names for share in recovered_by(document, n) or ()), default=None)
