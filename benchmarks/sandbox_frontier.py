"""Forgetting against retention on sandbox worlds: both SSPU forms, strengths, K, seeds, and the two controls.

    python benchmarks/sandbox_frontier.py --worlds 31 32 33 --seeds 0 1 2 --out runs/bench/frontier

Writes points-WORLD.json (every run), frontier.png and table.md. The settings are the defaults of `saeunlearn demo`,
except for what an axis varies. The strength axis scales a finished update. Worlds, SAEs and finished runs are kept
between starts, and several processes may work on different worlds of one folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saeunlearn import figures
from saeunlearn.cases import sandbox_case
from saeunlearn.checkpoints import write_json
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.features.selection import SelectConfig, Selection
from saeunlearn.methods.deltas import attached
from saeunlearn.methods.sspu import SSPUConfig, fit, prepare, settle
from saeunlearn.models import LanguageModel
from saeunlearn.options import settings_of
from saeunlearn.pipeline import choose
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import DEMO_SELECT, DEMO_SETTINGS, Sandbox, SandboxConfig, WorldConfig, build

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5)
TARGETS = {"forget": (0.15, 0.35), "seen": (0.97, 9.0), "held_out": (0.94, 9.0), "untouched": (0.94, 9.0)}


class World:
    """A built world with its SAEs."""

    def __init__(self, seed: int, out: Path, vocabulary: int | None = None) -> None:
        progress = ConsoleProgress()
        self.seed = seed
        config = SandboxConfig(world=WorldConfig(seed=seed))
        self.box: Sandbox = build(replace(config, vocabulary=vocabulary or config.vocabulary), progress)
        self.case = sandbox_case(self.box, f"world-{seed}", out / f"world-{seed}", progress)
        self.model, self.forget, self.retain = self.case.model, self.case.forget, self.case.retain
        self.questions = self.case.questions

    @cached_property
    def saes(self) -> Mapping[int, Any]:
        return self.case.saes()

    def accuracy(self, model: LanguageModel | None = None) -> dict[str, float]:
        """Multiple choice by group, of the world's model or another one."""
        groups: dict[str, list[float]] = {}
        for record, value in zip(self.questions, multiple_choice(model or self.model, self.questions).values):
            groups.setdefault(group_of(record), []).append(value)
        return {k: statistics.mean(v) for k, v in sorted(groups.items())}

    def select(self, settings: SSPUConfig, seed: int, layer: int | None = None, k: int | None = None) -> Selection:
        config = SelectConfig(**{**DEMO_SELECT, "layer": layer, "k": k or DEMO_SELECT["k"]})
        return choose(self.model, self.saes, self.forget, self.retain, config, settings, seed, Progress())

    def run(self, selection: Selection, settings: SSPUConfig, seed: int, curve: bool) -> dict[str, Any]:
        """One update, trained, settled and measured; with `curve` at every strength."""
        run = prepare(self.model, self.forget, self.retain, settings, selection, self.saes, seed)
        fit(run, Progress())
        budget = settle(run)
        after = {}
        for scale in SCALES if curve else (1.0,):
            with attached(run.deltas, scale):
                after[f"{scale:g}"] = self.accuracy()
        return {"layer": selection.layer, "k": selection.k, "d": self.model.d_model, "after": after, "budget": budget}


def jobs(forms: list[str], seeds: list[int]) -> Iterator[tuple[str, str, str, int | None, int]]:
    """(kind, form, basis, K, seed): the default runs, and at the first seed other K and the controls."""
    for s in seeds:
        for form in forms:
            yield "default", form, "relevant", None, s
        if s == seeds[0] and "hard" in forms:
            for k in (8, 16):
                yield "K", "hard", "relevant", k, s
            for basis in ("random_rows", "random_basis"):
                yield "control", "hard", basis, None, s


def measure(seed: int, args: argparse.Namespace) -> None:
    """Every job of one world."""
    file = args.out / f"points-{seed}.json"
    points: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    base = settings_of(SSPUConfig, DEMO_SETTINGS, "sspu")
    world = World(seed, args.out)
    points["original"] = world.accuracy()
    for kind, form, basis, k, s in jobs(args.forms, args.seeds):
        key = f"{kind}/{form}/{basis}/{k}/{s}"
        if key not in points:
            settings = replace(base, form=form, basis=basis)
            # K and the controls are compared at the layer that the default run of their seed chose.
            fixed = None if kind == "default" else points[f"default/{form}/relevant/None/{s}"]["layer"]
            selection = world.select(settings, s, fixed, k)
            result = world.run(selection, settings, s, curve=s == args.seeds[0])
            points[key] = {"world": seed, "seed": s, "kind": kind, "form": form, "basis": basis, **result}
            write_json(file, points)
            shown = " ".join(f"{g} {v:.2f}" for g, v in result["after"]["1"].items())
            print(f"{seed}/{key} layer {result['layer']}: {shown} rise {result['budget']['retain_rise']:.3f}",
                  flush=True)  # fmt: skip


def kept(after: dict[str, float], original: dict[str, float]) -> float:
    return statistics.mean(after[g] / original[g] for g in after if "forget" not in g)


def gone(after: dict[str, float]) -> float:
    return statistics.mean(v for g, v in after.items() if "forget" in g)


def table(worlds: dict[int, Any]) -> str:
    """What the default runs kept of each group (forget: the score itself), and how many meet the aim."""
    lines = ["| form | group | mean | sd | min | max | aim | runs that meet it |", "|---" * 8 + "|"]
    for form in ("hard", "soft"):
        runs = [(w["original"], p) for w in worlds.values() for p in w.values() if p.get("kind") == "default"
                and p["form"] == form]  # fmt: skip
        for group in runs[0][0] if runs else ():
            forget = group.startswith("forget")
            values = [p["after"]["1"][group] / (1 if forget else before[group]) for before, p in runs]
            low, high = TARGETS["forget" if forget else group.split("/")[1]]
            met = sum(low <= v <= high for v in values)
            aim = f"{low}–{high}" if forget else f"≥ {low}"
            lines.append(f"| {form} | {group} | {statistics.mean(values):.3f} | {spread(values):.3f} | "
                         f"{min(values):.3f} | {max(values):.3f} | {aim} | {met} of {len(values)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def report(out: Path) -> None:
    """The table of the default runs and the figure of all curves, over every world measured so far."""
    worlds = {int(f.stem.split("-")[1]): json.loads(f.read_text()) for f in sorted(out.glob("points-*.json"))}
    (out / "table.md").write_text(table(worlds))
    print(table(worlds))
    dots: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for world in worlds.values():
        for name, p in world.items():
            if name != "original" and len(p["after"]) > 1:
                basis = p["form"] if p["basis"] == "relevant" else p["basis"].replace("_", " ")
                for scale, after in p["after"].items():
                    point = (kept(after, world["original"]), gone(after))
                    dots.setdefault((f"{basis}, K = {p['k']}", scale), []).append(point)
    shown = [
        {"series": series, "label": f"×{scale}" if series == "hard, K = 32" else "",
         "x": statistics.mean(x for x, _ in points), "y": statistics.mean(y for _, y in points),
         "x_err": spread([x for x, _ in points]), "y_err": spread([y for _, y in points])}
        for (series, scale), points in dots.items()
    ]  # fmt: skip
    figures.save(figures.frontier(shown), out / "frontier.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="*", default=[31, 32, 33])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=["hard", "soft"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/frontier"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.worlds:
        measure(seed, args)
    report(args.out)


if __name__ == "__main__":
    main()
