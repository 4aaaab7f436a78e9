"""What came out of a comparison: intervals, paired tests, tables and figures from the points on disk."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import figures
from ..checkpoints import write_json
from ..progress import Progress
from .frontier import SCHEMA, Plan, read_attempts, read_sheet, score_file, spaces, trial_file
from .points import LIMITS, Sheet, best_within
from .resampling import RESAMPLES, interval, paired_tests, resample
from .side_by_side import point_of
from .tuning import Trials

OUTCOMES = ("forgetting", "retention", *(f"forgetting_at_{limit:g}" for limit in LIMITS))


def write_results(plan: Plan, trials: Trials, out: Path, progress: Progress) -> dict[str, Any]:
    """Write results.json and what is made of it; every trial and scoring run must be there."""
    sheets = {c: read_sheet(out / "cases" / c / "questions.json") for c in (*plan.tune, *plan.score)}
    tuned = {m: [read_attempts(trial_file(out, m, n)) for n in range(plan.trials)] for m in plan.methods}
    scored = {m: [read_attempts(score_file(out, m, i))[0] for i in range(len(plan.seeds))] for m in plan.methods}
    runs = [{"method": m, **run_row(r)} for m in plan.methods for r in scored[m]]
    drawn = draws(plan, sheets, scored, progress)
    methods = {}
    for m in plan.methods:
        own = [r for r in runs if r["method"] == m]
        kept = json.loads(score_file(out, m, 0).read_text())
        methods[m] = {
            "chosen": {"trial": kept["trial"], "settings": kept["settings"]},
            "tuning": tuning_row(tuned[m]),
            "scoring": {"failed": sum(r["error"] is not None for r in own), "spent": spent(scored[m]),
                        **{o: summary([r[o] for r in own], drawn[o][m]) for o in OUTCOMES}},
        }  # fmt: skip
    result = {
        "schema": SCHEMA, "plan": asdict(plan), "tuning": spaces(plan), "resamples": RESAMPLES,
        "floor": {c: s.floor_is for c, s in sheets.items()}, "methods": methods, "runs": runs,
        "tests": {o: paired_tests(drawn[o]) for o in OUTCOMES}, "preparation_seconds": prepared(out),
        "versions": json.loads((out / "compare.json").read_text())["versions"],
    }  # fmt: skip
    write_json(out / "results.json", result)
    points_csv(plan, tuned, scored, out / "points.csv")
    cells = table(result)
    (out / "table.md").write_text(markdown(cells), encoding="utf-8")
    (out / "table.tex").write_text(latex(cells), encoding="utf-8")
    figures.save(figures.frontier(frontier_points(result)), out / "frontier.png")
    figures.save(figures.bars_at_limits(bars(result)), out / "constraints.png")
    return result


def run_row(attempt: Mapping[str, Any]) -> dict[str, Any]:
    """One scoring run: full strength, and the most forgetting within each limit (0 where only no edit keeps it)."""
    full = attempt["curve"][0]
    row = {k: attempt[k] for k in ("case", "seed", "error", "seconds", "optimiser_steps")}
    row |= {"forgetting": full["forgetting"], "retention": full["retention"], "strengths": {}}
    for limit in LIMITS:
        best = best_within(attempt["curve"], limit)
        row[f"forgetting_at_{limit:g}"] = best["forgetting"] if best else 0.0
        row["strengths"][f"{limit:g}"] = best["strength"] if best else 0.0
    return row


def draws(plan: Plan, sheets: Mapping[str, Sheet], scored: Mapping[str, Sequence[Mapping[str, Any]]],
          progress: Progress
          ) -> dict[str, dict[str, Any]]:  # fmt: skip
    """{outcome: {method: [resamples]}}, all from the same resamples."""
    cases = [plan.case_of(i) for i in range(len(plan.seeds))]

    def answers(limit: float | None) -> dict[str, list[Sequence[float]]]:
        def values(attempt: Mapping[str, Any]) -> Sequence[float]:
            best = attempt["curve"][0] if limit is None else best_within(attempt["curve"], limit)
            return best["values"] if best else sheets[attempt["case"]].before

        return {m: [values(a) for a in attempts] for m, attempts in scored.items()}

    wanted = {(m, limit): v for limit in (None, *LIMITS) for m, v in answers(limit).items()}
    found = resample(sheets, cases, wanted, plan.seed, progress)
    parts = [("forgetting", None, 0), ("retention", None, 1), *((f"forgetting_at_{x:g}", x, 0) for x in LIMITS)]
    return {o: {m: found[m, limit][at] for m in plan.methods} for o, limit, at in parts}


def summary(values: Sequence[float], drawn: Any) -> dict[str, Any]:
    """Mean and spread over runs, interval over runs × questions."""
    low, high = interval(drawn)
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "min": min(values), "max": max(values), "low": low, "high": high}


def tuning_row(trials: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What tuning cost, and by case the trial with the most forgetting within each limit (None: no trial keeps it)."""
    attempts = [a for rows in trials for a in rows]
    frontier: dict[str, dict[str, Any]] = {}
    for at, case in enumerate(a["case"] for a in trials[0]):
        points = [{"trial": n, **rows[at]["curve"][0]} for n, rows in enumerate(trials) if not rows[at]["error"]]
        found = {f"{limit:g}": best_within(points, limit) for limit in LIMITS}
        frontier[case] = {
            limit: None if p is None else {k: p[k] for k in ("trial", "forgetting", "retention")}
            for limit, p in found.items()
        }
    failed = sum(any(a["error"] for a in rows) for rows in trials)
    return {"trials": len(trials), "failed": failed, "spent": spent(attempts), "frontier": frontier}


