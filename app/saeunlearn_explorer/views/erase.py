"""Erase: choose files, method and settings, and make an Erasure by the pipeline's own run function."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import ConfigError, RunError, SaeunlearnError
from saeunlearn.options import further_settings

from ..jobs import Job
from ..links import panel
from ..pieces import bar, fold, join, note, number, table
from ..state import MADE, Explorer, safely, whole, words

if TYPE_CHECKING:
    from saeunlearn.pipeline import RunConfig

TYPES = [".jsonl", ".json", ".csv", ".txt", ".parquet"]
POLL = 0.7  # seconds between two looks at the run
MAIN = ("max_retain_rise",)  # a field of its own; the method's other settings are NAME=VALUE lines


@dataclasses.dataclass(frozen=True)
class View:
    """What the page connects: `finished` changes to a name when the visitor's run is done; `fill` lists the methods."""

    finished: gr.State
    fill: tuple[Any, gr.Dropdown, list[Any]]


def build(app: Explorer, demo: gr.Blocks) -> View:
    """The view's components."""
    own = app.info["config"]
    finished = gr.State("")
    ticket = gr.BrowserState("", storage_key="saeunlearn-explorer-run")  # survives a reload: who has it may cancel
    timer = gr.Timer(POLL, active=False)
    gr.Markdown("Leave a file out to take that of this run. Uploaded files are kept in the cache folder of this "
                "machine: the new run directory refers to them and holds no text itself.")  # fmt: skip
    with gr.Row():
        files = [gr.File(label=label, file_types=TYPES, height=120, elem_id=f"erase-{name}")
                 for name, label in (("forget", "Forget set"), ("retain", "Retain set"),
                                     ("questions", "Questions to evaluate with"))]  # fmt: skip
    with gr.Row():
        method = gr.Dropdown([own["method"]], value=own["method"], label="Method", allow_custom_value=True,
                             elem_id="erase-method")  # fmt: skip
        layer = gr.Textbox(label="Layer", placeholder="automatic", elem_id="erase-layer")
        k = gr.Textbox(label="K (relevant features)", placeholder="automatic", elem_id="erase-k")
        rise = gr.Textbox(label="Allowed rise of the retain loss", placeholder="the method's default (0.02 is 2 %)",
                          value=str(own["settings"].get(MAIN[0], "")), elem_id="erase-rise")  # fmt: skip
        seed = gr.Number(label="Seed", value=own["seed"], precision=0, minimum=0, elem_id="erase-seed")
    with gr.Row():
        with gr.Column():
            settings = gr.Textbox(label="Other settings of the method, NAME=VALUE a line", lines=6, max_lines=12,
                                  value=_lines(own["settings"]), elem_id="erase-settings")  # fmt: skip
            known = panel()
        with gr.Column():
            name = gr.Textbox(label="Name of the new Erasure", placeholder="method and a number", elem_id="erase-name")
            keep = gr.Checkbox(label="Keep samples of the text in the new run directory and its report", value=False)
            with gr.Row():
                start = gr.Button("Erase", variant="primary", elem_id="erase-start")
                stop = gr.Button("Cancel", interactive=False, elem_id="erase-cancel")
            message, status = panel(), panel(elem_id="erase-status")

    def choose(name: str) -> tuple[str, str]:
        return _lines(own["settings"]) if name == own["method"] else "", str(_known(name))

    def begin(forget: Any, retain: Any, questions: Any, method: str, layer: str, k: str, rise: str, seed: float,
              lines: str, name: str, keep: bool) -> tuple[Any, ...]:  # fmt: skip
        config = configured(app, [forget, retain, questions], method, layer, k, rise, seed, lines, keep)
        name = app.free_name(words(name) or app.next_name(MADE, method))
        job = app.jobs.start(config, app.root / MADE / name, name, lambda job: app.add(job.name, job.root / "erasure"))
        return job.id, gr.Timer(active=True), str(shown(job)), gr.Button(interactive=True)

    def look(ticket: str) -> tuple[Any, ...]:
        job = app.jobs.get(ticket)
        if job is None:
            other = app.jobs.running()
            said = note("Another visitor's run is going on; there is one at a time.", "info") if other else ""
            return gr.Timer(active=other is not None), str(said), gr.Button(interactive=False), gr.skip()
        going = job.status == "running"
        ended = gr.skip() if job.status != "done" else f"{job.name} {job.id}"
        return gr.Timer(active=going), str(shown(job)), gr.Button(interactive=going), ended

    def resume(ticket: str) -> tuple[Any, ...]:
        """The page was loaded (again): a run that is going on is shown, one that has ended is history."""
        job = app.jobs.get(ticket)
        return look("" if job is None or job.status != "running" else ticket)

    def cancel(ticket: str) -> str:
        app.jobs.cancel(ticket)
        return str(note("Cancelling at the next step …", "info"))

    method.change(safely(choose, 2), method, [message, settings, known], api_visibility="private")
    given = [*files, method, layer, k, rise, seed, settings, name, keep]
    start.click(safely(begin, 4), given, [message, ticket, timer, status, stop], api_name="erase")
    timer.tick(look, ticket, [timer, status, stop, finished], show_progress="hidden", api_visibility="private")
    demo.load(resume, ticket, [timer, status, stop, finished], show_progress="hidden", api_visibility="private")
    stop.click(safely(cancel, 1), ticket, [message, status], api_visibility="private")
    return View(finished, (lambda name: (gr.Dropdown(choices=_methods()), str(_known(name))), method, [method, known]))


