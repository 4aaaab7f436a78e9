"""The demo's world and runs: what `saeunlearn demo`, the notebooks and the tests start from.

TINY is a world that a test can build: the same code in seconds, and no finding rests on it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .methods import get_method
from .pipeline import RunConfig, claim, unlearn
from .progress import Progress
from .sandbox.build import (
    DEMO_SAE,
    DEMO_SELECT,
    DEMO_SETTINGS,
    Sandbox,
    SandboxConfig,
    WorldConfig,
    build,
    build_oracle,
)
from .training import TrainConfig

# Everything is written out: the defaults may change, and other sizes may not learn their world. With one attribute a
# held-out phrasing needs no more than the entity, which every seed that was tried learned.
TINY = SandboxConfig(
    world=WorldConfig(seed=0, entities=16, values=4, attributes=1, held_out=0.2, untouched=0.25),
    blocks=2, d_model=64, heads=4, d_mlp=128, vocabulary=700, batch=32,
    training=TrainConfig(steps=400, lr=1.5e-2, warmup=0.1, weight_decay=0.1, clip=1.0),
)  # fmt: skip
TINY_SAE: dict[str, Any] = {"tokens": 20_000, "batch": 256, "expansion": 4, "k": 8, "buffer": 4_096, "lr": 4e-3}
TINY_SELECT: dict[str, Any] = {"k": 2, "percentile": 80.0, "shortlist": 2, "max_records": 60}
TINY_SETTINGS: dict[str, Any] = {
    "gated": False, "target": "relevant", "gamma": 6.0, "alpha": 1.0, "lr": 0.5, "blocks": 2, "swapped": 0.2,
    "steps": 8, "batch": 8, "max_length": 16, "max_retain_rise": 0.5, "check_every": 4,
}  # fmt: skip
MOST_AT_ONCE = 8  # runs, at about 1 GB each
_TINY_STEPS = {"steps": 8, "token_steps": 8, "noise_rounds": 1, "noise_steps": 2, "z_steps": 4}  # where a method has it


def world(seed: int = 0, *, tiny: bool = False, oracle: bool = False, progress: Progress | None = None) -> Sandbox:
    """The sandbox of this seed, from the cache or built now (minutes; tiny: seconds), with its oracle if asked for."""
    progress = progress or Progress()
    size = TINY if tiny else SandboxConfig()
    box = build(dataclasses.replace(size, world=dataclasses.replace(size.world, seed=seed)), progress)
    if oracle:
        build_oracle(box, progress)
    return box


def config(box: Sandbox, method: str = "sspu", seed: int = 0, **changes: Any) -> RunConfig:
    """The demo's run on a sandbox. SSPU has the settings made for facts, other methods have their defaults (on a tiny
    world fewer steps). `changes`: further fields of RunConfig; `settings` and `select` are added to the demo's."""
    tiny = box.describe()["config"]["d_model"] == TINY.d_model
    sae, select = (TINY_SAE, TINY_SELECT) if tiny else (DEMO_SAE, DEMO_SELECT)
    settings: Mapping[str, Any] = {}
    if method == "sspu":
        settings = TINY_SETTINGS if tiny else DEMO_SETTINGS
    elif tiny:
        known = {f.name for f in dataclasses.fields(get_method(method).Config)}
        settings = {k: v for k, v in _TINY_STEPS.items() if k in known}
    given = {
        "model": box.model, "forget": box.forget, "retain": box.retain, "questions": box.questions, "sae": sae,
        "method": method, "seed": seed, **changes,
        "select": {**select, **changes.get("select", {})}, "settings": {**settings, **changes.get("settings", {})},
    }  # fmt: skip
    return RunConfig(**given)


def carry_out(wanted: Mapping[Path, RunConfig], progress: Progress | None = None) -> list[Path]:
    """Carry out those of these runs that are not done yet, and return the directories of all, in order.

    A run of this size does not fill the cores: several go on at a time, each in a process of its own with its share of
    the threads. Raises RunError for a directory of another run before any is begun, and what `pipeline.unlearn` raises;
    the others then stop, and the same call goes on with them.
    """
    from joblib import Parallel, cpu_count, delayed, parallel_config

    open_ones = [(config, root) for root, config in wanted.items() if claim(root, config).get("status") != "done"]
    if len(open_ones) <= 1:
        for config, root in open_ones:
            unlearn(config, root, progress)
        return list(wanted)
    jobs = min(len(open_ones), cpu_count(), MOST_AT_ONCE)
    share = parallel_config(backend="loky", inner_max_num_threads=max(1, cpu_count() // jobs))
    with warnings.catch_warnings(), share:
        # A process that has grown is replaced by a new one between two runs: nothing is lost.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
        made = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_alone)(*one) for one in open_ones)
        for _ in (progress or Progress()).over(made, "runs", len(open_ones)):
            pass
    return list(wanted)


def _alone(config: RunConfig, root: Path) -> None:
    unlearn(config, root)


def runs(
    folder: str | Path, box: Sandbox, methods: Sequence[str] = ("sspu",), seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> dict[str, list[Path]]:  # fmt: skip
    """{method: [run directory of each seed]} in `folder`, made where they are not there yet.

    The first is SSPU's with seed 0: all others take its SAEs and its selection, so that seeds differ in the training
    alone. Raises what `carry_out` raises.
    """
    first = Path(folder) / "sspu-0"
    shared = {"saes": first / "saes", "selection": first / "selection.json"}
    roots = {m: [Path(folder) / f"{m}-{s}" for s in seeds] for m in methods}
    wanted = {
        root: config(box, m, s, **(shared if root != first and get_method(m).needs else {}))
        for m, of_method in roots.items() for root, s in zip(of_method, seeds)
    }  # fmt: skip
    carry_out({first: config(box)}, progress)
    carry_out(wanted, progress)
    return roots
