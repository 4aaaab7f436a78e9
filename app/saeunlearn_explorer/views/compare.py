"""Compare: one prompt through the original and through Erasures, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import ConfigError

from ..links import link, linked, panel
from ..pieces import fold, join, number, percent, readable, table, tokens
from ..state import Explorer, safely, whole, words

MOST = 4  # Erasures side by side
PROMPT_LENGTH = 2000  # characters
LENGTH = 16  # new tokens at first
SHOWN = 10  # changed features that are not folded away
KINDS = ("relevant", "irrelevant", "other")
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


def build(app: Explorer) -> View:
    """The view's components."""
    offered = gr.Dropdown([], label="Example prompts: questions of this run", elem_id="compare-examples")
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, max_length=PROMPT_LENGTH, scale=3, min_width=300,
                            elem_id="compare-prompt")  # fmt: skip
        answers = gr.Textbox(label="Answers to score, one a line", lines=2, max_lines=8, scale=2, min_width=240,
                             elem_id="compare-answers")  # fmt: skip
    with gr.Row(elem_classes="bottom"):
        names = gr.CheckboxGroup(
            app.names(),
            value=app.names()[:1],
            label=f"Beside the original (at most {MOST})",
            elem_id="compare-names",
            scale=3,
        )
        length = gr.Slider(1, 64, value=LENGTH, step=1, label="New tokens", scale=1, min_width=160)
        run = gr.Button("Compare", variant="primary", elem_id="compare-run", scale=1, min_width=120)
    message = panel()
    content = linked(elem_id="compare")

    def offer(label: str | None) -> tuple[Any, Any]:
        for name, question, choices in example_prompts(app):
            if name == label:
                return question, "\n".join(choices)
        return gr.skip(), gr.skip()

    def compare(prompt: str, answers: str, names: list[str], length: Any) -> str:
        from saeunlearn.explore.compare import compare_view

        if not words(prompt):
            raise ConfigError("write a prompt first, or choose an example")
        if len(prompt) > PROMPT_LENGTH:
            raise ConfigError(f"the prompt has {len(prompt):,} characters; at most {PROMPT_LENGTH:,} are compared")
        if len(names) > MOST:
            raise ConfigError(f"{len(names)} Erasures are too many for one page: choose at most {MOST}")
        wanted = [line for line in (a.strip() for a in words(answers).splitlines()) if line]
        view = compare_view(app.run(), prompt, names, wanted, max_new_tokens=whole(length, "the new tokens"))
        return str(rendered(view))

    offered.change(offer, offered, [prompt, answers], api_visibility="private", show_progress="hidden")
    fields = [prompt, answers, names, length]
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
    columns = [one_model(name, m, original) for name, m in models.items()]
    parts = [Markup('<div class="side-by-side">{}</div>').format(join(columns))]
    for name, m in list(models.items())[1:]:
        parts.append(Markup('<h2>{}: what it changed inside</h2><div class="columns">{}{}</div>').format(
            name, features(m["features"]), residual(m["residual"])))  # fmt: skip
    lenses = join(fold(f"{n}: what each layer would say next", lens(m["lens"], m["tokens"])) for n, m in models.items())
    return join([*parts, Markup("<h2>Logit lens</h2>"), lenses])


def one_model(name: str, m: dict[str, Any], original: dict[str, Any]) -> Markup:
    own = m is original
    if own or m["tokens"] != original["tokens"]:
        shaded = shaded_tokens(m["tokens"], m["loss"])
    else:
        shaded = shaded_tokens(m["tokens"], m["loss"], original["loss"])
    return Markup('<section class="model"><h3>{}</h3><p class="generated">{}</p>{}{}</section>').format(
        name, m["generated"] or "(nothing)", answers(m["answers"], original["answers"], own), shaded
    )


def shaded_tokens(words: list[str], loss: list[Any], before: list[Any] | None = None) -> Markup:
    """The prompt shaded by the loss of each token, or by its change."""
    if before is None:
        said, drawn = "loss of each token", tokens(words, loss, unit="loss in nats:")
    else:
        change = [None if a is None or b is None else a - b for a, b in zip(loss, before)]
        said = "loss against the original: orange up; blue, underlined: down"
        # At least a nat is the darkest, so that small changes look small.
        most = max([1.0, *(abs(c) for c in change if c is not None)])
        drawn = tokens(words, change, largest=most, unit="loss changed by nats:")
    return Markup('<p class="soft">{}</p>{}').format(said, drawn)


def answers(rows: list[dict[str, Any]], before: list[dict[str, Any]], own: bool) -> Markup:
    """Probabilities as bars, with the change against the original."""
    if not rows:
        return Markup("")
    lines = []
    for r, b in zip(rows, before):
        p = r["probability"]
        change = "" if own else f" ({p - b['probability']:+.1%})"
        bar = Markup('<i class="meter"><i style="width:{:.1f}%"></i></i>').format(100 * p)
        lines.append(Markup('<div class="answer"><span>{}</span>{}<span class="r">{}</span></div>').format(
            r["text"], bar, f"{percent(p)}{change}"))  # fmt: skip
    return Markup('<div class="answers">{}</div>').format(join(lines))


def features(rows: list[dict[str, Any]]) -> Markup:
    """The features that changed most, as links; the first SHOWN of them unfolded."""

    def made(part: list[dict[str, Any]]) -> Markup:
        lines = [(r["layer"], link(r["layer"], r["feature"]), number(r["before"]), number(r["after"]),
                  f"{r['after'] - r['before']:+.3g}") for r in part]  # fmt: skip
        return table(["layer", "feature", "before", "after", "change"], lines, right=[0, 1, 2, 3, 4], label="features")

    rest = fold(f"{len(rows) - SHOWN} more", made(rows[SHOWN:])) if len(rows) > SHOWN else ""
    first = made(rows[:SHOWN]) if rows else Markup('<p class="soft">none</p>')
    return Markup("<section><h3>Features that changed most (mean over the prompt)</h3>{}{}</section>").format(
        first, rest
    )


def residual(rows: list[dict[str, Any]]) -> Markup:
    """A stacked bar a layer: its length is the size of the change, its parts where it lies."""
    most = max((r["total"] for r in rows), default=0.0) or 1.0
    lines = []
    for r in rows:
        parts = join(
            Markup('<i class="{}" style="width:{:.1f}%" title="{} {}"></i>').format(
                kind, 100 * r[kind] * r["total"] / most, kind, percent(r[kind]))
            for kind in KINDS if r[kind] is not None)  # fmt: skip
        shares = " / ".join(percent(r[kind]) for kind in KINDS)
        lines.append((r["layer"], Markup('<div class="stack">{}</div>').format(parts), number(r["total"]), shares))
    legend = Markup('<p class="legend"><span><i class="mark relevant"></i>relevant subspace</span><span><i class="mark '
                    'irrelevant"></i>irrelevant subspace</span><span><i class="mark square"></i>outside both</span></p>'
                    '<p class="soft">The subspaces are those of the layer that the run chose.</p>')  # fmt: skip
    head = ["layer", "‖Δh‖² / ‖h‖²", "", "relevant / irrelevant / other"]
    made = table(head, lines, right=[0, 2, 3], label="change of the residual stream")
    return Markup('<section class="residual"><h3>Change of the residual stream</h3>{}{}</section>').format(made, legend)


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
