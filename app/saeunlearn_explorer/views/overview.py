"""Overview: the run on one screen, from the JSON in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup

from saeunlearn import figures
from saeunlearn.documents import read_json
from saeunlearn.evaluation.meaning import METRICS, is_forget

from ..frontier import frontier
from ..links import panel
from ..pieces import (
    cards,
    fingerprint,
    fold,
    join,
    note,
    number,
    pairs,
    percent,
    picture,
    score,
    table,
    under,
    whiskers,
)  # fmt: skip
from ..state import Explorer, document, safely

Filled = tuple[Any, None, list[gr.HTML]]


def build(app: Explorer) -> tuple[Filled, Filled]:
    """What fills the view's components: first the words, then the pictures, for which matplotlib has to be loaded."""
    message, content = panel(), panel(elem_id="overview")
    failed, drawn = panel(), panel(elem_id="overview-pictures")

    def fill() -> str:
        made = str(overview(app))
        app.open()
        return made

    return (safely(fill, 1), None, [message, content]), (safely(lambda: str(pictures(app)), 1), None, [failed, drawn])


def overview(app: Explorer) -> Markup:
    """The whole view but its pictures. Raises RunError for a run that is gone."""
    app.alive()
    doc = document(app.root)
    rows: Sequence[dict[str, Any]] = doc["comparison"]
    return Markup('<div class="overview">{}</div>').format(join([
        state_notes(doc),
        headline_cards(doc),
        Markup('<div class="columns"><section>{}</section><section>{}</section></div>').format(
            join([Markup("<h2>What was forgotten</h2>"), asked(doc), Markup("<h2>How it was done</h2>"), done(doc)]),
            join([Markup("<h2>Under attack</h2>"), attacks(doc), Markup("<h2>Not claimed</h2><ul>{}</ul>").format(
                join(Markup("<li>{}</li>").format(c) for c in doc["not_claimed"])), report_link(app.root)])),
        Markup("<h2>Gone and kept</h2>"), comparison(rows),
    ]))  # fmt: skip


def pictures(app: Explorer) -> Markup:
    """The run's Erasures against each other, and why this layer. Raises RunError for a run that is gone."""
    app.alive()
    return Markup('<div class="columns"><section>{}</section><section>{}</section></div>').format(
        join([Markup("<h2>Forgetting against retention</h2>"), frontier(app.documents())]),
        join([Markup("<h2>Layers</h2>"), layers(read_json(app.root / "selection.json"))]),
    )


def state_notes(doc: Mapping[str, Any]) -> Markup:
    notes = []
    if doc["status"] != "done":
        notes.append(
            note(f"The run is not recorded as done (status: {doc['status']}): what follows may be incomplete.")
        )
    notes += [note(f"Missing: {what}") for what in doc["missing"]]
    return join(notes)


def headline_cards(doc: Mapping[str, Any]) -> Markup:
    items = []
    for h in doc["headlines"]:
        title = "Forget: the best remembered group" if h["forget"] else "Retain: the group that lost most"
        small = f"{h['group']}, {h['metric']}, n = {h['n']}" + (f"; {h['remark']}" if h["remark"] else "")
        value = f"{score(h['before'], h['metric'])} → {score(h['after'], h['metric'])}"
        items.append((title, value, small, "forget" if h["forget"] else "retain"))
    found = doc["attacks"]
    if found and found["attacks"] and found["this_erasure"]:
        head = found["headline"]
        small = f"{head['attack'] or ''}: 95 % interval {percent(head['low'])} … {percent(head['high'])}"
        items.append(("Recovered by the worst attack", percent(head["recovered"]), small, ""))
    else:
        items.append(("Under attack", "not attacked", "whether it comes back was not tried", ""))
    return cards(items)


def asked(doc: Mapping[str, Any]) -> Markup:
    data = [(d["name"], d["n"] if d["n"] is not None else "–", fingerprint(d["fingerprint"]))
            for d in doc["asked"]["data"]]  # fmt: skip
    model = doc["asked"]
    return join([
        table(["set", "records", "fingerprint"], data, right=[1], label="data sets"),
        pairs([("model", model["model"] or "–"), ("model before the edit", fingerprint(model["fingerprint"]))]),
    ])  # fmt: skip


