"""The removal report of a run directory: report.html (self-contained), report.md, report.json and model_card.md.

All are renderings of one document, made from the JSON on disk and nothing else: see `removal.gather`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import figures, figures_attacks
from ..checkpoints import sha256_file, write_json
from ..errors import RunError
from ..progress import Progress
from .claims import WEIGHT_KINDS
from .evaluate import is_forget
from .removal import METRICS, flat, gather, is_number, num, read_sources, unselected
from .verdict import judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(run_dir: Path, *, include_text: bool, progress: Progress | None = None) -> Path:
    """Write report.{html,md,json}, model_card.md and figures/*.png into `run_dir` and return the page's path.

    Without `include_text` they hold no samples, no string of the settings that could be a text, no labels of forget
    subgroups, and of the features only index and scores. The model card never holds text. What is missing or damaged
    is said on the page. Raises RunError when there is no such directory, nothing in it to report on, or it cannot be
    written.
    """
    run_dir = Path(run_dir)
    found, _ = read_sources(run_dir)
    uris = _figures(run_dir, found)
    doc = gather(run_dir, include_text=include_text, progress=progress)
    pages = {"report.html": html(doc, found, uris), "report.md": markdown(doc), "model_card.md": model_card(doc)}
    try:
        for name, page in pages.items():
            part = run_dir / f".{name}.part"
            part.write_text(page, encoding="utf-8")
            os.replace(part, run_dir / name)
        write_json(run_dir / "report.json", {**doc, "pages": {n: sha256_file(run_dir / n) for n in pages}})
    except OSError as e:
        raise RunError(f"cannot write the report of {run_dir}: {e}") from e
    return run_dir / "report.html"


def markdown(doc: Mapping[str, Any]) -> str:
    """The document of `removal.gather` as report.md."""
    sides = {side: [r for r in doc["comparison"] if is_forget(r["group"]) == forget]
             for side, forget in (("gone", True), ("kept", False))}  # fmt: skip
    return _template("report.md.j2").render(doc=doc, pairs=_done(doc), **sides)


def model_card(doc: Mapping[str, Any]) -> str:
    """A Hugging Face model card for a checkpoint with the Erasure in it. It holds no text, whatever the document has.

    `base_model` is set where the model was opened by a hub id `owner/name`: a local path means nothing to others.
    """
    source, name = doc["asked"]["source"] or "", doc["asked"]["model"] or ""
    guard = bool(doc["done"]["kinds"]) and not set(doc["done"]["kinds"]) & WEIGHT_KINDS
    hub_id = name if source == name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    changed = doc["done"]["changed"] or {}
    share = f"{changed['share']:.3%} ({changed['count']:,})" if changed.get("count") else None
    given = {"hub_id": hub_id, "rows": doc["comparison"], "share": share, "guard": guard}
    return _template("model_card.md.j2").render(doc=doc, **given)


def html(doc: Mapping[str, Any], found: Mapping[str, dict[str, Any]], uris: Mapping[str, str]) -> str:
    """The page; `found`: the JSON files of the run, `uris`: its figures as data URIs."""
    evaluation, rows = found["evaluation.json"], doc["comparison"]
    samples = [s for s in evaluation.get("samples") or [] if isinstance(s, dict) and "prompt" in s]
    return _template("report.html.j2").render(
        {
            **doc,
            "done": _done(doc),
            "features": doc["done"]["features"] or {},
            "has_erasure": bool(doc["done"]["method"]),
            "created": doc["done"]["created"],
            "model": doc["asked"]["model"],
            "model_fingerprint": doc["asked"]["fingerprint"],
            "data": doc["asked"]["data"],
            "versions": doc["done"]["versions"],
            "figures": uris,
            "config": list(flat(doc["done"]["config"])),
            "run_config": list(flat(doc["run_config"])),
            "extra": list(flat(doc["done"]["extra"])),
            "unselected": unselected(found["erasure/erasure.json"]),
            "layers": found["selection.json"].get("layers") or [],
            "tables": [
                {
                    "metric": label,
                    "share": metric != "nll",
                    "rows": part,
                    "chances": sorted({r["chance"] for r in part if r.get("chance") is not None}),
                }
                for metric, label in METRICS.items()
                if (part := [r for r in rows if r["metric"] == metric])
            ],
            "subgroups": _subgroups(evaluation.get("after") or {}, doc["include_text"]),
            "worst_texts": _worst_texts(evaluation),
            "samples": samples if doc["include_text"] else [],
            "n_samples": len(samples),
            "has_questions": any(r["metric"] != "nll" for r in rows),
            "has_texts": any(r["metric"] == "nll" for r in rows),
        }
    )


def _template(name: str) -> Any:
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=name.endswith(".html.j2"),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    env.filters.update(num=num, pct=_pct, points=_points, signed=_signed, cell=_cell, value=_value, judged=judged)
    return env.get_template(name)


def _done(doc: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) pairs on the edit itself; unknown ones are left out."""
    done, features = doc["done"], doc["done"]["features"] or {}
    changed = done["changed"] or {}
    tensors = _by_block([c.get("name", "") for c in changed.get("parameters") or []])
    counts = [len(features.get(k) or []) for k in ("relevant", "irrelevant")]
    k, d = features.get("K"), features.get("d_model")
    if changed.get("count"):
        weights: str | None = f"{changed['share']:.3%} ({changed['count']:,})"
    else:
        weights = "none: it acts while the model runs" if done["kinds"] else None
    pairs = [
        ("method", done["method"]),
        ("layer (output of this block, 0-based)", features.get("layer")),
        ("features", f"{counts[0]} relevant, {counts[1]} irrelevant" if any(counts) else None),
        ("K / d", f"{k} / {d} = {k / d:.3f}" if k and d else None),
        ("seed", done["seed"]),
        ("weights changed", weights),
        ("changed tensors", ", ".join(tensors) or None),
        ("Erasure", done["erasure_id"]),
        ("time of the run", f"{done['seconds']:,.0f} s" if is_number(done["seconds"]) else None),
    ]
    return [(what, value) for what, value in pairs if value is not None]


def _subgroups(after: Mapping[str, Any], include_text: bool) -> list[dict[str, Any]]:
    """Worst subgroups after the edit. Only near and far labels are public: the others may name the secret."""
    out = []
    for group, metrics in (after.get("groups") or {}).items():
        public = include_text or group.split("/")[0] in ("near", "far", "retain")
        for metric, m in metrics.items():
            parts = [s if public else {**s, "label": "label left out"} for s in m.get("subgroups") or []]
            if parts:
                out.append({"group": group, "metric": METRICS.get(metric, metric), "parts": parts})
    return out


def _worst_texts(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    before = (evaluation.get("before") or {}).get("texts") or {}
    out = []
    for name, after in ((evaluation.get("after") or {}).get("texts") or {}).items():
        old = dict(zip(before.get(name, {}).get("ids", ()), before.get(name, {}).get("values", ())))
        for w in after.get("worst") or []:
            out.append({"group": name, "id": w["id"], "before": old.get(w["id"]), "after": w["value"]})
    return out


def _figures(run_dir: Path, found: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """{name: data URI} of the figures there is data for; each is written to figures/ too."""
    selection, manifest, evaluation = (found[n] for n in ("selection.json", "erasure/erasure.json", "evaluation.json"))
    attacks = found["attacks.json"]
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
    if attacks.get("attacks") and attacks.get("erasure_id") == manifest.get("id"):
        with contextlib.suppress(
            KeyError, TypeError, AttributeError
        ):  # a foreign file: the table shows what is missing
            made["attacks"] = figures_attacks.attacks(attacks)
            made["relearning"] = figures_attacks.relearning(attacks)
    uris = {name: figures.png_data_uri(fig) for name, fig in made.items()}
    try:
        for name, uri in uris.items():
            (run_dir / "figures").mkdir(exist_ok=True)
            (run_dir / "figures" / f"{name}.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
    except OSError as e:
        raise RunError(f"cannot write the figures of {run_dir}: {e}") from e
    return uris


# --- values ------------------------------------------------------------------------------------------------


def _by_block(names: Sequence[str]) -> list[str]:
    """Parameter names with the numbers of the blocks drawn together: model.layers.{0,1,2}.mlp.…"""
    blocks: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, *number = re.split(r"\.(\d+)\.", name, maxsplit=1)
        blocks.setdefault((head, *number[1:]), []).extend(number[:1])
    return [f"{key[0]}.{{{','.join(found)}}}.{key[1]}" if found else key[0] for key, found in blocks.items()]


def _pct(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def _points(value: Any) -> str:
    return _pct(value).rstrip("%")


def _signed(value: Any, share: bool) -> str:
    """A change: percentage points for shares, else the metric's own unit."""
    if not is_number(value):
        return "–"
    return f"{value * 100:+.1f}" if share else f"{value:+.3f}"


def _value(value: Any, metric: str | None) -> str:
    """A score in its metric's unit: a share as per cent, a loss as it is."""
    return num(value) if metric == "nll" else _pct(value)


def _cell(value: Any) -> str:
    """A value inside a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")
