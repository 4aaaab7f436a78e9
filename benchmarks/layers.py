"""Is the automatic layer the right one? Every layer run to its end, against the choice and against each score.

    python benchmarks/layers.py --worlds 11 12 13 --data ../shared/data --out runs/bench/layers

For every layer the finished update is scaled over a range, which gives a curve of forgetting against retention;
layers are compared at equal retention, interpolated on that curve (multiple choice: .98 of the original; the real
model: a retain loss 1.5 % up). Writes layers.json and table.md, with the rank correlation of each score.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from birds import measure as measure_birds
from sandbox_frontier import World
from scipy.stats import spearmanr

from sae_training import SAEConfig, load_saes, save_saes, train_saes
from saeunlearn.corpus import Corpus
from saeunlearn.features.selection import SelectConfig, Selection
from saeunlearn.methods.deltas import attached
from saeunlearn.methods.sspu import SSPUConfig, fit, prepare
from saeunlearn.models import LanguageModel
from saeunlearn.pipeline import choose, settings_of
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import DEMO_SELECT, DEMO_SETTINGS

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)


def at(curve: list[tuple[float, float]], cost: float) -> float:
    """Gain where the cost, falling from small to large strength, is met: linear between points (cost, gain)."""
    last = (0.0, 0.0)
    for c, g in curve:
        if c > cost:
            return last[1] + (g - last[1]) * (cost - last[0]) / (c - last[0])
        last = (c, g)
    return last[1]


def sandbox(seed: int, out: Path, run_seed: int) -> dict[str, Any]:
    """Gain: drop of forget multiple choice (points). Cost: share of near and far multiple choice lost."""
    world = World(seed, out)
    settings = settings_of(SSPUConfig, DEMO_SETTINGS, "sspu")
    original = world.accuracy()

    def point() -> tuple[float, float]:
        now = world.accuracy()
        kept = statistics.mean(now[g] / original[g] for g in now if "forget" not in g)
        gone = statistics.mean(original[g] - now[g] for g in now if "forget" in g)
        return max(0.0, 1 - kept), 100 * gone

    data = (world.model, world.saes, world.forget, world.retain)
    return compare(f"world {seed}", *data, DEMO_SELECT, settings, run_seed, point, cost=0.02)


def real(data: Path, out: Path, run_seed: int) -> dict[str, Any]:
    """Gain: rise of the loss on bird words (nats). Cost: relative rise of the loss on retain stories."""
    model = LanguageModel.open(data / "stories260K")
    forget, retain = (Corpus.load(data / f"tinystories/{n}_train.jsonl") for n in ("forget_birds", "retain"))
    tests = [Corpus.load(data / f"tinystories/{n}_test.jsonl") for n in ("forget_birds", "retain")]
    folder = out / "saes-birds"
    if not folder.exists():
        both = Corpus(forget.records + retain.records)
        layers = list(range(model.n_layers))
        save_saes(train_saes(model, both, layers, SAEConfig(), seed=0, progress=ConsoleProgress()), folder)
    before = measure_birds(model, *tests)

    def point() -> tuple[float, float]:
        now = measure_birds(model, *tests)
        return max(0.0, now["retain"] / before["retain"] - 1), now["topic"] - before["topic"]

    saes = load_saes(folder, model)
    return compare("birds", model, saes, forget, retain, {}, SSPUConfig(), run_seed, point, cost=0.015)


def compare(name: str, model: LanguageModel, saes: Any, forget: Corpus, retain: Corpus, select: dict[str, Any],
            settings: SSPUConfig, seed: int, point: Any, cost: float) -> dict[str, Any]:  # fmt: skip
    """The automatic choice with its table, and every layer's gain at equal cost."""
    chosen = choose(model, saes, forget, retain, SelectConfig(**select), settings, seed, Progress())
    gains: dict[int, float] = {}
    curves: dict[int, Any] = {}
    for row in chosen.layers:
        layer = row["layer"]
        config = SelectConfig(**select, layer=layer)
        selection: Selection = choose(model, saes, forget, retain, config, settings, seed, Progress())
        run = prepare(model, forget, retain, settings, selection, saes, seed)
        fit(run, Progress())
        curve = []
        for scale in SCALES:
            with attached(run.deltas, scale):
                curve.append(point())
        curves[layer], gains[layer] = curve, at(curve, cost)
        print(f"{name} layer {layer}: gain {gains[layer]:.2f} at cost {cost} {curve}", flush=True)
    best = max(gains, key=lambda i: gains[i])
    print(f"{name}: chosen {chosen.layer} ({gains[chosen.layer]:.2f}), best {best} ({gains[best]:.2f})", flush=True)
    return {"name": name, "seed": seed, "chosen": chosen.layer, "best": best, "gains": gains, "curves": curves,
            "behind": gains[best] - gains[chosen.layer], "table": chosen.layers}  # fmt: skip


def correlations(result: dict[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation over layers of every score (and the probe) with the gain at equal retention."""
    rows = [r for r in result["table"] if r["probe"]]
    gains = [result["gains"][r["layer"]] for r in rows]
    out = {s: float(spearmanr([r["scores"][s] for r in rows], gains)[0]) for s in rows[0]["scores"]}
    return out | {"probe": float(spearmanr([r["probe"]["forget_rise"] for r in rows], gains)[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="*", default=[11, 12, 13])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/layers"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        results += [sandbox(w, args.out, seed) for w in args.worlds]
        if (args.data / "stories260K").exists():
            results.append(real(args.data, args.out, seed))
    for r in results:
        r["correlations"] = correlations(r)
    (args.out / "layers.json").write_text(json.dumps(results, indent=1))
    names = list(results[0]["correlations"])
    lines = ["| case | chosen | best | behind | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for r in results:
        shown = " | ".join(f"{r['correlations'][n]:+.2f}" for n in names)
        lines.append(f"| {r['name']} seed {r['seed']} | {r['chosen']} | {r['best']} | {r['behind']:.2f} | {shown} |")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