def configured(app: Explorer, uploads: list[str | None], method: str, layer: str, k: str, rise: str, seed: float,
               lines: str, keep: bool) -> RunConfig:  # fmt: skip
    """The run that the form describes: this run's model and SAEs, its data where nothing was uploaded.

    Raises ConfigError for what is no number or no setting.
    """
    from saeunlearn.pipeline import RunConfig

    own = RunConfig(**app.alive()["config"])
    forget, retain, questions = (_kept(f) for f in uploads)
    same_data = forget is None and retain is None
    select = dict(own.select) | {n: whole(v, n) for n, v in (("k", k), ("layer", layer)) if words(v)}
    settings = further_settings([line.strip() for line in words(lines).splitlines() if line.strip()])
    if words(rise):
        settings[MAIN[0]] = _decimal(rise, "the allowed rise")
    trained = app.root / "saes"
    selection = app.root / "selection.json"
    as_chosen = same_data and select == dict(own.select) and selection.exists()
    return dataclasses.replace(
        own, forget=forget or own.forget, retain=retain or own.retain,
        questions=questions or (own.questions if same_data else None),
        eval_texts=own.eval_texts if same_data else {},
        saes=str(trained) if (trained / "saes.json").exists() else own.saes,
        selection=str(selection) if as_chosen else None,
        select=select, method=method, settings=settings, seed=whole(seed, "the seed"), include_text=keep,
        heal=own.heal if method == own.method else None,
    )  # fmt: skip


def shown(job: Job) -> Markup:
    """Where the run is."""
    p = job.progress
    if job.status == "failed":
        return note(f"The run {job.name} failed: {job.error}", "error")
    if job.status == "cancelled":
        return note(f"The run {job.name} was cancelled: the same name and settings go on from where it was.", "info")
    if job.status == "done":
        return note(f"The Erasure {job.name} is made ({job.seconds:.0f} s): it is in the list of Compare.", "info")
    left = p.seconds_left()
    at = f"{p.done:,} of {p.total:,}" if p.total else (f"{p.done:,}" if p.done else "")
    figures = ", ".join(f"{k} {number(v)}" for k, v in p.figures.items())
    lines = [p.stage, at, f"about {left:.0f} s left" if left is not None else "", figures]
    past = join(Markup("<li>{}</li>").format(n) for n in p.notes)
    return Markup('<div class="job" role="status">{}<p>{}</p><ul class="soft">{}</ul></div>').format(
        bar(p.share(), p.stage), " · ".join(x for x in lines if x), past
    )


def _methods() -> list[tuple[str, str]]:
    """(label, name); methods of packages that do not load are left out (`saeunlearn methods` names them)."""
    from saeunlearn.methods import RECOMMENDED, get_method, known_methods

    out = []
    for name in known_methods():
        try:
            best = ", withstands relearning best" if name == RECOMMENDED else ""
            out.append((f"{name} ({get_method(name).kind}{best})", name))
        except SaeunlearnError:
            continue
    return out


def _known(name: str) -> Markup:
    """The settings of a method with their defaults. Raises ConfigError for an unknown one."""
    from saeunlearn.methods import get_method

    rows = []
    for f in dataclasses.fields(get_method(name).Config):
        known = f.default is not dataclasses.MISSING
        rows.append((f.name, f.type, f.default if known else "made anew for each run"))
    content = table(["setting", "kind", "default"], rows, label=f"settings of {name}")
    return fold(f"What {name} can be told", content)


def _lines(settings: dict[str, Any]) -> str:
    return "\n".join(f"{k}={_as_json(v)}" for k, v in settings.items() if k not in MAIN)


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _kept(upload: str | None) -> str | None:
    """An uploaded file moved to where it stays, named by its content."""
    if upload is None:
        return None
    from saeunlearn.sandbox.build import cache_dir

    source = Path(upload)
    if source.suffix.lower() not in TYPES:
        raise RunError(f"{source.name}: upload one of {', '.join(TYPES)}")
    content = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    kept = cache_dir() / "uploads" / content / source.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, kept)
    return str(kept)


def _decimal(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as e:
        raise ConfigError(f"{what} must be a number, not {text!r}") from e
