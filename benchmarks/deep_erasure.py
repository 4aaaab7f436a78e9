"""Is it gone for good? Erasure methods on sandbox worlds against the oracle: what goes, what stays, what comes back.

    python benchmarks/deep_erasure.py --worlds 31 32 33 34 35 --seeds 0 1 2 3 4 --out runs/bench/deep
    python benchmarks/deep_erasure.py --vocabulary 400 …        # names of several tokens instead of one

World and seed go in pairs. Each run trains or solves one method with its defaults (SSPU with the settings of
`saeunlearn demo`), or one of the VARIANTS of neighbours.py, scores it beside the oracle and attacks both with the whole
battery (`attacks.py`); finished work is kept. Writes table.md: multiple choice on forget questions and its difference
from the oracle's, near and far as shares of the original (the worst of seen, held-out and untouched), the loss on
retain text, the accuracy after the best relearning attack and the oracle's after the same, the worst attack's recovered
share, and the compute as a share of the oracle's training (tokens through the model, three times with a gradient;
training of SAEs is left out). Means over runs (least to greatest). relearned.png shows every run of these worlds in
the folder, compute.png what was relearned and kept over compute.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from attacks import arguments, one, paired
from neighbours import VARIANTS, by_method, counted
from sandbox_frontier import World

from saeunlearn import figures, figures_attacks
from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, endless, windows
from saeunlearn.erasure import Erasure
from saeunlearn.evaluation.attacks.battery import ATTACKS
from saeunlearn.evaluation.metrics import nll
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import build_oracle

RELEARNING = ("relearn-lora", "relearn-full", "unrelated-lora", "unrelated-full")


def oracle_units(world: World) -> int:
    """What `neighbours.counted` would count of the oracle's training."""
    info = world.box.describe()["config"]
    left_out = {r.id for r in world.forget}
    texts = [r.text for r in Corpus.load(world.box.root / "train.jsonl") if r.id not in left_out]
    corpus = Corpus.of([t + world.model.tokenizer.eos_token for t in texts])
    rows = endless(windows(corpus, world.model), world.model.pad_id, info["batch"], world.seed)
    return 3 * sum(b.ids.numel() for b in itertools.islice(rows, info["training"]["steps"]))


def made(world: World, name: str, seed: int, out: Path) -> Erasure:
    """The Erasure of a method or variant, made once, with what it cost beside it: compute-….json."""
    folder = out / f"erasure-{world.seed}-{name}-{seed}"
    if not folder.exists():
        started = time.monotonic()
        with counted() as found:
            erasure = VARIANTS[name](world, seed) if name in VARIANTS else by_method(world, name, seed)
        cost = {"share": found["units"] / oracle_units(world), "seconds": round(time.monotonic() - started, 1)}
        write_json(out / f"compute-{world.seed}-{name}-{seed}.json", cost)
        erasure.save(folder)
    return Erasure.load(folder)


def measure(world: World, name: str, seed: int, out: Path) -> None:
    """Scores of the original, the edited model and the oracle: scores-….json."""
    file = out / f"scores-{world.seed}-{name}-{seed}.json"
    if file.exists():
        return
    erasure = made(world, name, seed, out)
    oracle = LanguageModel.open(build_oracle(world.box, ConsoleProgress()))
    text = world.retain.sample(2000, 0)
    found: dict[str, Any] = {"original": world.accuracy(), "oracle": world.accuracy(oracle)}
    before = nll(world.model, text).per_token
    with erasure.apply(world.model):
        found |= {"edited": world.accuracy(), "nll": nll(world.model, text).per_token / before - 1}
    cost = json.loads((out / f"compute-{world.seed}-{name}-{seed}.json").read_text())
    write_json(file, found | {"compute": cost["share"], "seconds": cost["seconds"]})


def table(out: Path, methods: list[str], pairs: list[tuple[int, int]]) -> str:
    titles = ["method", "runs", "forget seen", "forget held out", "− oracle (largest)", "near kept", "far kept",
              "untouched kept", "retain loss +%", "relearned", "oracle relearned", "worst attack recovers",
              "compute"]  # fmt: skip
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
            cell([r["headline"]["recovered"] for r in runs]), cell([s["compute"] for s in scores]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pictures(out: Path, worlds: set[int]) -> None:
    """relearned.png and compute.png, of every finished run of these worlds in the folder."""
    points, oracles = [], []
    for file in sorted(f for w in worlds for f in out.glob(f"scores-{w}-*.json")):
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
            "compute": scores["compute"],
        })  # fmt: skip
        oracles.append(max(b["oracle_accuracy"] for b in done))
    oracle = statistics.mean(oracles)
    figures.save(figures_attacks.kept_against_relearned(points, oracle, 0.25), out / "relearned.png")
    figures.save(figures_attacks.over_compute(points, oracle, 0.25), out / "compute.png")


def main() -> None:
    parser = arguments(__doc__, [31, 32, 33, 34, 35], [0, 1, 2, 3, 4], ["key-erasure"])
    parser.add_argument("--vocabulary", type=int, help="of the worlds' tokenizer: a small one splits names into pieces")
    parser.add_argument("--attacks", nargs="+", choices=[*ATTACKS], help="only these (default all)")
    args, pairs = paired(parser)
    out = args.out or Path("runs/bench/deep" + (f"-{args.vocabulary}" if args.vocabulary else ""))
    out.mkdir(parents=True, exist_ok=True)
    for w, seed in pairs:
        world = World(w, out, args.vocabulary)
        for name in args.methods:
            measure(world, name, seed, out)
            one(world, name, seed, out, "quick", args.attacks)
            (out / "table.md").write_text(table(out, args.methods, pairs) + "\n")
    pictures(out, {w for w, _ in pairs})
    print(table(out, args.methods, pairs))


if __name__ == "__main__":
    main()
