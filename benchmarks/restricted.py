"""The restricted gradient against the plain sum of both losses and against PCGrad followed by Adam.

    python benchmarks/restricted.py --worlds 31 32 33 --out runs/bench/restricted

GradDiff's two losses on a LoRA, the same batches, schedule and learning rate for every rule; every 10 steps both losses
are measured on fixed batches. PCGrad (arXiv 2001.06782) projects only where the gradients conflict and hands the result
to Adam, as the published code of the restricted gradient does. Writes losses.json and losses.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn import figures
from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, endless, windows
from saeunlearn.methods.graddiff import GradDiff, GradDiffConfig
from saeunlearn.methods.gradient import Task
from saeunlearn.methods.trainable import trainable
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import SandboxConfig, WorldConfig, build
from saeunlearn.training import one_cycle
from saeunlearn.updates import make_update


def pcgrad_then_adam(groups: list[dict[str, Any]]) -> Callable[..., None]:
    optimiser = torch.optim.Adam(groups)
    params = [p for g in groups for p in g["params"]]

    def step(forget_loss: Callable[[], Tensor], kept: Callable[[], Tensor]) -> None:
        for mine, given in zip(optimiser.param_groups, groups):
            mine["lr"] = given["lr"]
        g_f, g_r = (torch.autograd.grad(loss(), params) for loss in (forget_loss, kept))
        dot = sum(float((a * b).sum()) for a, b in zip(g_f, g_r))
        ff, rr = (sum(float((a * a).sum()) for a in g) for g in (g_f, g_r))
        for p, a, b in zip(params, g_f, g_r):
            p.grad = a + b if dot >= 0 else a - dot / rr * b + b - dot / ff * a
        optimiser.step()

    return step


RULES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "plain sum, AdamW": lambda g: make_update("plain", g),
    "PCGrad, then Adam": pcgrad_then_adam,
    "restricted, preconditioned": lambda g: make_update("restricted", g),
}


def run(
    model: LanguageModel, forget: Corpus, retain: Corpus, rule: str, steps: int, seed: int
) -> dict[str, list[float]]:
    config = GradDiffConfig()
    f_items, r_items = windows(forget, model), windows(retain, model)
    batches = [endless(items, model.pad_id, config.batch, seed + n) for n, items in enumerate((f_items, r_items))]
    fixed = [[next(endless(items, model.pad_id, 64, 99)) for _ in range(2)] for items in (f_items, r_items)]
    curve: dict[str, list[float]] = {"step": [], "forget": [], "retain": []}
    with trainable(model, "lora", config.rank, seed) as trained:
        groups = trained.groups(config.lr)
        update = RULES[rule](groups)
        losses = GradDiff().objective(Task(model, forget, retain, config, seed, None, {}))
        for n in range(steps + 1):
            if n % 10 == 0 or n == steps:
                with torch.no_grad():
                    pairs = [losses(trained, f, r) for f, r in zip(*fixed)]
                    curve["step"].append(n)
                    curve["forget"].append(statistics.mean(-float(p[0]()) for p in pairs))
                    curve["retain"].append(statistics.mean(float(p[1]()) for p in pairs))
            if n < steps:
                for g in groups:
                    g["lr"] = g["peak"] * one_cycle(n, steps, 0.05)
                update(*losses(trained, *(next(b) for b in batches)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/restricted"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, list[dict[str, list[float]]]] = {}
    for rule in RULES:
        for w in args.worlds:
            box = build(SandboxConfig(world=WorldConfig(seed=w)), ConsoleProgress())
            model = LanguageModel.open(box.model)
            curve = run(model, Corpus.load(box.forget), Corpus.load(box.retain), rule, args.steps, w)
            result.setdefault(rule, []).append(curve)
            worst = max(curve["retain"])
            print(f"{rule}, world {w}: forget NLL {curve['forget'][0]:.2f} → {curve['forget'][-1]:.2f}, retain "
                  f"{curve['retain'][0]:.2f} → {curve['retain'][-1]:.2f}, worst {worst:.2f}", flush=True)  # fmt: skip
    write_json(args.out / "losses.json", result)
    figures.save(figures.losses_over_steps(result), args.out / "losses.png")


if __name__ == "__main__":
    main()