def spent(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of unlearning (not of measuring) and optimiser steps: in all, and a run."""
    seconds, steps = (sum(a[k] for a in attempts) for k in ("seconds", "optimiser_steps"))
    n = len(attempts)
    return {"runs": n, "seconds": seconds, "optimiser_steps": steps, "seconds_a_run": seconds / n,
            "steps_a_run": steps / n}  # fmt: skip


def prepared(out: Path) -> dict[str, float]:
    """Seconds that the SAEs and selections took, which the trials share and which are not in their seconds."""
    files = sorted((out / "cases").rglob("seconds-*.json"))
    return {f"{f.parent.name}/{f.stem.removeprefix('seconds-')}": json.loads(f.read_text()) for f in files}


# --- tables and figures ------------------------------------------------------------------------------------


def points_csv(plan: Plan, tuned: Mapping[str, Any], scored: Mapping[str, Any], file: Path) -> None:
    """Every point: tuning trials, and each strength of the scoring runs."""
    rows = []
    for m in plan.methods:
        found = [("tune", n, a) for n, attempts in enumerate(tuned[m]) for a in attempts]
        for phase, n, a in [*found, *(("score", i, a) for i, a in enumerate(scored[m]))]:
            known = {k: a[k] for k in ("case", "seed", "seconds", "optimiser_steps", "error")}
            for p in a["curve"]:
                own = {k: p[k] for k in ("strength", "forgetting", "retention")}
                rows.append({"phase": phase, "method": m, "number": n, **known, **own, **p["groups"]})
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)))
        writer.writeheader()
        writer.writerows(rows)


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Header and a row a method, most forgetting within the last limit first."""
    header = ["method", "forgetting", "retention", *(f"forgetting at ≥ {limit:g}" for limit in LIMITS), "s a run",
              "steps a run", "s tuning", "failed"]  # fmt: skip
    rows = []
    found = result["methods"]
    for m in ranked(result):
        s, t = found[m]["scoring"], found[m]["tuning"]
        marks = [f"{s[o]['mean']:.3f} [{s[o]['low']:.3f}, {s[o]['high']:.3f}]" for o in OUTCOMES]
        cost = [
            f"{s['spent']['seconds_a_run']:.0f}",
            f"{s['spent']['steps_a_run']:.0f}",
            f"{t['spent']['seconds']:.0f}",
        ]
        rows.append([m, *marks, *cost, f"{t['failed']} + {s['failed']}"])
    return [header, *rows]


def ranked(result: Mapping[str, Any]) -> list[str]:
    """The methods, most forgetting within the last limit first."""
    return sorted(result["methods"], key=lambda m: -result["methods"][m]["scoring"][OUTCOMES[-1]]["mean"])


def markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" + "|---:" * (len(cells[0]) - 1) + "|", *lines[1:]]) + "\n"


def latex(cells: Sequence[Sequence[str]]) -> str:
    """A tabular for the package booktabs."""

    def row(values: Sequence[str]) -> str:
        plain = (v.replace("_", r"\_").replace("%", r"\%").replace("≥", r"$\geq$") for v in values)
        return " & ".join(plain) + r" \\"

    return "\n".join([
        "% means over scoring runs, 95 % bootstrap intervals over runs and questions; failed: trials + scoring runs",
        rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", r"\toprule", row(cells[0]), r"\midrule",
        *(row(r) for r in cells[1:]), r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def frontier_points(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For `figures.frontier`: what is left of the forget knowledge against retention, at full strength."""
    scored = {m: found["scoring"] for m, found in result["methods"].items()}
    return [point_of(m, s["forgetting"], s["retention"]) for m, s in scored.items()]


def bars(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"method": m, "limit": limit, **result["methods"][m]["scoring"][f"forgetting_at_{limit:g}"],
         "runs": [r[f"forgetting_at_{limit:g}"] for r in result["runs"] if r["method"] == m]}
        for m in ranked(result) for limit in LIMITS
    ]  # fmt: skip