def done(doc: Mapping[str, Any]) -> Markup:
    made, features = doc["done"], doc["done"]["features"] or {}
    changed = made["changed"] or {}
    count = f"{changed['count']:,} numbers ({changed['share']:.2%})" if changed.get("count") else "none"
    chosen = f"layer {features['layer']}, {len(features['relevant'])} relevant features" if features else "none"
    items = [("method", made["method"] or "–"), ("features", chosen), ("weights changed", count),
             ("seed", number(made["seed"])), ("Erasure", fingerprint(made["erasure_id"])),
             ("made", made["created"] or "–"), ("time of the run", f"{number(made['seconds'])} s")]  # fmt: skip
    settings = table(["setting", "value"], [(k, json.dumps(v)) for k, v in made["config"].items()], label="settings")
    return join([pairs(items), fold("Settings of the method", settings)])


def comparison(rows: Sequence[dict[str, Any]]) -> Markup:
    """Before and after with 95 % intervals, one table a metric."""
    if not rows:
        return note("No comparison of before and after was recorded.")
    parts = []
    for metric, label in METRICS.items():
        if not (own := [r for r in rows if r["metric"] == metric]):
            continue
        own.sort(key=lambda r: not is_forget(r["group"]))
        ends = [v for r in own for k in ("before_low", "before_high", "after_low", "after_high", "before", "after")
                if (v := r.get(k)) is not None]  # fmt: skip
        low, high = (min(ends), max(ends)) if metric == "nll" else (0.0, 1.0)
        lines = [
            (under(r["group"], f"n = {r['n']:,}"), _with_interval(r, "before", metric),
             _with_interval(r, "after", metric),
             whiskers(r, low, high, "forget" if is_forget(r["group"]) else "retain"))
            for r in own
        ]  # fmt: skip
        reach = f"{score(low, metric)} … {score(high, metric)}"
        parts.append(Markup("<section><h3>{}</h3>{}</section>").format(
            label.capitalize() if metric != "nll" else label,
            table(["group", "before", "after", reach], lines, right=[1, 2], label=f"{label} before and after"),
        ))  # fmt: skip
    legend = Markup('<p class="soft">Grey disc: before. Diamond: after. Lines: 95 % intervals. Dotted: chance.</p>')
    return join([Markup('<div class="columns">{}</div>').format(join(parts)), legend])


def _with_interval(row: Mapping[str, Any], when: str, metric: str) -> Markup:
    low, high = row.get(f"{when}_low"), row.get(f"{when}_high")
    interval = "" if low is None else f"{score(low, metric)} … {score(high, metric)}"
    return under(score(row[when], metric), interval)


def layers(selection: Mapping[str, Any]) -> Markup:
    """Every score, and the probe runs, by layer."""
    rows = selection.get("layers") or []
    if not rows:
        return Markup('<p class="soft">This run chose no layer: its method needs none.</p>')
    chosen = next((r["layer"] for r in rows if r["chosen"]), None)
    said = Markup('<p class="soft">By layer: the output of the block, from 0.</p>')
    return join([picture(figures.layer_table(rows), f"Scores and probe runs by layer; chosen: {chosen}"), said])


def attacks(doc: Mapping[str, Any]) -> Markup:
    found = doc["attacks"]
    if not found or not found["attacks"]:
        said = "Not attacked: whether the knowledge comes back was not tried (<code>saeunlearn attack</code> tries)."
        return note(Markup(said), "info")
    first = [] if found["this_erasure"] else [note("These attacks were made on another Erasure.")]
    rows = [(a["name"], score(a["accuracy"], found["metric"]),
             under(percent(a["recovered"]), f"{percent(a['recovered_low'])} … {percent(a['recovered_high'])}"),
             score(a["oracle_accuracy"], found["metric"])) for a in found["attacks"]]  # fmt: skip
    return join([*first, table(["attack", "after it", "recovered", "oracle"], rows, right=[1, 2, 3], label="attacks")])


def report_link(root: Path) -> Markup:
    page = root / "report.html"
    if not page.exists():
        return Markup("")
    return Markup('<p><a href="gradio_api/file={}" target="_blank" rel="noopener">The whole report</a></p>').format(
        quote(str(page.resolve()))
    )
