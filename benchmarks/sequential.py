"""UniErase, request after request: what is forgotten, and what the requests cost together.

    python benchmarks/sequential.py --worlds 31 32 33 --requests 5

The forget set of a sandbox world is cut into requests by entity; the Erasures are applied one after another, and after
each of them generation (greedy, the right answer) is measured: on the facts requested so far, on those still to come,
near and far, and on the requested ones with the token banned from decoding. Prints a line a request and writes a JSON
file.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from pathlib import Path
from typing import Any

from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, Record
from saeunlearn.evaluation.metrics import cloze
from saeunlearn.methods.unierase import UniEraseConfig, sequential
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress
from saeunlearn.sandbox.build import SandboxConfig, WorldConfig, build
from saeunlearn.tokens import banned


def world(seed: int, requests: int) -> list[dict[str, float]]:
    box = build(SandboxConfig(world=WorldConfig(seed=seed)), ConsoleProgress())
    model = LanguageModel.open(box.model)
    forget, retain, questions = (Corpus.load(f) for f in (box.forget, box.retain, box.questions))
    entities = list(dict.fromkeys(r.meta["entity"] for r in forget))
    parts = [set(entities[n::requests]) for n in range(requests)]

    def about(records: Corpus, names: set[Any]) -> tuple[Record, ...]:
        return tuple(r for r in records if r.meta.get("entity") in names and r.meta["set"] == "forget")

    def generated(records: tuple[Record, ...]) -> float:
        return statistics.mean(cloze(model, Corpus(records)).values) if records else float("nan")

    others = {n: tuple(r for r in questions if r.meta["set"] == n) for n in ("near", "far")}
    config = UniEraseConfig()
    erasures = sequential(
        model,
        [Corpus(about(forget, p), f"request {n}") for n, p in enumerate(parts)],
        retain,
        config,
        0,
        ConsoleProgress(),
    )
    rows = []
    with contextlib.ExitStack() as applied:
        for n in range(requests + 1):
            if n:
                applied.enter_context(erasures[n - 1].apply(model))
            done, left = set().union(*parts[:n]), set().union(*parts[n:])
            row = {"requests": n, "requested": generated(about(questions, done))}
            row["left"] = generated(about(questions, left))
            row |= {name: generated(records) for name, records in others.items()}
            if n:
                with banned(model, config.token):
                    row["requested, banned"] = generated(about(questions, done))
            rows.append(row)
            print(f"world {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sequential.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {}
    for w in args.worlds:
        rows = [{k: v for k, v in r.items() if v == v} for r in world(w, args.requests)]
        result[str(w)] = rows
        write_json(args.out, result)


if __name__ == "__main__":
    main()
