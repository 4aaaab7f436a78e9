"""Feature: where it is most active, what it writes, its neighbours, and what each Erasure does to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from ..links import link, linked, panel
from ..pieces import chip, histogram, join, note, number, percent, table, tokens
from ..state import Explorer, safely, whole


@dataclass(frozen=True)
class View:
    """What the page connects with other views; `render(layer, feature)` gives the content."""

    field: gr.Textbox
    steer: gr.Button
    message: gr.HTML
    content: gr.HTML
    render: Callable[[Any, Any], str]


def build(app: Explorer, layer: gr.Dropdown) -> View:
    """The view's components."""
    with gr.Row(elem_classes="bottom"):
        field = gr.Textbox(label="Feature", max_lines=1, elem_id="feature-number", min_width=120)
        show = gr.Button("Show", elem_id="feature-show", min_width=100)
        steer = gr.Button("Steer this feature", elem_id="feature-steer", min_width=140)
    message = panel()
    content = linked(elem_id="feature", value=note("Choose a feature: in Layers, or by its number above.", "info"))

    def render(layer: Any, feature: Any) -> str:
        from saeunlearn.explore.feature import feature_view

        at, which = whole(layer, "the layer"), whole(feature, "the feature")
        return str(rendered(feature_view(app.run(), app.index(), at, which)))

    gr.on([show.click, field.submit], safely(render, 1), [layer, field], [message, content], api_name="feature")
    return View(field, steer, message, content, render)


def rendered(view: dict[str, Any]) -> Markup:
    layer, mark = view["layer"], view["mark"]
    head = Markup("<h2>Layer {}, feature {}{}</h2>").format(layer, view["feature"], f" ({mark})" if mark else "")
    rates = [(t, percent(rate), number(view["mean"][t])) for t, rate in view["density"].items()]
    scores = Markup("<p>forget score {}, retain score {} <span class='soft'>(mean squared activation relative to the "
                    "squared norm of the stream)</span></p>").format(number(view["scores"]["forget"]),
                                                                    number(view["scores"]["retain"]))  # fmt: skip
    left = [scores, table(["text", "active at", "mean activation"], rates, right=[1, 2], label="activity"),
            Markup("<h3>Nearest features</h3><p>{}</p>").format(join(
                Markup("{} <small class='soft'>cos {}</small> &ensp;").format(
                    link(layer, n["feature"]), number(n["cosine"], 2))
                for n in view["nearest"]))]  # fmt: skip
    right = [Markup("<h3>Promotes</h3><p>{}</p><h3>Suppresses</h3><p>{}</p>").format(
        *(join(chip(t["token"], t["logit"]) for t in view[side]) for side in ("promoted", "suppressed")))]  # fmt: skip
    drawn = [histogram(h["edges"], h["counts"], f"{t}: how strongly it is active", t)
             for t, h in view["histogram"].items() if h["counts"]]  # fmt: skip
    return join([
        head,
        Markup('<div class="columns"><section>{}</section><section>{}</section></div>').format(join(left), join(right)),
        Markup('<div class="grid wide">{}</div>').format(join(drawn)),
        Markup("<h2>Before and after each Erasure</h2>"), erased(view["erasures"]),
        Markup("<h2>Where it is active</h2>"), examples(view["examples"]),
    ])  # fmt: skip


def erased(found: dict[str, Any]) -> Markup:
    """A row an Erasure and text."""
    if not found:
        return note("What the Erasures do to the features is still being measured; show the feature again in a moment.",
                    "info")  # fmt: skip
    rows = [
        (name, text, f"{number(m['mean_before'])} → {number(m['mean_after'])}",
         f"{percent(m['rate_before'])} → {percent(m['rate_after'])}")
        for name, texts in found.items() for text, m in texts.items()
    ]  # fmt: skip
    return table(["Erasure", "text", "mean activation", "active at"], rows, right=[2, 3], label="before and after")


def examples(found: dict[str, list[dict[str, Any]]]) -> Markup:
    """One column a text: the strongest contexts, then some of every quarter of its activations."""
    largest = max((e["activation"] for rows in found.values() for e in rows), default=0.0)
    columns = []
    for text, rows in found.items():
        lines = [Markup('<div class="example" title="record {}">{}{}</div>').format(
            e["id"], Markup('<small class="soft">{} · {}</small>').format(
                number(e["activation"], 2), "top" if e["quantile"] == 1 else f"quantile {e['quantile']:.2f}"),
            tokens(e["tokens"], e["activations"], largest=largest, at=e["at"])) for e in rows]  # fmt: skip
        content = join(lines) if lines else Markup('<p class="soft">never active</p>')
        columns.append(Markup("<section><h3>{}</h3>{}</section>").format(text, content))
    return Markup('<div class="columns three">{}</div>').format(join(columns))
