"""Open a finished run directory again, with the very model and data that it was made with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .errors import RunError
from .pipeline import Run, RunConfig, inputs, open_run
from .progress import Progress


def reopen(
    root: str | Path, progress: Progress, *, device: str | None = None, dtype: str | None = None
) -> tuple[Run, dict[str, Any]]:
    """(the run, its run.json). `device` and `dtype`: those of the run where None.

    Raises RunError for a directory that is no finished run or whose data or model changed, and the typed errors of a
    model or data file that is not there any more.
    """
    root = Path(root)
    info = read_object(root / "run.json", "not a run directory")
    if info.get("status") != "done":
        raise RunError(
            f"{root} is not a finished run (status: {info.get('status')}): finish `saeunlearn unlearn` first"
        )
    try:
        config = RunConfig(**info["config"])
    except (KeyError, TypeError) as e:
        raise RunError(f"{root} is not usable: run.json has no settings that this version knows ({e})") from e
    config = dataclasses.replace(config, device=device or config.device, dtype=dtype or config.dtype)
    run = open_run(config, root, progress)
    if any(info.get(name) != value for name, value in inputs(run).items()):
        raise RunError(f"the data or the model changed since the run in {root}: make the run again")
    return run, info


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises RunError, which ends with `what`, for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RunError(f"{file.parent} is not usable: {file.name} is missing or damaged ({what})") from e
    if not isinstance(content, dict):
        raise RunError(f"{file} is not an object ({what})")
    return content
