"""Forgetting against retention on sandbox worlds: both SSPU forms, strengths, K, seeds, and the two controls.

    python benchmarks/sandbox_frontier.py --worlds 11 12 13 --seeds 0 1 2 --out runs/bench/frontier

Writes points.json (every run), frontier.png and table.md. The settings are the defaults of `saeunlearn demo`, except
for what an axis varies. Worlds and SAEs are cached between starts; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_training import SAEConfig, load_saes, save_saes, train_saes
from saeunlearn import figures
from saeunlearn.corpus import Corpus
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.features.selection import SelectConfig
from saeunlearn.methods.sspu import SSPU, SSPUConfig
from saeunlearn.models import LanguageModel
from saeunlearn.pipeline import choose, settings_of
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import DEMO_SAE, DEMO_SELECT, DEMO_SETTINGS, Sandbox, SandboxConfig, WorldConfig, build


class World:
    """A built world with its SAEs."""

    def __init__(self, seed: int, out: Path) -> None:
        progress = ConsoleProgress()
        self.seed = seed
        self.box: Sandbox = build(SandboxConfig(world=WorldConfig(seed=seed)), progress)
        self.model = LanguageModel.open(self.box.model)
        self.forget, self.retain = Corpus.load(self.box.forget), Corpus.load(self.box.retain)
        self.questions = Corpus.load(self.box.questions)
        folder = out / f"saes-{seed}"
        if not folder.exists():
            both = Corpus(self.forget.records + self.retain.records)
            layers = range(self.model.n_layers)
            save_saes(
                train_saes(self.model, both, list(layers), SAEConfig(**DEMO_SAE), seed=0, progress=progress), folder
            )
        self.saes = load_saes(folder, self.model)

    def accuracy(self) -> dict[str, float]:
        """Multiple choice by group, and the mean of `near` and `far` on seen phrasings."""
        groups: dict[str, list[float]] = {}
        for record, value in zip(self.questions, multiple_choice(self.model, self.questions).values):
            groups.setdefault(group_of(record), []).append(value)
        return {k: statistics.mean(v) for k, v in sorted(groups.items())}

    def run(self, layer: int | None, settings: SSPUConfig, seed: int, k: int | None) -> dict[str, Any]:
        """One erasure, measured; `layer` None chooses it."""
        config = SelectConfig(**DEMO_SELECT, layer=layer, k=k)
        selection = choose(self.model, self.saes, self.forget, self.retain, config, settings, seed, Progress())
        erasure = SSPU().unlearn(
            self.model, self.forget, self.retain, config=settings, selection=selection, saes=self.saes, seed=seed,
            progress=Progress(),
        )  # fmt: skip
        with erasure.apply(self.model):
            after = self.accuracy()
        return {"world": self.seed, "seed": seed, "layer": selection.layer, "k": selection.k,
                "d": self.model.d_model, "after": after, "budget": erasure.manifest["extra"]["budget"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=["hard", "soft"])
    parser.add_argument("--curve-seeds", type=int, nargs="*", default=[0], help="seeds of the strength curves")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/frontier"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "points.json"
    points: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    base = settings_of(SSPUConfig, DEMO_SETTINGS, "sspu")
    jobs = [("default", form, "relevant", base.gamma, None, s) for s in args.seeds for form in args.forms]
    for s in args.curve_seeds:
        for gamma in (base.gamma / 4, base.gamma / 2, base.gamma * 2):
            jobs += [("curve", form, "relevant", gamma, None, s) for form in args.forms]
        jobs += [("K", "hard", "relevant", base.gamma, k, s) for k in (8, 32)]
        for gamma in (base.gamma / 2, base.gamma, base.gamma * 2):
            jobs += [("control", "hard", basis, gamma, None, s) for basis in ("random_rows", "random_basis")]
    for seed in args.worlds:
        world = World(seed, args.out)
        points[f"original/{seed}"] = world.accuracy()
        layer: dict[tuple[str, int], int] = {}
        for kind, form, basis, gamma, k, s in jobs:
            key = f"{kind}/{form}/{basis}/{gamma:g}/{k}/{seed}/{s}"
            if key not in points:
                # The layer is chosen once for a form and seed, by the default run, and kept along the curves.
                fixed = None if kind == "default" else layer[(form, s)]
                result = world.run(fixed, replace(base, form=form, basis=basis, gamma=gamma), s, k)
                points[key] = {"kind": kind, "form": form, "basis": basis, "gamma": gamma, **result}
                file.write_text(json.dumps(points, indent=1))
                shown = " ".join(f"{g} {v:.2f}" for g, v in result["after"].items())
                print(f"{key} layer {result['layer']}: {shown} rise {result['budget']['retain_rise']:.3f}", flush=True)
            if kind == "default":
                layer[(form, s)] = points[key]["layer"]
    report(points, args.out)


def report(points: dict[str, Any], out: Path) -> None:
    """The table of the default runs and the figure of all of them."""
    original = {int(k.split("/")[1]): v for k, v in points.items() if k.startswith("original/")}
    runs = [p for k, p in points.items() if not k.startswith("original/")]
    lines = ["| form | group | original | after: mean | min | max |", "|---|---|---|---|---|---|"]
    for form in ("hard", "soft"):
        chosen = [p for p in runs if p["kind"] == "default" and p["form"] == form]
        if not chosen:
            continue
        for group in chosen[0]["after"]:
            values = [p["after"][group] for p in chosen]
            before = statistics.mean(o[group] for o in original.values())
            lines.append(f"| {form} | {group} | {before:.3f} | {statistics.mean(values):.3f} "
                         f"| {min(values):.3f} | {max(values):.3f} |")  # fmt: skip
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    dots: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for p in runs:
        series = p["form"] if p["basis"] == "relevant" else p["basis"].replace("_", " ")
        dots.setdefault((series, p["gamma"], p["k"]), []).append(p)
    shown = []
    for (series, gamma, k), group in sorted(dots.items()):
        kept = [statistics.mean(p["after"][g] / original[p["world"]][g] for g in p["after"] if "forget" not in g)
                for p in group]  # fmt: skip
        gone = [statistics.mean(v for g, v in p["after"].items() if "forget" in g) for p in group]
        shown.append({
            "series": f"{series}, K = {k}", "label": f"γ {gamma:g}", "x": statistics.mean(kept),
            "y": statistics.mean(gone), "x_err": spread(kept), "y_err": spread(gone),
        })  # fmt: skip
    figures.save(figures.frontier(shown), out / "frontier.png")


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
