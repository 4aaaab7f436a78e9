"""Every method with its defaults on sandbox worlds, side by side: what goes, what stays, what it costs.

    python benchmarks/methods.py --worlds 31 32 33 --seeds 0 1 2 --out runs/bench/methods

Each run is a process of its own (so that its peak memory is its own) and leaves a JSON file; finished ones are not
repeated, and several processes may share a folder. Methods that need SAEs and a selection get those of SSPU's own run
of the same seed; SSPU runs with the settings of `saeunlearn demo`; delta's small model has half the blocks and learned
the same world. Writes table.md: forget as it is, near and far as shares of the original (the worst of seen, held-out
and untouched); `generated`: the share of questions whose greedy continuation is the right answer; the retain loss: its
rise on near and far text; memory: the rise of the peak. A token method has a second row: with its token banned.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sandbox_frontier import World

from saeunlearn.checkpoints import write_json
from saeunlearn.evaluation.evaluate import group_of
from saeunlearn.evaluation.metrics import cloze, multiple_choice, nll
from saeunlearn.methods import METHODS, get_method
from saeunlearn.options import settings_of
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import DEMO_SETTINGS, SandboxConfig, WorldConfig, learn
from saeunlearn.sandbox.world import make_world
from saeunlearn.tokens import banned

DEMO = {"sspu": DEMO_SETTINGS, "sspu-soft": {**DEMO_SETTINGS, "form": "soft"}}


def measure(world: World) -> dict[str, float]:
    """Multiple choice and generation by group of questions, losses on forget and retain text."""
    out = {}
    for metric in (multiple_choice, cloze):
        groups: dict[str, list[float]] = {}
        for record, value in zip(world.questions, metric(world.model, world.questions).values):
            groups.setdefault(group_of(record), []).append(value)
        out |= {f"{metric.__name__} {g}": statistics.mean(v) for g, v in groups.items()}
    for name, corpus in (("forget", world.forget), ("retain", world.retain.sample(2000, 0))):
        out[f"nll {name}"] = nll(world.model, corpus).per_token
    return out


def offset_model(world: World, out: Path) -> Path:
    """A model of half the blocks that learned the same world with the same tokenizer, made once."""
    folder = out / f"offset-{world.seed}"
    if not folder.exists():
        config = SandboxConfig(world=WorldConfig(seed=world.seed), blocks=2)
        texts = make_world(config.world).train
        small, _ = learn(config, world.model.tokenizer, texts, ConsoleProgress(), "training the offset model")
        small.save(folder)
    return folder


def one(seed_of_world: int, name: str, given: dict[str, Any], seed: int, out: Path) -> dict[str, Any]:
    world = World(seed_of_world, out)
    method = get_method("sspu" if name.startswith("sspu") else name)
    if name == "delta":
        given = given | {"offset_model": str(offset_model(world, out))}
    config = settings_of(method.Config, DEMO.get(name, {}) | given, name)
    selection = world.case.selection(seed) if "selection" in method.needs else None
    before = measure(world)
    started, held = time.monotonic(), memory_now()
    erasure = method.unlearn(
        world.model, world.forget, world.retain, config=config, selection=selection,
        saes=world.saes if "saes" in method.needs else {}, seed=seed, progress=ConsoleProgress(),
    )  # fmt: skip
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    without: dict[str, float] = {}
    with erasure.apply(world.model):
        after = measure(world)
        if method.kind == "token":
            with banned(world.model, config.token):
                without = measure(world)
    return {"world": seed_of_world, "method": name, "kind": method.kind, "seed": seed, "before": before, "after": after,
            "banned": without,
            "seconds": seconds, "memory_mb": max(0.0, peak - held), "changed": erasure.manifest["changed"]["share"],
            "extra": erasure.manifest["extra"], "config": erasure.manifest["config"]}  # fmt: skip


def memory_now() -> float:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def row(runs: list[dict[str, Any]]) -> str:
    """Mean (least to greatest) over runs."""

    def cell(values: list[float], digits: int = 2) -> str:
        spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    def kept(metric: str, group: str) -> list[float]:
        keys = [k for k in runs[0]["before"] if k.startswith(f"{metric} {group}/")]
        return [min(r["after"][k] / r["before"][k] for k in keys) for r in runs]

    def forgotten(key: str) -> list[float]:
        return [r["after"][key] for r in runs]

    generated = [statistics.mean(v for k, v in r["after"].items() if k.startswith("cloze forget")) for r in runs]
    rise = [r["after"]["nll retain"] / r["before"]["nll retain"] - 1 for r in runs]
    cells = [
        runs[0]["method"], runs[0]["kind"], cell(forgotten("multiple_choice forget/seen")),
        cell(forgotten("multiple_choice forget/held_out")), cell(generated), cell(kept("multiple_choice", "near")),
        cell(kept("multiple_choice", "far")), cell(kept("cloze", "near")), cell(kept("cloze", "far")),
        cell([100 * r for r in rise], 1), f"{statistics.mean(r['seconds'] for r in runs):.0f}",
        f"{statistics.mean(r['memory_mb'] for r in runs):.0f}", f"{100 * runs[0]['changed']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def table(out: Path) -> str:
    found = [json.loads(f.read_text()) for f in sorted(out.glob("run-*.json"))]
    titles = ["method", "kind", "forget seen", "forget held out", "generated", "near kept", "far kept",
              "near generated", "far generated", "retain loss +%", "s", "MB", "changed %"]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    found += [{**r, "method": f"{r['method']}, token banned", "after": r["banned"]} for r in found if r.get("banned")]
    for name in dict.fromkeys(["sspu", "sspu-soft", *METHODS, *(r["method"] for r in found)]):
        if runs := [r for r in found if r["method"] == name]:
            lines.append(row(runs))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "sspu-soft"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all methods")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/methods"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    from saeunlearn.options import further_settings

    for w in args.worlds:
        for seed in args.seeds:
            for name in args.methods:
                file = args.out / f"run-{w}-{name}-{seed}.json"
                if file.exists():
                    continue
                if args.single:
                    write_json(file, one(w, name, further_settings(args.set), seed, args.out))
                    continue
                command = [sys.executable, __file__, "--single", "--worlds", str(w), "--seeds", str(seed), "--methods",
                           name, "--out", str(args.out)]  # fmt: skip
                command += [x for s in args.set for x in ("--set", s)]
                command += ["--threads", str(args.threads)] if args.threads else []
                if subprocess.run(command, check=False).returncode:
                    print(f"{name} on world {w}, seed {seed}: failed", file=sys.stderr)
    if not args.single:
        print(table(args.out))
        (args.out / "table.md").write_text(table(args.out) + "\n")


if __name__ == "__main__":
    main()
