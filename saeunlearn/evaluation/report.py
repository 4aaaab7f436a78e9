"""report.html of a run directory: one self-contained page, made from the JSON on disk and nothing else.

Read, each optional:

- run.json: {"status", "command": [argv], "config": {...}, "model": {"name", "fingerprint", "d_model", …},
  "data": {name: {"n", "fingerprint"}}, "seconds", "error"}
- selection.json: {"layer", "relevant", "irrelevant", "K", "d_model", "layers": rows of `figures.layer_table`,
  "forget_scores", "retain_scores"}
- erasure/erasure.json: the manifest of the Erasure; the numbers of its "extra" become the subspace report
- evaluation.json: what `evaluate.combine` returns
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import figures
from ..errors import RunError
from .evaluate import is_forget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILES = ("run.json", "selection.json", "erasure/erasure.json", "evaluation.json")
_TEXT_KEYS = {"prompt", "prompts", "sample", "samples", "text", "question", "answer", "choices"}
_METRICS = {"multiple_choice": "multiple choice", "cloze": "cloze", "nll": "NLL (nats per token)"}


def write_report(run_dir: Path, *, include_text: bool) -> Path:
    """Write report.html and figures/*.png into `run_dir` and return the page's path.

    Without `include_text` the page holds no samples, no string of the settings that could be a text, and no
    labels of forget subgroups. What is missing or damaged is said on the page. Raises RunError when there is
    no such directory, nothing in it to report on, or it cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise RunError(f"{run_dir} is not a run directory")
    found, missing = {}, []
    for name in _FILES:
        content, problem = _read(run_dir / name)
        found[name] = content
        if problem:
            missing.append(f"{name}: {problem}")
    if not any(found.values()):
        raise RunError(f"{run_dir} holds none of {', '.join(_FILES)}: there is nothing to report on")
    page = _render(
        _context(*(found[name] for name in _FILES), include_text=include_text)
        | {
            "missing": missing,
            "attacked": (run_dir / "attacks.json").exists(),
            "has_erasure": bool(found["erasure/erasure.json"]),
            "figures": _figures(run_dir, *(found[name] for name in _FILES[1:])),
        }
    )
    target = run_dir / "report.html"
    part = target.with_suffix(".html.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, target)
    except OSError as e:
        raise RunError(f"cannot write {target}: {e}") from e
    return target


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """(content, "") or ({}, why there is none)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "not there"
    except (OSError, ValueError) as e:
        return {}, f"cannot be read ({type(e).__name__})"  # the message could quote the file
    return (content, "") if isinstance(content, dict) else ({}, "is not a JSON object")


def _render(context: Mapping[str, Any]) -> str:
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    env.filters.update(num=_num, pct=_pct, points=_points, signed=_signed)
    return env.get_template("report.html.j2").render(context)


def _context(
    run: dict[str, Any],
    selection: dict[str, Any],
    manifest: dict[str, Any],
    evaluation: dict[str, Any],
    *,
    include_text: bool,
) -> dict[str, Any]:
    clean = (lambda v: v) if include_text else _without_text
    rows = evaluation.get("comparison") or []
    command = run.get("command") or []
    command = shlex.split(command) if isinstance(command, str) else list(command)
    config = manifest.get("config") or {}
    model = run.get("model") or {}
    model = model if isinstance(model, dict) else {"name": model}
    samples = [s for s in evaluation.get("samples") or [] if isinstance(s, dict) and "prompt" in s]
    return {
        "include_text": include_text,
        "status": str(run.get("status", "unknown")),
        "error": run.get("error") if include_text else bool(run.get("error")),
        "created": manifest.get("created"),
        "model": model.get("name") or manifest.get("model"),
        "model_fingerprint": manifest.get("parent_fingerprint") or model.get("fingerprint"),
        "data": _data(run, manifest, evaluation),
        "done": _done(run, selection, manifest),
        "config": list(_flat(clean(config))),
        "run_config": list(_flat(clean(run.get("config") or {}))),
        "extra": list(_flat(clean(manifest.get("extra") or {}))),
        "versions": manifest.get("versions") or run.get("versions") or {},
        "layers": selection.get("layers") or [],
        "headlines": _headlines(rows),
        "tables": [
            {
                "metric": label,
                "share": metric != "nll",
                "rows": part,
                "chances": sorted({r["chance"] for r in part if r.get("chance") is not None}),
            }
            for metric, label in _METRICS.items()
            if (part := [r for r in rows if r["metric"] == metric])
        ],
        "subgroups": _subgroups(evaluation.get("after") or {}, include_text),
        "worst_texts": _worst_texts(evaluation),
        "samples": samples if include_text else [],
        "n_samples": len(samples),
        "command": shlex.join(map(str, clean(command))) if command else "",
        "has_questions": any(r["metric"] != "nll" for r in rows),
        "has_texts": any(r["metric"] == "nll" for r in rows),
    }  # fmt: skip


def _data(run: Mapping[str, Any], manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict]:
    """One row per input: {"name", "n", "fingerprint"}."""
    rows = {name: {"name": name, **entry} for name, entry in (run.get("data") or {}).items()}
    for name in ("forget", "retain"):
        if fingerprint := manifest.get(f"{name}_fingerprint"):
            rows.setdefault(name, {"name": name, "fingerprint": fingerprint})
    before = evaluation.get("before") or {}
    if before.get("questions"):
        rows.setdefault("questions", {"name": "questions", **before["questions"]})
    for name, text in (before.get("texts") or {}).items():
        label = f"evaluation text: {name}"
        rows.setdefault(label, {"name": label, "n": text.get("n"), "fingerprint": text.get("fingerprint")})
    return [{"n": None, "fingerprint": None, **r} for r in rows.values()]


def _done(run: Mapping[str, Any], selection: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple]:
    """(what, value) pairs on the edit itself; unknown ones are left out."""
    K, d = selection.get("K"), selection.get("d_model")
    changed = manifest.get("changed") or {}
    tensors = _by_block([c.get("name", "") for c in changed.get("parameters") or []])
    features = [len(selection.get(k) or []) for k in ("relevant", "irrelevant")]
    pairs = [
        ("method", manifest.get("method")),
        ("layer (output of this block, 0-based)", selection.get("layer")),
        ("features", f"{features[0]} relevant, {features[1]} irrelevant" if any(features) else None),
        ("K / d", f"{K} / {d} = {K / d:.3f}" if K and d else None),
        ("seed", manifest.get("seed")),
        (
            "weights changed",
            f"{changed['share']:.3%} ({changed['count']:,})" if changed.get("count") else None,
        ),
        ("changed tensors", ", ".join(tensors) or None),
        ("time of the run", f"{run['seconds']:,.0f} s" if _is_number(run.get("seconds")) else None),
    ]
    return [(what, value) for what, value in pairs if value is not None]


def _headlines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst case on each side, from the first metric that was measured there."""
    out = []
    for forget in (True, False):
        side = [r for r in rows if is_forget(r["group"]) == forget and r["group"] != "all"]  # all: unknown
        metric = next((m for m in _METRICS if any(r["metric"] == m for r in side)), None)
        part = [r for r in side if r["metric"] == metric]
        if not part:
            continue
        sign = -1 if metric == "nll" else 1  # a high loss is a low score
        worst = max(part, key=lambda r: sign * r["after"]) if forget else min(part, key=lambda r: sign * r["change"])
        out.append({**worst, "forget": forget, "share": metric != "nll", "metric": _METRICS[metric or ""],
                    "remark": _remark(worst, forget)})  # fmt: skip
    return out


def _remark(row: Mapping[str, Any], forget: bool) -> str:
    chance, low, high = row.get("chance"), row.get("after_low"), row.get("after_high")
    if not forget or chance is None or low is None or high is None:
        return ""
    if low > chance:
        return f"above chance ({chance:.0%}): part of it is still there"
    if high < chance:
        return f"below chance ({chance:.0%}): a mark of suppression rather than of not knowing"
    return f"not told apart from chance ({chance:.0%})"


def _subgroups(after: Mapping[str, Any], include_text: bool) -> list[dict[str, Any]]:
    """Worst subgroups after the edit. Only near and far labels are public: the others may name the secret."""
    out = []
    for group, metrics in (after.get("groups") or {}).items():
        public = include_text or group.split("/")[0] in ("near", "far", "retain")
        for metric, m in metrics.items():
            parts = [s if public else {**s, "label": "label left out"} for s in m.get("subgroups") or []]
            if parts:
                out.append({"group": group, "metric": _METRICS.get(metric, metric), "parts": parts})
    return out


def _worst_texts(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    before = (evaluation.get("before") or {}).get("texts") or {}
    out = []
    for name, after in ((evaluation.get("after") or {}).get("texts") or {}).items():
        old = dict(zip(before.get(name, {}).get("ids", ()), before.get(name, {}).get("values", ())))
        for w in after.get("worst") or []:
            out.append({"group": name, "id": w["id"], "before": old.get(w["id"]), "after": w["value"]})
    return out


def _figures(
    run_dir: Path, selection: dict[str, Any], manifest: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, str]:
    """{name: data URI} of the figures there is data for; each is written to figures/ too."""
    made: dict[str, Figure] = {}
    if selection.get("layers"):
        made["layers"] = figures.layer_table(selection["layers"])
    if selection.get("forget_scores") and selection.get("retain_scores"):
        made["features"] = figures.feature_scores(
            selection["forget_scores"],
            selection["retain_scores"],
            selection.get("relevant") or [],
            selection.get("irrelevant") or [],
        )
    if evaluation.get("comparison"):
        made["before_after"] = figures.before_after(evaluation["comparison"])
    if manifest.get("losses"):
        made["training"] = figures.training_curves([{"step": i, **entry} for i, entry in enumerate(manifest["losses"])])
    uris = {name: figures.png_data_uri(fig) for name, fig in made.items()}
    try:
        for name, uri in uris.items():
            (run_dir / "figures").mkdir(exist_ok=True)
            (run_dir / "figures" / f"{name}.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
    except OSError as e:
        raise RunError(f"cannot write the figures of {run_dir}: {e}") from e
    return uris


# --- values ------------------------------------------------------------------------------------------------


def _without_text(value: Any, key: str = "") -> Any:
    """The value without the strings that could be texts: under a telling key, or with a space in them."""
    if isinstance(value, Mapping):
        return {k: _without_text(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        if key in _TEXT_KEYS and value:
            return f"({len(value)} left out)"
        return [_without_text(v, key) for v in value]
    if isinstance(value, str) and value:
        path = value.startswith(("/", "~", "./", "../")) or value[1:3] in (":\\", ":/")
        if key in _TEXT_KEYS or ("\n" in value or (not path and len(value.split()) > 1)):
            return "(text left out)"
    return value


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, printable value) pairs."""
    if isinstance(value, Mapping) and value:
        for k, v in value.items():
            yield from _flat(v, f"{prefix}.{k}" if prefix else str(k))
    elif prefix:
        if isinstance(value, list):
            shown = ", ".join(_num(v) for v in value[:12]) + (f" … ({len(value)})" if len(value) > 12 else "")
        else:
            shown = _num(value)
        yield prefix, shown or "none"


def _by_block(names: Sequence[str]) -> list[str]:
    """Parameter names with the numbers of the blocks drawn together: model.layers.{0,1,2}.mlp.…"""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, *number = re.split(r"\.(\d+)\.", name, maxsplit=1)
        blocks.setdefault((head, *number[1:]), []).extend(number[:1])
    return [f"{key[0]}.{{{','.join(found)}}}.{key[1]}" if found else key[0] for key, found in blocks.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _num(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _pct(value: Any) -> str:
    return f"{value:.1%}" if _is_number(value) else "–"


def _points(value: Any) -> str:
    return _pct(value).rstrip("%")


def _signed(value: Any, share: bool) -> str:
    """A change: percentage points for shares, else the metric's own unit."""
    if not _is_number(value):
        return "–"
    return f"{value * 100:+.1f}" if share else f"{value:+.3f}"
