"""Tasks of the lm-evaluation-harness on a model with and without an Erasure, through the harness's own code.

The harness builds the prompts, filters and scores; the model answers as `harness_model.HarnessModel`. Values of single
documents are kept under the first 16 hex digits of the harness's hash of the document.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..erasure import Erasure
from ..errors import ConfigError
from ..models import LanguageModel
from ..progress import Progress
from ..tokens import banned
from .evaluate import aligned, bootstrap

SCHEMA = 1
_TEXT = ("doc", "target", "arguments", "resps", "filtered_resps")


def load_tasks(
    names: Sequence[str], path: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The harness's {"tasks", "groups", "group_map"} of tasks, groups, tags or task files (YAML).

    `path`: a folder with own task files, which come first; the harness's own index (a slow search of 14,000 names) is
    read only for names that are not there. Data sets are read here. Raises ConfigError: lm_eval is not installed, a
    name is unknown (with the nearest that are known), a task cannot be loaded.
    """
    progress = progress or Progress()
    names = [n for name in names for n in name.split(",") if n]
    if not names:
        raise ConfigError("no harness task is named")
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"{path} is not a folder with harness task files")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as e:
        raise _missing(e) from e
    progress.start("harness: tasks")
    manager = TaskManager(include_path=None if path is None else str(path), include_defaults=False)
    if not all(n in manager.all_tasks or Path(n).is_file() for n in names):
        manager = TaskManager(include_path=None if path is None else str(path))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, 5, 0.5)
            nearest = f"near it: {', '.join(near)}" if near else "no name is near it"
            raise ConfigError(f"the harness has no task {name!r}; {nearest}")
    try:
        loaded = manager.load(names)
    except ModuleNotFoundError as e:
        raise _missing(e) from e
    except Exception as e:  # task files may hold code, and datasets raises a dozen types for "not there"
        raise ConfigError(f"the harness cannot load {', '.join(names)}: {type(e).__name__}: {e}") from e
    progress.finish()
    return dict(loaded)


def run_tasks(
    model: LanguageModel,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 0,
    include_text: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The tasks of `load_tasks` on the model as it is now.

    `limit`: the first so many documents of each task (None: all); `seed`: of few-shot examples and sampling.
    Returns a JSON-able document:

        {"schema": 1, "model", "lineage": ids of the Erasures that are applied, "limit", "seed", "lm_eval": version,
         "tasks": {task or group: {"version", "n_shot", "n",
             "metrics": [{"metric", "filter", "value", "stderr" (None: the harness gives none), "higher_is_better"}],
             "examples": {filter: {"ids": [...], metric: [one value a document]}}}}}    # empty for groups

    With `include_text` the examples also hold documents, prompts and answers. Raises ConfigError for a limit below 1
    and for what the harness refuses.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} documents leaves nothing to measure")
    try:
        import lm_eval
        from lm_eval.evaluator import evaluate

        from .harness_model import HarnessModel
    except ModuleNotFoundError as e:
        raise _missing(e) from e
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 – what task files draw from
    torch.manual_seed(seed)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    try:
        found: Any = evaluate(HarnessModel(model, progress), dict(tasks), limit=limit)
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"the harness cannot measure {', '.join(tasks['tasks'])}: {type(e).__name__}: {e}") from e
    return {
        "schema": SCHEMA, "model": model.name, "lineage": list(model.lineage), "limit": limit, "seed": seed,
        "lm_eval": lm_eval.__version__,
        "tasks": {
            name: {
                "version": str(found["versions"].get(name)),
                "n_shot": found["n-shot"].get(name),
                "n": found["n-samples"].get(name, {}).get("effective"),
                "metrics": _metrics(values, found["higher_is_better"].get(name) or {}),
                "examples": _examples(found["samples"].get(name, []), include_text),
            }
            for name, values in (found["results"] | found.get("groups", {})).items()
        },
    }  # fmt: skip


def before_and_after(
    model: LanguageModel, tasks: Mapping[str, Any], erasure: Erasure | None, *, ban: str | None = None, **settings: Any
) -> dict[str, Any]:
    """{"schema", "before", "after", "erasure", "ban", "comparison"}: `run_tasks`, the Erasure off and on.

    `ban`: a token that is never decoded while it is on; `settings`: those of `run_tasks`. Without an Erasure `after` is
    None, and so is all of `comparison` that needs it.
    """
    before = run_tasks(model, tasks, **settings)
    after = None
    if erasure is not None:
        with erasure.apply(model), banned(model, ban) if ban else nullcontext():
            after = run_tasks(model, tasks, **settings)
    return {
        "schema": SCHEMA, "before": before, "after": after, "erasure": erasure.id if erasure else None, "ban": ban,
        "comparison": compare(before, after, settings.get("seed", 0)),
    }  # fmt: skip


