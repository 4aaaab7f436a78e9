"""Steer: scale or clamp features of a layer, see what the model says, and keep the choice as a guard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import ConfigError

from ..links import linked, panel
from ..pieces import join, note
from ..state import GUARDS, Explorer, safely, whole, words
from .compare import LENGTH, PROMPT_LENGTH, features, residual, shaded_tokens

SLOTS = 6  # features that can be steered at once
REACH = {"scale": (0.0, 5.0, 0.0), "clamp": (-20.0, 20.0, 0.0)}  # of the slider: least, most, at first


@dataclass(frozen=True)
class View:
    """What the page connects: content that opens features; what adds the shown feature, its inputs and outputs."""

    content: gr.HTML
    add: tuple[Any, list[Any], list[Any]]


def build(app: Explorer, layer: gr.Dropdown, field: gr.Textbox, chosen: gr.State) -> View:
    """The view's components.

    `chosen`: {layer: {feature: setting}} of the guard that this visitor saved last, for the marks in Layers.
    """

    def reach(mode: str, feature: Any, layer: Any) -> Any:
        """The slider's ends: for a clamp, twice the largest activation that the texts of the run caused."""
        low, high, value = REACH[mode]
        if mode == "clamp" and app.indexed() and words(feature).isdecimal() and layer in app.layers():
            index = app.index()
            top = [index.at(text, layer).top["value"] for text in index.texts]
            if int(words(feature)) < top[0].shape[1]:
                high = math.ceil(2 * max(float(t[:, int(words(feature))].max()) for t in top)) or 1
                low = -high
        return gr.Slider(minimum=low, maximum=high, value=value)

    gr.Markdown("`scale` multiplies a feature's activation (0 takes it out); `clamp` sets it, as a guard does.")
    slots: list[tuple[gr.Textbox, gr.Dropdown, gr.Slider]] = []
    with gr.Row(elem_classes="slots"):
        for i in range(SLOTS):
            with gr.Column(min_width=330), gr.Row():
                feature = gr.Textbox(label=f"Feature {i + 1}", min_width=80, max_lines=1, elem_id=f"steer-feature-{i}")
                mode = gr.Dropdown(list(REACH), value="scale", label="How", min_width=90, elem_id=f"steer-mode-{i}")
                low, high, value = REACH["scale"]
                slider = gr.Slider(low, high, value=value, step=0.05, label="Value", min_width=170, scale=3,
                                   elem_id=f"steer-value-{i}")  # fmt: skip
            mode.change(reach, [mode, feature, layer], slider, show_progress="hidden", api_visibility="private")
            slots.append((feature, mode, slider))
    prompt = gr.Textbox(label="Prompt", lines=2, max_length=PROMPT_LENGTH, elem_id="steer-prompt")
    with gr.Row(elem_classes="bottom"):
        length = gr.Slider(1, 64, value=LENGTH, step=1, label="New tokens", min_width=160)
        run = gr.Button("Generate", variant="primary", elem_id="steer-run", min_width=120)
        name = gr.Textbox(label="Name of the guard", placeholder="guard-1", elem_id="steer-name", min_width=160)
        save = gr.Button("Save as a guard", elem_id="steer-save", min_width=120)
    message, content = panel(), linked(elem_id="steer")

    def steer(layer: Any, prompt: str, length: Any, *values: Any) -> str:
        from saeunlearn.explore.steer import steer_view

        if not words(prompt) or len(prompt) > PROMPT_LENGTH:
            raise ConfigError(f"write a prompt of at most {PROMPT_LENGTH:,} characters first")
        view = steer_view(app.run(), whole(layer, "the layer"), choice(values), prompt, whole(length, "the new tokens"))
        return str(rendered(view))

    def keep(layer: Any, name: str, *values: Any) -> tuple[str, dict[str, Any]]:
        from saeunlearn.explore.steer import save_guard

        at, settings = whole(layer, "the layer"), choice(values)
        name = words(name) or app.next_name(GUARDS, "guard")
        folder = app.root / GUARDS / app.free_name(name)
        save_guard(app.run(), at, settings, folder)
        app.add(name, folder)
        said = Markup("The guard {} is saved in <code>{}</code> and in the list of Compare. "
                      "<code>saeunlearn inspect {}</code> opens it.").format(name, folder, folder)  # fmt: skip
        return str(note(said, "info")), {str(at): settings}

    flat = [c for slot in slots for c in slot]
    gr.on(
        [run.click, prompt.submit],
        safely(steer, 1),
        [layer, prompt, length, *flat],
        [message, content],
        api_name="steer",
    )
    save.click(safely(keep, 2), [layer, name, *flat], [message, content, chosen], api_name="guard")

    def add(feature: Any, *features: Any) -> list[Any]:
        """Put the feature into the first free slot."""
        wanted = str(whole(feature, "the feature"))
        if wanted in (words(f) for f in features):
            return [gr.skip()] * SLOTS
        free = next((i for i, f in enumerate(features) if not words(f)), None)
        if free is None:
            raise ConfigError(f"at most {SLOTS} features can be steered at once: empty one first")
        return [wanted if i == free else gr.skip() for i in range(SLOTS)]

    numbers = [f for f, _, _ in slots]
    return View(content, (safely(add, SLOTS), [field, *numbers], [message, *numbers]))


def choice(values: tuple[Any, ...]) -> dict[int, dict[str, float]]:
    """{feature: {"scale" or "clamp": value}} of the slots' values. Raises ConfigError for none, or one twice."""
    out: dict[int, dict[str, float]] = {}
    for feature, mode, value in zip(values[::3], values[1::3], values[2::3]):
        if not words(feature):
            continue
        which = whole(feature, "a feature")
        if which in out:
            raise ConfigError(f"feature {which} is there twice: empty one of the two")
        out[which] = {mode: float(value)}
    if not out:
        raise ConfigError("choose a feature first: its number goes into a field above")
    return out


def rendered(view: dict[str, Any]) -> Markup:
    one = Markup('<section class="model"><h3>{}</h3><p class="generated">{}</p>{}</section>')
    loss = view["loss"]
    sides = [one.format("original", view["original"] or "(nothing)", shaded_tokens(view["tokens"], loss["original"])),
             one.format("steered", view["steered"] or "(nothing)",
                        shaded_tokens(view["tokens"], loss["steered"], loss["original"]))]  # fmt: skip
    return Markup('<div class="side-by-side">{}</div><div class="columns">{}{}</div>').format(
        join(sides), features(view["features"]), residual(view["residual"])
    )
