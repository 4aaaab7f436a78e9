"""Is it gone for good? Erasure methods on sandbox worlds against the oracle: what goes, what stays, what comes back.

    python benchmarks/deep_erasure.py --worlds 31 32 33 34 35 --seeds 0 1 2 3 4 --out runs/bench/deep
    python benchmarks/deep_erasure.py --vocabulary 400 …        # names of several tokens instead of one

World and seed go in pairs. Each run trains or solves one method with its defaults (SSPU with the settings of
`saeunlearn demo`), or one of VARIANTS, scores it beside the oracle and attacks both with the whole battery
(`attacks.py`); finished work is kept. Writes table.md: multiple choice on forget questions and its difference from the
oracle's, near and far as shares of the original (the worst of seen, held-out and untouched), the loss on retain text,
the accuracy after the best relearning attack and the oracle's after the same, and the worst attack's recovered share.
Means over runs (least to greatest). relearned.png shows every run of the folder.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from attacks import arguments, one, paired, unlearned
from sandbox_frontier import World

from saeunlearn import figures, figures_attacks
from saeunlearn.checkpoints import write_json
from saeunlearn.erasure import Erasure
from saeunlearn.evaluation.metrics import nll
from saeunlearn.healing import HealConfig, heal
from saeunlearn.methods import get_method
from saeunlearn.models import LanguageModel
from saeunlearn.options import settings_of
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import build_oracle

# name: method, its settings, those of the healing after it
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "blocks-healed": ("key-erasure", {"lam": 1.0, "max_retain_rise": 1e6}, {"lr": 2e-3, "max_return": 0.9}),
}
RELEARNING = ("relearn-lora", "relearn-full", "unrelated-lora", "unrelated-full")


def variant(world: World, name: str, seed: int) -> Erasure:
    method_name, settings, healing = VARIANTS[name]
    method, sets = get_method(method_name), (world.forget, world.retain)
    erasure = method.unlearn(
        world.model, *sets, config=settings_of(method.Config, settings, name), selection=None, saes={}, seed=seed,
        progress=ConsoleProgress(),
    )  # fmt: skip
    return heal(world.model, erasure, *sets, settings_of(HealConfig, healing, "healing"), seed, ConsoleProgress())


def measure(world: World, name: str, seed: int, out: Path) -> None:
    """Scores of the original, the edited model and the oracle: scores-….json."""
    file = out / f"scores-{world.seed}-{name}-{seed}.json"
    if file.exists():
        return
    folder = out / f"erasure-{world.seed}-{name}-{seed}"
    if name in VARIANTS and not folder.exists():
        variant(world, name, seed).save(folder)
    erasure = unlearned(world, name, seed, folder)
    oracle = LanguageModel.open(build_oracle(world.box, ConsoleProgress()))
    text = world.retain.sample(2000, 0)
    found: dict[str, Any] = {"original": world.accuracy(), "oracle": world.accuracy(oracle)}
    before = nll(world.model, text).per_token
    with erasure.apply(world.model):
        found |= {"edited": world.accuracy(), "nll": nll(world.model, text).per_token / before - 1}
    about = json.loads((world.box.oracle / "oracle.json").read_text())
    write_json(file, found | {"oracle_seconds": about["seconds"], "edit": erasure.manifest["extra"],
                              "changed": erasure.manifest["changed"]["share"]})  # fmt: skip


def table(out: Path, methods: list[str], pairs: list[tuple[int, int]]) -> str:
    titles = ["method", "runs", "forget seen", "forget held out", "− oracle (largest)", "near kept", "far kept",
              "untouched kept", "retain loss +%", "relearned", "oracle relearned", "worst attack recovers"]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    for name in methods:
        files = [(out / f"scores-{w}-{name}-{s}.json", out / f"run-{w}-{name}-{s}.json") for w, s in pairs]
        found = [(json.loads(a.read_text()), json.loads(b.read_text())) for a, b in files if a.exists() and b.exists()]
        if not found:
            continue
        scores, runs = [f[0] for f in found], [f[1] for f in found]

        def kept(start: str, end: str = "", scores: list[dict[str, Any]] = scores) -> list[float]:
            return [min(s["edited"][g] / s["original"][g] for g in s["original"]
                        if g.startswith(start) and g.endswith(end)) for s in scores]  # fmt: skip

        def after(key: str, runs: list[dict[str, Any]] = runs) -> list[float]:
            return [max(a["best"][key] for a in r["attacks"] if a["name"] in RELEARNING) for r in runs]

        forget = [g for g in scores[0]["edited"] if g.startswith("forget")]
        gaps = [max((s["edited"][g] - s["oracle"][g] for g in forget), key=abs) for s in scores]
        untouched = [min(x) for x in zip(kept("near", "untouched"), kept("far", "untouched"))]
        cells = [
            name, str(len(found)), *(cell([s["edited"][f"forget/{p}"] for s in scores]) for p in ("seen", "held_out")),
            cell(gaps), cell(kept("near")), cell(kept("far")), cell(untouched),
            cell([100 * s["nll"] for s in scores]), cell(after("accuracy")), cell(after("oracle_accuracy")),
            cell([r["headline"]["recovered"] for r in runs]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(out: Path) -> None:
    """relearned.png, of every finished run in the folder."""
    points, oracles = [], []
    for file in sorted(out.glob("scores-*.json")):
        attacks = out / file.name.replace("scores", "run")
        if not attacks.exists():  # another process is at it
            continue
        done = [a["best"] for a in json.loads(attacks.read_text())["attacks"] if a["name"] in RELEARNING]
        scores = json.loads(file.read_text())
        groups = [g for g in scores["original"] if not g.startswith("forget")]
        points.append({
            "name": file.stem.split("-", 2)[2].rpartition("-")[0], "relearned": max(b["accuracy"] for b in done),
            "kept": min(scores["edited"][g] / scores["original"][g] for g in groups),
            "edited": statistics.mean(v for g, v in scores["edited"].items() if g not in groups),
        })  # fmt: skip
        oracles.append(max(b["oracle_accuracy"] for b in done))
    figures.save(figures_attacks.kept_against_relearned(points, statistics.mean(oracles), 0.25), out / "relearned.png")


def main() -> None:
    parser = arguments(__doc__, [31, 32, 33, 34, 35], [0, 1, 2, 3, 4], ["key-erasure"])
    parser.add_argument("--vocabulary", type=int, help="of the worlds' tokenizer: a small one splits names into pieces")
    args, pairs = paired(parser)
    out = args.out or Path("runs/bench/deep" + (f"-{args.vocabulary}" if args.vocabulary else ""))
    out.mkdir(parents=True, exist_ok=True)
    for w, seed in pairs:
        world = World(w, out, args.vocabulary)
        for name in args.methods:
            measure(world, name, seed, out)
            one(world, name, seed, out, "quick")
            (out / "table.md").write_text(table(out, args.methods, pairs) + "\n")
    picture(out)
    print(table(out, args.methods, pairs))


if __name__ == "__main__":
    main()
