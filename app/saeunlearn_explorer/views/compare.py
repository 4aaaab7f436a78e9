"""Compare: one prompt through the original and through Erasures, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import ConfigError

from ..links import link, linked, panel
from ..pieces import fold, join, note, number, percent, readable, table, tokens
from ..state import Explorer, safely, whole

MOST = 4  # Erasures side by side
PROMPT_LENGTH = 2000  # characters
EXAMPLES = 6  # questions of each group that are offered


@dataclass(frozen=True)
class View:
    """What the page connects with other views; `run` is the comparison with its inputs and outputs."""

    names: gr.CheckboxGroup
    offered: gr.Dropdown
    prompt: gr.Textbox
    answers: gr.Textbox
    content: gr.HTML
    run: tuple[Any, list[Any], list[Any]]


def build(app: Explorer, layer: gr.Dropdown) -> View:
    """The view's components."""
    offered = gr.Dropdown([], label="Example prompts: questions of this run", elem_id="compare-examples")
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, max_length=PROMPT_LENGTH, scale=3, min_width=300,
                            elem_id="compare-prompt")  # fmt: skip
        answers = gr.Textbox(label="Answers to score, one a line", lines=2, max_lines=8, scale=2, min_width=240,
                             elem_id="compare-answers")  # fmt: skip
    with gr.Row(equal_height=True):
        names = gr.CheckboxGroup(
            app.names(),
            value=app.names()[:1],
            label=f"Beside the original (at most {MOST})",
            elem_id="compare-names",
            scale=3,
        )
        length = gr.Slider(1, 64, value=16, step=1, label="New tokens", scale=1, min_width=160)
        run = gr.Button("Compare", variant="primary", elem_id="compare-run", scale=1, min_width=120)
    message = panel()
    content = linked(elem_id="compare")

    def offer(label: str | None) -> tuple[Any, Any]:
        for name, question, choices in example_prompts(app):
            if name == label:
                return question, "\n".join(choices)
        return gr.skip(), gr.skip()

    def compare(prompt: str, answers: str, names: list[str], layer: Any, length: Any) -> str:
        from saeunlearn.explore.compare import compare_view

        if not prompt.strip():
            raise ConfigError("write a prompt first, or choose an example")
        if len(prompt) > PROMPT_LENGTH:
            raise ConfigError(f"the prompt has {len(prompt):,} characters; at most {PROMPT_LENGTH:,} are compared")
        if len(names) > MOST:
            raise ConfigError(f"{len(names)} Erasures are too many for one page: choose at most {MOST}")
        wanted = [line for line in (a.strip() for a in answers.splitlines()) if line]
        given = {"layer": whole(layer, "the layer")} if layer not in (None, "") else {}
        view = compare_view(app.run(), prompt, names, wanted, max_new_tokens=whole(length, "the new tokens"), **given)
        return str(rendered(view))

    offered.change(offer, offered, [prompt, answers], api_visibility="private", show_progress="hidden")
    fields = [prompt, answers, names, layer, length]
    wrapped, filled = safely(compare, 1), [message, content]
    gr.on([run.click, prompt.submit], wrapped, fields, filled, api_name="compare")
    return View(names, offered, prompt, answers, content, (wrapped, fields, filled))


def example_prompts(app: Explorer) -> list[tuple[str, str, list[str]]]:
    """(label, question, answers): some questions of each group of the run, in a fixed draw."""
    from saeunlearn.corpus import Corpus
    from saeunlearn.evaluation.evaluate import group_of

    run = app.run()
    groups: dict[str, list[Any]] = {}
    for r in run.questions or run.forget:
        groups.setdefault(group_of(r) if run.questions else "forget", []).append(r)
    out = []
    for group, records in sorted(groups.items()):
        for r in Corpus(tuple(records), group).sample(EXAMPLES, run.config.seed):
            text = r.question or " ".join(r.text.split()[:8])
            out.append((f"{group}: {text}", text, list(r.choices) or ([r.answer] if r.answer else [])))
    return out


def rendered(view: dict[str, Any]) -> Markup:
    models = view["models"]
    original = next(iter(models.values()))
    columns = [one_model(name, m, original, view["tokens"]) for name, m in models.items()]
    others = {n: m for n, m in models.items() if m is not original}
    parts = [Markup('<div class="side-by-side">{}</div>').format(join(columns))]
    if others:
        parts.append(Markup("<h2>Change of the residual stream by layer</h2>{}").format(
            join(residual(n, m["residual"]) for n, m in others.items() if m.get("residual"))))  # fmt: skip
        parts.append(Markup('<h2>Features that changed most</h2><div class="columns">{}</div>').format(
            join(features(n, m["features"]) for n, m in others.items())))  # fmt: skip
    parts.append(
        Markup("<h2>Logit lens</h2>{}").format(
            join(
                fold(f"{n}: what each layer would say next", lens(m["lens"], view["tokens"])) for n, m in models.items()
            )
        )
    )
    return join(parts)


