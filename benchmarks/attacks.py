"""The attack battery against each method on sandbox worlds, beside the oracle of the same world.

    python benchmarks/attacks.py --worlds 31 32 33 --seeds 0 1 2 --out runs/bench/attacks

World and seed go in pairs: the first world with the first seed, and so on. Each run trains one method with its defaults
(SSPU with the settings of `saeunlearn demo`) and attacks the result with every attack that applies; it leaves the
Erasure and a JSON file that is written after each attack, so the same command goes on where it was stopped. Writes
table.md: multiple choice after the attack, and the share of the forgotten knowledge that it recovers, as the mean over
runs (least to greatest); the last column is the worst attack of each run, the line "oracle" what the same attacks get
from a model that never knew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from neighbours import by_method
from sandbox_frontier import World

from saeunlearn.checkpoints import write_json
from saeunlearn.erasure import Erasure
from saeunlearn.evaluation.attacks.battery import ATTACKS, attack
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import build_oracle

METHODS = ["sspu", "rmu", "npo-lora", "npo", "unierase", "conditional"]


def unlearned(world: World, name: str, seed: int, folder: Path) -> Erasure:
    """The Erasure of a method with its defaults, made once."""
    if not folder.exists():
        by_method(world, name, seed).save(folder)
    return Erasure.load(folder)


def one(world: World, name: str, seed: int, out: Path, budget: str, names: list[str] | None = None) -> None:
    """Attack it with these attacks, all without any."""
    file = out / f"run-{world.seed}-{name}-{seed}.json"
    earlier = json.loads(file.read_text()) if file.exists() else None
    done = {a["name"] for a in earlier["attacks"]} if earlier else set()
    if earlier and (earlier["damage"] or names) and done >= set(names or ATTACKS):
        return
    erasure = unlearned(world, name, seed, out / f"erasure-{world.seed}-{name}-{seed}")
    oracle = LanguageModel.open(build_oracle(world.box, ConsoleProgress()))
    attack(world.model, erasure, world.forget, world.retain, world.questions, oracle=oracle, names=names,
           budget=budget, seed=seed, progress=ConsoleProgress(), earlier=earlier,
           save=lambda d: write_json(file, d))  # fmt: skip


def table(out: Path) -> str:
    runs = [json.loads(f.read_text()) for f in sorted(out.glob("run-*.json"))]
    runs = [r for r in runs if r["attacks"]]
    names = [a for a in ATTACKS if any("best" in e for r in runs for e in r["attacks"] if e["name"] == a)]
    lines = ["| method | " + " | ".join(names) + " | worst |", "|---" * (len(names) + 2) + "|"]

    def entries(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        return [e for r in found for e in r["attacks"] if e["name"] == name and "best" in e]

    def cell(accuracies: list[float], shares: list[float]) -> str:
        if not accuracies:
            return "–"
        spread = f" ({min(shares):.2f}–{max(shares):.2f})" if len(shares) > 1 else ""
        return f"{statistics.mean(accuracies):.2f}: {statistics.mean(shares):.2f}{spread}"

    for method in dict.fromkeys(r["method"] for r in runs):
        found = [r for r in runs if r["method"] == method]
        cells = [cell([e["best"]["accuracy"] for e in entries(found, a)],
                      [e["best"]["recovered"] for e in entries(found, a)]) for a in names]  # fmt: skip
        worst = [r["headline"] for r in found]
        cells.append(cell([w["accuracy"] for w in worst], [w["recovered"] for w in worst]))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    theirs = [[e["best"]["oracle_accuracy"] for e in entries(runs, a)] for a in names]
    lines.append("| oracle | " + " | ".join(f"{statistics.mean(v):.2f}" for v in theirs) + " | |")
    return "\n".join(lines)


def arguments(about: str, worlds: list[int], seeds: list[int], methods: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=worlds)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int)
    return parser


def paired(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[tuple[int, int]]]:
    """(arguments, (world, seed) of each run); sets the number of threads."""
    args = parser.parse_args()
    if len(args.worlds) != len(args.seeds):
        parser.error("give as many seeds as worlds")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args, list(zip(args.worlds, args.seeds))


def main() -> None:
    parser = arguments(__doc__, [31, 32, 33], [0, 1, 2], METHODS)
    parser.add_argument("--budget", choices=["quick", "full"], default="quick")
    args, pairs = paired(parser)
    out = args.out or Path("runs/bench/attacks")
    out.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        for w, seed in pairs:
            one(World(w, out), name, seed, out, args.budget)
            (out / "table.md").write_text(table(out) + "\n")
    print(table(out))


if __name__ == "__main__":
    main()
