"""Methods at an equal tuning budget on sandbox worlds, scored on worlds that no setting was chosen on.

    python benchmarks/compare.py --threads 1 & python benchmarks/compare.py --threads 1; wait

Reduced (the default; made to end within the hour on 2 cores as two processes): SSPU, RMU, NPO, low-rank NPO, GradDiff
and SimNPO, four trials each on worlds 0 and 11, then five scoring runs each: seeds 0 to 4 on worlds 31, 32, 33, 31, 32.
`--full`: every method that needs no second model, 6 trials each (the defaults and five draws: TPE would begin at the
eleventh), the same five scoring runs. The same command goes on after an interruption, and any number of processes may
take part; `--threads 1` in each keeps them out of each other's way.

It is `saeunlearn compare --sandbox`; the folder then holds results.json, points.csv, table.md, table.tex and figures.
Seconds in the table depend on what else the machine does; steps do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from saeunlearn.cli import main as saeunlearn
from saeunlearn.evaluation.spaces import SPACES

REDUCED = ["sspu", "rmu", "npo", "npo-lora", "graddiff", "simnpo"]
TUNE, WORLDS, RUNS = [0, 11], [31, 32, 33], 5


def command(full: bool, out: Path) -> list[str]:
    methods, trials = (list(SPACES), 6) if full else (REDUCED, 4)
    given = {"methods": methods, "trials": [trials], "seeds": range(RUNS), "tune-worlds": TUNE, "worlds": WORLDS}
    options = [x for name, values in given.items() for x in (f"--{name}", *map(str, values))]
    return ["compare", "--sandbox", *options, "--out", str(out)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all methods, more trials")
    parser.add_argument("--out", type=Path, help="default: runs/bench/compare, or compare-full")
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    args = parser.parse_args()
    out = args.out or Path("runs/bench/compare-full" if args.full else "runs/bench/compare")
    threads = ["--threads", str(args.threads)] if args.threads else []
    return saeunlearn([*command(args.full, out), *threads])


if __name__ == "__main__":
    sys.exit(main())
