"""Attack a finished run directory: attacks.json in it, oracle.json where there is an oracle, and the report anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoints import write_json
from .erasure import Erasure
from .errors import RunError
from .evaluation.attacks import battery
from .evaluation.attacks.battery import SCHEMA, known_attacks
from .evaluation.evaluate import evaluate, without_labels
from .models import LanguageModel
from .pipeline import write_report
from .progress import Progress
from .reopen import read_object, reopen

FILE = "attacks.json"
ORACLE = "oracle.json"  # the oracle on the questions of the run, for the verdicts of the report


def attack(
    root: str | Path,
    progress: Progress | None = None,
    *,
    oracle: str | Path | None = None,
    names: Sequence[str] | None = None,
    budget: str = "quick",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The document of `evaluation.attacks.battery.attack`, kept in attacks.json after every attack; finished ones are
    not repeated. An oracle also answers all questions of the run: oracle.json is the result of `evaluate`, with labels
    hashed. The report is written again. `device` and `dtype`: those of the run where None.

    Raises RunError for a directory that is no finished run, whose data or model changed, or that holds attacks with
    other settings; and what `attack` raises.
    """
    root, progress = Path(root), progress or Progress()
    known_attacks(names)
    run, _ = reopen(root, progress, device=device, dtype=dtype)
    erasure = Erasure.load(run.erasure_dir)
    retrained = LanguageModel.open(oracle, device=run.config.device, dtype=run.config.dtype) if oracle else None
    file = root / FILE
    earlier = read_object(file, "damaged") if file.exists() else None
    if earlier is not None:
        now = {"schema": SCHEMA, "erasure_id": erasure.id, "seed": seed, "budget": budget,
               "oracle": retrained and {"name": retrained.name, "fingerprint": retrained.fingerprint()}}  # fmt: skip
        if other := [name for name, value in now.items() if earlier.get(name) != value]:
            raise RunError(f"{file} holds attacks with another {' and '.join(other)}: move it away, or use the same")
    document = battery.attack(
        run.model, erasure, run.forget, run.retain, run.questions, oracle=retrained, names=names, budget=budget,
        seed=seed, progress=progress, earlier=earlier, save=lambda d: write_json(file, d),
    )  # fmt: skip
    if retrained is not None and run.questions is not None and not (root / ORACLE).exists():
        answers = evaluate(retrained, questions=run.questions, texts=None, prompts=(), progress=progress)
        write_json(root / ORACLE, {**without_labels(answers), "fingerprint": retrained.fingerprint()})
    write_report(run)
    return document
