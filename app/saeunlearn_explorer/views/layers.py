"""Layers and features: every feature of a layer as a point, the layers' scores, search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from ..links import link, linked, panel
from ..pieces import chip, join, note, number, percent, table
from ..state import Explorer, safely, whole, words

SCRIPT = (Path(__file__).parents[1] / "scatter.js").read_text(encoding="utf-8")
LISTED = 40  # features in the list beside the drawing
DRAWING = """
<div class="scatter"><canvas role="img" aria-label="forget score against retain score of every feature; the list beside
it has the same features as buttons"></canvas><div class="tip" hidden></div></div>
<p class="legend"><span><i class="mark relevant"></i>relevant</span>
<span><i class="mark irrelevant"></i>irrelevant</span>
<span><i class="mark chosen"></i>chosen to steer</span><span><i class="mark"></i>other</span></p>
"""


def build(
    app: Explorer, layer: gr.Dropdown, chosen: gr.State
) -> tuple[list[gr.HTML], tuple[Any, list[Any], list[Any]]]:
    """The view's components: (those that open a feature, what fills the view with its inputs and outputs)."""
    message = panel()
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            drawing = gr.HTML(value={}, html_template=DRAWING, js_on_load=SCRIPT, apply_default_css=False,
                              elem_id="scatter", elem_classes="panel")  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            query = gr.Textbox(label="Search: a feature's number, or a token", elem_id="search", submit_btn=True)
            listed = linked(elem_id="features")
    about = panel(elem_id="layers")

    def fill(layer: Any, chosen: dict[str, Any]) -> tuple[Any, ...]:
        from saeunlearn.explore.feature import layer_view

        run, index = app.run(), app.index()
        at = whole(layer, "the layer")
        marked = [int(f) for f in chosen.get(str(at), {})]
        view = layer_view(run, index, at, marked)
        points = {k: view[k] for k in ("features", "forget", "retain", "marks", "tokens")}
        return points, str(listing(view)), str(described(view))

    def search(query: str, layer: Any) -> str:
        from saeunlearn.explore.feature import find_features, layer_view

        at = whole(layer, "the layer")
        run, index = app.run(), app.index()
        if not words(query):
            return str(listing(layer_view(run, index, at)))
        return str(hits(find_features(run, index, words(query), at), at, words(query)))

    filled = [message, drawing, listed, about]
    gr.on([layer.change], safely(fill, 3), [layer, chosen], filled, show_progress="minimal", api_name="layer")
    gr.on([query.submit], safely(search, 1), [query, layer], [message, listed], api_name="search")
    return [drawing, listed], (safely(fill, 3), [layer, chosen], filled)


def listing(view: dict[str, Any]) -> Markup:
    """The features with the highest forget scores as buttons: marked ones first."""
    rank = {"chosen": 0, "relevant": 1, "irrelevant": 3, "": 2}
    rows = sorted(zip(view["features"], view["forget"], view["retain"], view["marks"], view["tokens"]),
                  key=lambda r: (rank[r[3]], -r[1]))[:LISTED]  # fmt: skip
    lines = [(link(view["layer"], f), m, number(a), number(b), join(chip(t) for t in tokens[:2]))
             for f, a, b, m, tokens in rows]  # fmt: skip
    head = ["feature", "mark", "forget", "retain", "most active on"]
    return Markup('<div class="tall">{}</div>').format(table(head, lines, right=[2, 3], label="features of the layer"))


def hits(found: list[dict[str, Any]], layer: int, query: str) -> Markup:
    if not found:
        return note(f"No feature of layer {layer} is {query}, acts on it or promotes it.", "info")
    lines = [(link(layer, r["feature"]), r["by"], number(r["value"])) for r in found]
    said = Markup('<p class="soft">active on: share of positions; promotes: logit.</p>')
    return Markup('<div class="tall">{}{}</div>').format(
        table(["feature", "found as", "value"], lines, right=[2]), said
    )


def described(view: dict[str, Any]) -> Markup:
    rows = [(name, f"{t['positions']:,}", percent(t["fvu"])) for name, t in view["texts"].items()]
    live = f"{len(view['features']):,} of {view['d_sae']:,} features of this layer fire on these texts."
    texts = table(["text", "positions", "variance not explained by the SAE"], rows, right=[1, 2], label="texts")
    return join([Markup('<p class="soft">{}</p>').format(live), texts])