def one_model(name: str, m: dict[str, Any], original: dict[str, Any], words: list[str]) -> Markup:
    own = m is original
    told = join(Markup("<p>{}</p>").format(note(s, "info")) for s in m.get("notes", ()))
    if own:
        shaded, said = tokens(words, m["loss"], unit="loss (nats)"), "loss of each token"
    else:
        change = [None if a is None or b is None else a - b for a, b in zip(m["loss"], original["loss"])]
        shaded, said = tokens(words, change, unit="loss by (nats)"), "loss against the original: orange up, blue down"
    return Markup(
        '<section class="model"><h3>{}</h3>{}<p class="generated">{}</p>{}<p class="soft">{}</p>{}</section>'
    ).format(name, told, m["generated"] or "(nothing)", answers(m["answers"], original["answers"], own), said, shaded)


def answers(rows: list[dict[str, Any]], before: list[dict[str, Any]], own: bool) -> Markup:
    """Probabilities as bars, with the change against the original."""
    if not rows:
        return Markup("")
    lines = []
    for r, b in zip(rows, before):
        p = r["probability"]
        change = "" if own else f" ({p - b['probability']:+.1%})"
        lines.append(Markup(
            '<div class="answer"><span>{}</span><meter min="0" max="1" value="{}" aria-label="{}"></meter><span class="r">{}</span></div>'
        ).format(r["text"], f"{p:.4f}", f"probability of {r['text']}", f"{percent(p)}{change}"))  # fmt: skip
    return Markup('<div class="answers">{}</div>').format(join(lines))


def features(name: str, rows: list[dict[str, Any]]) -> Markup:
    if not rows:
        return Markup("<section><h3>{}</h3><p class='soft'>none</p></section>").format(name)
    lines = [(r["layer"], link(r["layer"], r["feature"]), number(r["before"]), number(r["after"]),
              f"{r['after'] - r['before']:+.3f}") for r in rows]  # fmt: skip
    made = table(["layer", "feature", "before", "after", "change"], lines, right=[0, 2, 3, 4], label="features changed")
    return Markup("<section><h3>{}</h3>{}</section>").format(name, made)


def residual(name: str, rows: list[dict[str, Any]]) -> Markup:
    """A stacked bar a layer: the share of the change in the relevant and irrelevant subspaces and outside both."""
    most = max((r["total"] or 0.0 for r in rows), default=0.0) or 1.0
    lines = []
    for r in rows:
        parts = join(Markup('<i class="{}" style="width:{:.1f}%" title="{} {}"></i>').format(
            kind, 100 * (r[kind] or 0.0) / most, kind, number(r[kind]))
            for kind in ("relevant", "irrelevant", "other") if r.get(kind) is not None)  # fmt: skip
        lines.append((r["layer"], Markup('<div class="stack">{}</div>').format(parts), number(r["total"])))
    legend = Markup('<p class="legend"><span><i class="mark relevant"></i>relevant subspace</span><span><i class="mark '
                    'irrelevant"></i>irrelevant subspace</span><span><i class="mark square"></i>outside both</span></p>')  # fmt: skip
    made = table(["layer", "where the change lies", "size"], lines, right=[0, 2], label=f"residual change of {name}")
    return Markup('<section class="residual"><h3>{}</h3>{}{}</section>').format(name, made, legend)


def lens(rows: list[dict[str, Any]], words: list[str]) -> Markup:
    """A row a layer, a column a position: the likeliest next token, shaded by its probability."""

    def cell(best: list[dict[str, Any]]) -> Markup:
        if not best:
            return Markup("")
        said = ", ".join(f"{readable(t['token'])} {t['probability']:.0%}" for t in best)
        return Markup('<span class="t" style="--s:{:.2f}" title="{}">{}</span>').format(
            best[0]["probability"], said, readable(best[0]["token"]))  # fmt: skip

    head = ["layer", *(Markup("<code>{}</code>").format(readable(w)) for w in words)]
    return Markup('<div class="lens">{}</div>').format(
        table(head, [[r["layer"], *(cell(p) for p in r["tokens"])] for r in rows], label="logit lens")
    )
