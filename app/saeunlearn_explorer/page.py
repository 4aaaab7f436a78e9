"""The page: one tab a view; and the server, which answers this machine alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing phones home

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import RunError

from .jobs import LiveProgress
from .links import panel
from .pieces import bar
from .state import Explorer, safely, whole
from .views import compare, erase, feature, layers, overview, steer

HERE = Path(__file__).parent
LOOPBACK = "127.0.0.1"
MAX_UPLOAD = "64mb"
VISITORS = 40  # handlers at work at once; the model itself serves one at a time


def make_page(app: Explorer) -> gr.Blocks:
    """All views of the run in tabs."""
    with gr.Blocks(title=f"saeunlearn: {app.root.name}", analytics_enabled=False, fill_width=True,
                   delete_cache=(3600, 86400)) as demo:  # fmt: skip
        with gr.Row(equal_height=True, elem_classes="head"):
            panel(_header(app))
            layer = gr.Dropdown(app.layers(), value=app.layer(), label="Layer", allow_custom_value=True,
                                elem_id="layer", min_width=120, scale=0)  # fmt: skip
        trouble, status, timer = panel(elem_id="trouble"), panel(elem_id="status"), gr.Timer(1.0)
        ready, chosen = gr.State(False), gr.State({})  # chosen: the guard that this visitor saved last
        with gr.Tabs(elem_id="views", overflow_behavior="wrap") as tabs:
            with gr.Tab("Overview", id="overview"):
                fill_overview, draw_overview = overview.build(app)
            with gr.Tab("Layers", id="layers"):
                opening, fill_layers = layers.build(app, layer, chosen)
            with gr.Tab("Feature", id="feature"):
                shown = feature.build(app, layer)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compared = compare.build(app)
            with gr.Tab("Steer", id="steer"):
                steered = steer.build(app, layer, shown.field, chosen)
            with gr.Tab("Erase", id="erase") as erase_tab:
                erasing = erase.build(app, demo)

        def look(before: bool) -> tuple[Any, ...]:
            """Where the opening is; the last look says that it has ended."""
            app.alive()
            going = app.opening()
            if going is None:
                return gr.Timer(active=False), "", True
            return gr.skip(), str(_progress(going)), before or app.indexed()

        def prepare(is_ready: bool) -> tuple[Any, ...]:
            if not is_ready:
                return gr.skip(), gr.skip(), gr.skip()
            offered = [label for label, _, _ in compare.example_prompts(app)]
            return (
                gr.Dropdown(choices=app.layers(), value=app.layer()),
                gr.Dropdown(choices=offered, value=None),
                refresh(),
            )

        def refresh() -> Any:
            return gr.CheckboxGroup(choices=app.names())

        def open_feature(layer: Any, event: gr.EventData) -> tuple[Any, ...]:
            data = event._data if isinstance(event._data, dict) else {}
            at, which = whole(data.get("layer", layer), "the layer"), whole(data.get("feature"), "the feature")
            return at, str(which), gr.Tabs(selected="feature"), shown.render(at, which)

        def land(said: str) -> list[Any]:
            """On Compare, with the Erasure just made beside that of the run, on a question of the forget set."""
            if not said:
                return [gr.skip()] * 6
            names, prompts = app.names(), compare.example_prompts(app)
            beside = [names[0], said.split()[0]]
            _, prompt, choices = next((p for p in prompts if p[0].startswith("forget")), prompts[0])
            answers = "\n".join(choices)
            return [gr.CheckboxGroup(choices=names, value=beside), prompt, answers, gr.Tabs(selected="compare"),
                    *compared.run[0](prompt, answers, beside, compare.LENGTH)]  # fmt: skip

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        looked = safely(look, 3), ready, [trouble, timer, status, ready]
        demo.load(*fill_overview, api_name="overview").then(*draw_overview, **quiet)
        gr.on([demo.load, timer.tick], *looked, **quiet)
        prepared = [trouble, layer, compared.offered, compared.names]
        ready.change(safely(prepare, 3), ready, prepared, **quiet).then(*fill_layers, **quiet)
        compare_tab.select(refresh, None, compared.names, **quiet)
        for part in (*opening, shown.content, compared.content, steered.content):
            part.select(safely(open_feature, 4), layer, [shown.message, layer, shown.field, tabs, shown.content],
                        show_progress="minimal", api_visibility="private")  # fmt: skip
        shown.steer.click(*steered.add, **quiet).then(lambda: gr.Tabs(selected="steer"), None, tabs, **quiet)
        erase_tab.select(*erasing.fill, **quiet)
        erasing.finished.change(land, erasing.finished, [compared.names, compared.prompt, compared.answers, tabs,
                                                  *compared.run[2]], api_visibility="private")  # fmt: skip
    return demo


def _progress(p: LiveProgress) -> Markup:
    at = f"{p.stage}: {p.done:,} of {p.total:,}" if p.total else p.stage
    return Markup('<div class="opening" role="status">{}<small class="soft">{}</small></div>').format(
        bar(p.share(), at), at
    )


def launch(app: Explorer, port: int | None = None, share: bool = False) -> gr.Blocks:
    """Serve the page on this machine's loopback address; with `share` also under a public link of gradio's.

    The server runs in a thread. Raises RunError where the port is taken.
    """
    demo = make_page(app)
    demo.queue(default_concurrency_limit=VISITORS, max_size=10 * VISITORS)
    try:
        demo.launch(
            server_name=LOOPBACK, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
            css_paths=[HERE / "explorer.css"], theme=_theme(), footer_links=[], run_history=False, ssr_mode=False,
            enable_monitoring=False, mcp_server=False, pwa=False, max_file_size=MAX_UPLOAD, max_threads=VISITORS,
            allowed_paths=[str(app.root / "report.html")], blocked_paths=[], show_error=True, strict_cors=True,
        )  # fmt: skip
    except OSError as e:
        raise RunError(f"the page cannot be served on port {port}: {e}") from e
    return demo


def explore(root: str | Path, port: int | None = None, share: bool = False) -> None:
    """Open a run directory and serve its page until it is interrupted. Raises RunError for what is no run."""
    app = Explorer(root)
    demo = launch(app, port, share)
    print(f"{app.root.name}: {demo.local_url} (Ctrl-C ends it)", flush=True)
    if demo.share_url:
        print(f"public, for whoever has the link: {demo.share_url}", flush=True)
    demo.block_thread()


def _header(app: Explorer) -> Markup:
    model = (app.info.get("model") or {}).get("name", "")
    return Markup(
        '<header class="top"><h1>saeunlearn explorer</h1><span class="soft">{} · {} · {}</span></header>'
    ).format(app.root.name, model, app.info["config"].get("method", ""))


def _theme() -> gr.themes.Base:
    fonts = [gr.themes.Font(n) for n in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")]
    mono = [gr.themes.Font(n) for n in ("ui-monospace", "Menlo", "Consolas", "monospace")]
    return gr.themes.Default(font=fonts, font_mono=mono, primary_hue="blue", text_size="sm", spacing_size="sm")