def compare(before: Mapping[str, Any], after: Mapping[str, Any] | None, seed: int = 0) -> list[dict[str, Any]]:
    """One row per task, metric and filter of two results of `run_tasks` on the same documents.

    Row: {"task", "metric", "filter", "n", "before", "before_stderr", "after", "after_stderr", "change", "low", "high",
    "higher_is_better"}. `low` and `high`: paired bootstrap 95 % interval of the change where the metric is the mean of
    its documents' values, else None. Without `after` all that depends on it is None. Raises ConfigError where the
    documents differ.
    """
    rows = []
    for name, b in before["tasks"].items():
        a = after["tasks"].get(name) if after else None
        if after and (a is None or _ids(a) != _ids(b)):
            raise ConfigError(f"{name}: before and after were not measured on the same documents")
        later = {(m["metric"], m["filter"]): m for m in a["metrics"]} if a else {}
        for m in b["metrics"]:
            end = later.get((m["metric"], m["filter"]), {"value": None, "stderr": None})
            low, high, change = None, None, None
            if m["value"] is not None and end["value"] is not None:
                change = end["value"] - m["value"]
                x, y = (_values(side, m) for side in (b, a))
                if _is_mean(m["value"], x) and _is_mean(end["value"], y):
                    low, high = bootstrap([q - p for p, q in zip(x, y)], [1.0] * len(x), seed)
            rows.append({
                "task": name, "metric": m["metric"], "filter": m["filter"], "n": b["n"],
                "before": m["value"], "before_stderr": m["stderr"], "after": end["value"],
                "after_stderr": end["stderr"], "change": change, "low": low, "high": high,
                "higher_is_better": m["higher_is_better"],
            })  # fmt: skip
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare` for a terminal; ± is the harness's standard error."""
    cells = [("task", "metric", "n", "before", "after", "change", "95 % interval")]
    for r in rows:
        sides = [_number(r[s]) + (f" ± {r[f'{s}_stderr']:.3f}" if r[f"{s}_stderr"] is not None else "")
                 for s in ("before", "after")]  # fmt: skip
        interval = "–" if r["low"] is None else f"{r['low']:+.3f} … {r['high']:+.3f}"
        change = "–" if r["change"] is None else f"{r['change']:+.3f}"
        n = "–" if r["n"] is None else str(r["n"])
        cells.append((r["task"], _label(r), n, *sides, change, interval))
    return aligned(cells)


# --- shared ------------------------------------------------------------------------------------------------


def _missing(e: ModuleNotFoundError) -> ConfigError:
    if (e.name or "").split(".")[0] == "lm_eval":
        return ConfigError("harness tasks need the lm-evaluation-harness: pip install saeunlearn[harness]")
    return ConfigError(f"a harness task needs the package {e.name}, which is not installed")


def _metrics(values: Mapping[str, Any], better: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}."""
    out = []
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float | np.number):
            stderr = _plain(values.get(f"{metric}_stderr,{kind}"))
            out.append({"metric": metric, "filter": kind, "value": _plain(value),
                        "stderr": stderr if isinstance(stderr, float) else None,
                        "higher_is_better": better.get(metric)})  # fmt: skip
    return out


def _examples(samples: Sequence[Mapping[str, Any]], include_text: bool) -> dict[str, dict[str, list[Any]]]:
    out: dict[str, dict[str, list[Any]]] = {}
    for s in samples:
        kept = out.setdefault(s["filter"], {"ids": [], **{m: [] for m in s["metrics"]}})
        kept["ids"].append(s["doc_hash"][:16])
        for m in s["metrics"]:
            kept[m].append(_plain(s[m]))
        for field in _TEXT if include_text else ():
            kept.setdefault(field, []).append(_as_text(s[field]))
    return out


def _plain(value: Any) -> Any:
    """Finite numbers, and lists of them, as JSON has them; None for all else: no text may get through."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    return None


def _as_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _as_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(v) for v in value]
    if isinstance(value, float):
        return _plain(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def _ids(task: Mapping[str, Any]) -> dict[str, list[str]]:
    return {kind: e["ids"] for kind, e in task["examples"].items()}


def _values(task: Any, metric: Mapping[str, Any]) -> list[Any]:
    return task["examples"].get(metric["filter"], {}).get(metric["metric"], [])


def _is_mean(value: float, values: Sequence[Any]) -> bool:
    numbers = [v for v in values if isinstance(v, float)]
    return (
        bool(values) and len(numbers) == len(values) and math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-9)
    )


def _label(row: Mapping[str, Any]) -> str:
    return row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
