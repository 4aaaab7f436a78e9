"""Steer: scale or clamp features of a layer, see what the model says, and keep the choice as a guard."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import ConfigError

from ..links import panel
from ..pieces import join, note
from ..state import GUARDS, Explorer, safely, whole
from .compare import PROMPT_LENGTH

SLOTS = 6  # features that can be steered at once
REACH = {"scale": (0.0, 5.0, 0.0), "clamp": (-20.0, 20.0, 0.0)}  # of the slider: least, most, at first


def build(app: Explorer, layer: gr.Dropdown, field: gr.Number, chosen: gr.State) -> tuple[Any, list[Any], list[Any]]:
    """The view's components. Returns what adds the feature of `field`, with its inputs and outputs.

    `chosen`: {layer: {feature: setting}} of the guard that this visitor saved last, for the marks in Layers.
    """
    gr.Markdown("`scale` multiplies a feature's activation (0 takes it out); `clamp` sets it, as a guard does.")
    slots: list[tuple[gr.Number, gr.Dropdown, gr.Slider]] = []
    for i in range(SLOTS):
        with gr.Row(equal_height=True):
            feature = gr.Number(
                label=f"Feature {i + 1}", precision=0, minimum=0, min_width=110, scale=1, elem_id=f"steer-feature-{i}"
            )
            mode = gr.Dropdown(list(REACH), value="scale", label="How", min_width=110, scale=1)
            low, high, value = REACH["scale"]
            slider = gr.Slider(
                low, high, value=value, step=0.05, label="Value", min_width=220, scale=4, elem_id=f"steer-value-{i}"
            )
        mode.change(_reach, mode, slider, show_progress="hidden", api_visibility="private")
        slots.append((feature, mode, slider))
    prompt = gr.Textbox(label="Prompt", lines=2, max_length=PROMPT_LENGTH, elem_id="steer-prompt")
    with gr.Row(equal_height=True):
        length = gr.Slider(1, 64, value=16, step=1, label="New tokens", min_width=160)
        run = gr.Button("Generate", variant="primary", elem_id="steer-run", min_width=120)
        name = gr.Textbox(label="Name of the guard", placeholder="guard-1", elem_id="steer-name", min_width=160)
        save = gr.Button("Save as a guard", elem_id="steer-save", min_width=120)
    message, content = panel(), panel(elem_id="steer")

    def steer(layer: Any, prompt: str, length: Any, *values: Any) -> str:
        from saeunlearn.explore.steer import steer_view

        if not prompt.strip() or len(prompt) > PROMPT_LENGTH:
            raise ConfigError(f"write a prompt of at most {PROMPT_LENGTH:,} characters first")
        view = steer_view(app.run(), whole(layer, "the layer"), choice(values), prompt, whole(length, "the new tokens"))
        return str(rendered(view))

    def keep(layer: Any, name: str, *values: Any) -> tuple[str, dict[str, Any]]:
        from saeunlearn.explore.steer import save_guard

        at, settings = whole(layer, "the layer"), choice(values)
        name = name.strip() or _free(app)
        folder = app.root / GUARDS / app.free_name(name)
        save_guard(app.run(), at, settings, folder)
        app.add(name, folder)
        said = Markup("The guard {} is saved in <code>{}</code> and in the list of Compare. <code>saeunlearn inspect {}</code> "
                      "opens it.").format(name, folder, folder)  # fmt: skip
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
        wanted = whole(feature, "the feature")
        if wanted in features:
            return [gr.skip()] * SLOTS
        free = next((i for i, f in enumerate(features) if f is None), None)
        if free is None:
            raise ConfigError(f"at most {SLOTS} features can be steered at once: empty one first")
        return [wanted if i == free else gr.skip() for i in range(SLOTS)]

    numbers = [f for f, _, _ in slots]
    return safely(add, SLOTS), [field, *numbers], [message, *numbers]


def choice(values: tuple[Any, ...]) -> dict[int, dict[str, float]]:
    """{feature: {"scale" or "clamp": value}} of the slots' values. Raises ConfigError for none, or one twice."""
    out: dict[int, dict[str, float]] = {}
    for feature, mode, value in zip(values[::3], values[1::3], values[2::3]):
        if feature is None:
            continue
        which = whole(feature, "a feature")
        if which in out or mode not in REACH:
            raise ConfigError(f"feature {which} is there twice, or {mode!r} is no way to steer it")
        out[which] = {mode: float(value)}
    if not out:
        raise ConfigError("choose a feature first: its number goes into a field above")
    return out


def rendered(view: dict[str, Any]) -> Markup:
    sides = [Markup('<section class="model"><h3>{}</h3><p class="generated">{}</p></section>').format(n, view[n] or "(nothing)")
             for n in ("original", "steered")]  # fmt: skip
    return Markup('<div class="side-by-side">{}</div>').format(join(sides))


def _reach(mode: str) -> Any:
    low, high, value = REACH.get(mode, REACH["scale"])
    return gr.Slider(minimum=low, maximum=high, value=value)


def _free(app: Explorer) -> str:
    n = 1
    while (app.root / GUARDS / f"guard-{n}").exists():
        n += 1
    return f"guard-{n}"
