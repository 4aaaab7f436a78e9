"""What SAE features may tell key erasure: which positions are forget text, in which blocks, and what to hold.

    python benchmarks/guidance.py --vocabulary 400 --worlds 0 --seeds 0

- Weights of forget positions, of mean 1: all equal; the activity of the selection's relevant features; that of as many
  random live features; how much more frequent the token is in forget than in retain text.
- Blocks: each pair of neighbours alone, weights equal. The selection's pair has the largest sum of probe scores.
- Retain moments in which the fifth of the retain records counts four times where the relevant features are the most
  active on average (text that resembles the topic), or a random fifth; weights equal, all blocks.

Each at several λ, without budget or healing, because they are comparable only at equal forgetting. Writes
points-….json and table.md: what is kept of the worst near or far group where the curve over λ crosses that much
forgetting.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attacks import arguments, paired
from neighbours import FREE
from sandbox_frontier import World
from torch import Tensor

from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, Window, windows
from saeunlearn.features.selection import SelectConfig
from saeunlearn.methods.keyerasure import KeyErasure, KeyErasureConfig, feature_weights
from saeunlearn.methods.sspu import SSPUConfig
from saeunlearn.options import settings_of
from saeunlearn.pipeline import choose
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import DEMO_SELECT, DEMO_SETTINGS

LAMBDAS = (0.1, 0.17, 0.3, 0.5, 1.0, 3.0, 10.0)
WEIGHTS = ("equal", "relevant", "random", "frequency")
BLOCKS = {f"blocks {i}, {i + 1}": (i, i + 1) for i in range(3)}
RETAIN = ("retain: relevant", "retain: random")
KINDS = (*WEIGHTS, *BLOCKS, *RETAIN)
LEVELS = (0.6, 0.5, 0.4)  # forget accuracy at which they are compared
SHARE, COPIES = 0.2, 4  # of the retain records, and how often each of these then counts


class Weighted(KeyErasure):
    """Key erasure with given weights."""

    def __init__(self, given: list[Tensor] | None) -> None:
        self.given = given

    def weights(self, *_: Any) -> list[Tensor] | None:
        return self.given


def weights_of(world: World, kind: str, seed: int) -> list[Tensor] | None:
    items = windows(world.forget, world.model, KeyErasureConfig().max_length)
    if kind == "equal":
        return None
    if kind == "frequency":
        return by_frequency(items, windows(world.retain, world.model))
    selection = world.case.selection(seed)
    if kind == "random":
        live = active(world, selection.layer)
        pick = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))[: len(selection.relevant)]
        selection = replace(selection, relevant=sorted(live[int(i)] for i in pick))
    return feature_weights(world.model, items, selection, world.saes[selection.layer], Progress())


def enriched(world: World, kind: str, seed: int) -> Corpus:
    """The retain set with copies of some of its records."""
    records = world.retain.records
    n = round(SHARE * len(records))
    if kind == "retain: random":
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    else:
        selection, items = world.case.selection(seed), windows(world.retain, world.model, KeyErasureConfig().max_length)
        found = feature_weights(world.model, items, selection, world.saes[selection.layer], Progress())
        activity: dict[int, list[float]] = {}
        for w, t in zip(items, found):
            activity.setdefault(w.record, []).extend(t.tolist())
        chosen = sorted(activity, key=lambda i: -statistics.mean(activity[i]))[:n]
    print(f"{kind}: {Counter(str(records[i].meta.get('set')) for i in chosen)}", flush=True)
    return Corpus((*records, *[records[i] for i in chosen] * (COPIES - 1)), world.retain.name)


def chosen_blocks(world: World, seed: int) -> str:
    """The pair with the largest sum of probe scores; every layer gets a probe."""
    config = SelectConfig(**{**DEMO_SELECT, "shortlist": world.model.n_layers})
    sspu = settings_of(SSPUConfig, DEMO_SETTINGS, "sspu")
    rows = choose(world.model, world.saes, world.forget, world.retain, config, sspu, seed, Progress()).layers
    rise = [row["probe"]["forget_rise"] for row in rows]
    return max(BLOCKS, key=lambda name: sum(rise[i] for i in BLOCKS[name]))


@torch.no_grad()
def active(world: World, layer: int) -> list[int]:
    """Features of the layer that fire on a sample of forget text."""
    fired: Tensor | None = None
    for w in windows(world.forget.sample(300, 0), world.model):
        h = world.model.capture(torch.tensor([w.ids]), [layer])[layer]
        now = (world.saes[layer].encode(h[0, 1:].float()) > 0).any(0)
        fired = now if fired is None else fired | now
    assert fired is not None
    return fired.nonzero().flatten().tolist()


def by_frequency(forget: list[Window], retain: list[Window]) -> list[Tensor]:
    n_f, n_r = (Counter(t for w in items for t in w.ids[1:]) for items in (forget, retain))
    ratio = {t: (n_f[t] / n_f.total()) / ((n_r[t] + 1) / (n_r.total() + 1)) for t in n_f}
    out = [torch.tensor([ratio[t] for t in w.ids[1:]]).double() for w in forget]
    mean = float(torch.cat(out).mean())
    return [t / mean for t in out]


def measure(world: World, seed: int, file: Path) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for kind in KINDS:
        todo = [lam for lam in LAMBDAS if not any(p["kind"] == kind and p["lam"] == lam for p in points)]
        if not todo:
            continue
        method = Weighted(weights_of(world, kind if kind in WEIGHTS else "equal", seed))
        first, last = BLOCKS.get(kind, (0, None))
        retain = enriched(world, kind, seed) if kind in RETAIN else world.retain
        for lam in todo:
            config = KeyErasureConfig(lam=lam, first=first, last=last, max_retain_rise=FREE)
            erasure = method.unlearn(
                world.model, world.forget, retain, config=config, selection=None, saes={}, seed=seed,
                progress=ConsoleProgress(),
            )  # fmt: skip
            with erasure.apply(world.model):
                points.append({"world": world.seed, "seed": seed, "kind": kind, "lam": lam, "after": world.accuracy()})
            write_json(file, points)
    return points


def curve(points: list[dict[str, Any]], original: dict[str, float]) -> tuple[list[float], list[float]]:
    """(forget accuracy, the least that is kept of a near or far group) over λ."""
    forget = [statistics.mean(p["after"][f"forget/{g}"] for g in ("seen", "held_out")) for p in points]
    kept = [min(p["after"][g] / original[g] for g in original if not g.startswith("forget")) for p in points]
    return forget, kept


def main() -> None:
    parser = arguments(__doc__, [0], [0], [])
    parser.add_argument("--vocabulary", type=int, help="of the worlds' tokenizer: a small one splits names into pieces")
    args, pairs = paired(parser)
    out = args.out or Path("runs/bench/guidance" + (f"-{args.vocabulary}" if args.vocabulary else ""))
    out.mkdir(parents=True, exist_ok=True)
    at: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for w, seed in pairs:
        world = World(w, out, args.vocabulary)
        original = world.accuracy()
        found = measure(world, seed, out / f"points-{w}-{seed}.json")
        print(f"world {w}: by its probe scores the selection takes {chosen_blocks(world, seed)}", flush=True)
        for kind in KINDS:
            forget, kept = curve([p for p in found if p["kind"] == kind], original)
            order = np.argsort(forget)
            inside = [x if min(forget) <= x <= max(forget) else np.nan for x in LEVELS]
            at[kind].append(np.interp(inside, np.array(forget)[order], np.array(kept)[order]).tolist())
    lines = ["| key erasure | " + " | ".join(f"kept at forget {x:g}" for x in LEVELS) + " |", "|---" * 4 + "|"]
    for kind, rows in at.items():
        cells = [[row[i] for row in rows] for i in range(len(LEVELS))]
        shown = [f"{np.nanmean(c):.2f}" if not np.isnan(c).all() else "not reached" for c in cells]
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
