"""Components whose parts can be clicked, and the feature that a visitor looks at."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

CLICKS = """
element.addEventListener("click", (event) => {
  const link = event.target.closest("[data-feature]");
  if (link) trigger("select", { layer: Number(link.dataset.layer), feature: Number(link.dataset.feature) });
});
"""


def panel(value: Any = "", **settings: Any) -> gr.HTML:
    """HTML in this page's own style; takes no room while it is empty."""
    return gr.HTML(value=str(value), apply_default_css=False, elem_classes="panel", **settings)


def linked(**settings: Any) -> gr.HTML:
    """A panel whose `link`s trigger `select` with {layer, feature}."""
    return panel(js_on_load=CLICKS, **settings)


def link(layer: int, feature: int, label: Any = None) -> Markup:
    """A button that opens a feature, inside a `linked` component."""
    return Markup('<button type="button" class="link" data-layer="{}" data-feature="{}">{}</button>').format(
        layer, feature, feature if label is None else label
    )
