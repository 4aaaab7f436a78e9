"""Is the automatic layer the right one? Every layer run to its end, against the choice and against each score.

    python benchmarks/layers.py --worlds 31 32 33 --data ../shared/data --out runs/bench/layers

For every layer the finished update is scaled over a range, which gives a curve of forgetting against retention;
layers are compared at equal retention, interpolated on that curve (multiple choice: .98 of the original; the real
model: a retain loss 1 % up). The difference between the chosen and the best layer is paired over questions (real
model: over stories), with a 95 % interval. Writes a JSON file a case, and table.md with the rank correlation of each
score. Finished cases are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from birds import MAX_LENGTH, topic_tokens
from sandbox_frontier import World
from scipy.stats import spearmanr

from sae_training import SAEConfig, load_saes, save_saes, train_saes
from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, windows
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.features.selection import ProbeResult, SelectConfig, Selection
from saeunlearn.features.selection import select as choose_layer
from saeunlearn.losses import mean_loss, token_losses
from saeunlearn.methods.deltas import attached
from saeunlearn.methods.sspu import SSPUConfig, fit, prepare, probe_layer
from saeunlearn.models import LanguageModel
from saeunlearn.options import settings_of
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import DEMO_SELECT, DEMO_SETTINGS

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)


Curve = list[tuple[float, list[float]]]  # (cost, gain of each item), from small to large strength


def at(curve: Curve, cost: float) -> np.ndarray:
    """Gain of each item where the cost is met: linear between points; the last point where it never is."""
    last = (0.0, np.zeros(len(curve[0][1])))
    for c, gains in curve:
        if c > cost:
            return last[1] + (np.array(gains) - last[1]) * (cost - last[0]) / (c - last[0])
        last = (c, np.array(gains))
    return last[1]


def sandbox(seed: int, out: Path, run_seed: int) -> dict[str, Any]:
    """Gain: drop of forget multiple choice (points). Cost: share of near and far multiple choice lost."""
    world = World(seed, out)
    settings = settings_of(SSPUConfig, DEMO_SETTINGS, "sspu")
    groups = [group_of(q) for q in world.questions]
    original = multiple_choice(world.model, world.questions).values

    def point() -> tuple[float, list[float]]:
        now = multiple_choice(world.model, world.questions).values
        kept = [statistics.mean(v for v, h in zip(now, groups) if h == g)
                / statistics.mean(v for v, h in zip(original, groups) if h == g)
                for g in sorted(set(groups)) if "forget" not in g]  # fmt: skip
        gone = [100 * (o - v) for o, v, g in zip(original, now, groups) if "forget" in g]
        return max(0.0, 1 - statistics.mean(kept)), gone

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
    marks = [topic_tokens(model, w) for w in windows(tests[0], model, MAX_LENGTH)]

    def losses() -> tuple[list[float], float]:
        """Loss on the topic's words of each story that has any, and on the retain stories."""
        by_story = token_losses(model, windows(tests[0], model, MAX_LENGTH))
        topic = [float(x[m].mean()) for x, m in zip(by_story, marks) if m.any()]
        return topic, mean_loss(model, windows(tests[1], model, MAX_LENGTH))

    before = losses()

    def point() -> tuple[float, list[float]]:
        topic, kept = losses()
        return max(0.0, kept / before[1] - 1), [now - then for now, then in zip(topic, before[0])]

    saes = load_saes(folder, model)
    return compare("birds", model, saes, forget, retain, {}, SSPUConfig(), run_seed, point, cost=0.01)


def compare(name: str, model: LanguageModel, saes: Any, forget: Corpus, retain: Corpus, select: dict[str, Any],
            settings: SSPUConfig, seed: int, point: Any, cost: float) -> dict[str, Any]:  # fmt: skip
    """The automatic choice with its table, and every layer's gain at equal cost."""
    candidates: dict[int, Selection] = {}

    def probe(candidate: Selection) -> ProbeResult:
        candidates[candidate.layer] = candidate
        return probe_layer(model, forget, retain, settings, candidate, saes, seed, Progress())

    chosen = choose_layer(model, saes, forget, retain, SelectConfig(**select), probe=probe, seed=seed,
                          progress=Progress())  # fmt: skip
    items: dict[int, np.ndarray] = {}
    curves: dict[int, Any] = {}
    for layer, selection in candidates.items():
        run = prepare(model, forget, retain, settings, selection, saes, seed)
        fit(run, Progress())
        curve = []
        for scale in SCALES:
            with attached(run.deltas, scale):
                curve.append(point())
        items[layer] = at(curve, cost)
        curves[layer] = [(c, float(np.mean(g))) for c, g in curve]
        print(f"{name} layer {layer}: gain {items[layer].mean():.2f} at cost {cost} {curves[layer]}", flush=True)
    gains = {i: float(x.mean()) for i, x in items.items()}
    best = max(gains, key=lambda i: gains[i])
    print(f"{name}: chosen {chosen.layer} ({gains[chosen.layer]:.2f}), best {best} ({gains[best]:.2f})", flush=True)
    behind = items[best] - items[chosen.layer]
    half = 1.96 * float(behind.std(ddof=1)) / math.sqrt(len(behind))
    return {"name": name, "seed": seed, "chosen": chosen.layer, "best": best, "gains": gains, "curves": curves,
            "behind": float(behind.mean()), "interval": [float(behind.mean()) - half, float(behind.mean()) + half],
            "table": chosen.layers}  # fmt: skip


def correlations(result: dict[str, Any]) -> dict[str, float]:
    """Spearman's rank correlation over layers of every score (and the probe) with the gain at equal retention."""
    rows = [r for r in result["table"] if r["probe"]]
    gains = [result["gains"][r["layer"]] for r in rows]
    out = {s: float(spearmanr([r["scores"][s] for r in rows], gains)[0]) for s in rows[0]["scores"]}
    return out | {"probe": float(spearmanr([r["probe"]["forget_rise"] for r in rows], gains)[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="*", default=[31, 32, 33])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/layers"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        cases = {f"world-{w}": partial(sandbox, w, args.out, seed) for w in args.worlds}
        if (args.data / "stories260K").exists():
            cases["birds"] = partial(real, args.data, args.out, seed)
        for name, case in cases.items():
            file = args.out / f"{name}-{seed}.json"
            if not file.exists():
                result = case()
                write_json(file, result | {"correlations": correlations(result)})
    results = [json.loads(f.read_text()) for f in sorted(args.out.glob("*-[0-9].json"))]
    names = list(results[0]["correlations"])
    lines = ["| case | chosen | best | behind the best (95 %) | " + " | ".join(names) + " |",
             "|---" * (4 + len(names)) + "|"]  # fmt: skip
    for r in results:
        shown = " | ".join(f"{r['correlations'][n]:+.2f}" for n in names)
        low, high = r["interval"]
        lines.append(f"| {r['name']} seed {r['seed']} | {r['chosen']} | {r['best']} "
                     f"| {r['behind']:.2f} ({low:.2f} to {high:.2f}) | {shown} |")  # fmt: skip
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
