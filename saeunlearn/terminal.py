"""What the command line prints: results as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from .errors import RunError


def show_result(run: Any) -> None:
    from .evaluation.evaluate import table
    from .features.selection import Selection

    result = json.loads(run.evaluation_file.read_text())
    if run.selection_file.exists():
        print("\n" + layer_lines(Selection.load(run.selection_file)))
    print("\n" + table(result["comparison"]))
    if run.config.include_text:
        show_samples(result["samples"])
    print(f"\nErasure  {run.erasure_dir}\nReport   {run.root / 'report.html'}")


def layer_lines(selection: Any) -> str:
    lines = ["layer   auc  share  specificity   fvu  probe: forget rise"]
    for row in selection.layers:
        s, probe = row["scores"], row["probe"]
        rise = "not run" if probe is None else f"{probe['forget_rise']:+.3f} nats"
        mark = "  ← chosen" if row["chosen"] else ""
        line = f"{row['layer']:5d}  {s['auc']:.2f}   {s['share']:.2f}         {s['specificity']:.2f}  {s['fvu']:.2f}"
        lines.append(f"{line}  {rise}{mark}")
    k, d = selection.k, selection.d_model
    lines.append(
        f"K = {k} relevant features of d = {d} (K/d = {k / d:.3f}) at layer {selection.layer}: {selection.relevant}"
    )
    return "\n".join(lines)


def show_samples(samples: Sequence[dict[str, Any]]) -> None:
    for s in samples:
        before, after = (shorten(s[k], 100, placeholder=" …") for k in ("before", "after"))
        print(f"\n  {s['prompt']} …\n    before: {before}\n    after:  {after}")


def without_values(result: Any) -> Any:
    """The result without its per-example lists, for a terminal."""
    if isinstance(result, dict):
        return {k: without_values(v) for k, v in result.items() if k not in ("values", "ids", "records", "tokens")}
    return result


def json_or_empty(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as e:
        raise RunError(f"{file} is damaged: {e}") from e
    return content if isinstance(content, dict) else {}
