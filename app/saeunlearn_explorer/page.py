"""The page: one tab a view; and the server, which answers this machine alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing phones home

import gradio as gr
from markupsafe import Markup

from saeunlearn.errors import RunError

from .state import Explorer
from .views import erase, overview

HERE = Path(__file__).parent
LOOPBACK = "127.0.0.1"
MAX_UPLOAD = "64mb"
VISITORS = 40  # handlers at work at once; the model itself serves one at a time


def make_page(app: Explorer) -> gr.Blocks:
    """All views of the run in tabs."""
    with gr.Blocks(title=f"saeunlearn: {app.root.name}", analytics_enabled=False, fill_width=True,
                   delete_cache=(3600, 86400)) as demo:  # fmt: skip
        gr.HTML(str(_header(app)))
        with gr.Tabs(elem_id="views") as tabs:
            with gr.Tab("Overview", id="overview"):
                overview.build(app, demo)
            with gr.Tab("Erase", id="erase"):
                finished = erase.build(app, demo)
    return demo


def launch(app: Explorer, port: int | None = None, share: bool = False, block: bool = True) -> gr.Blocks:
    """Serve the page on this machine's loopback address; with `share` also under a public link of gradio's.

    Raises RunError where the port is taken.
    """
    demo = make_page(app)
    demo.queue(default_concurrency_limit=VISITORS, max_size=10 * VISITORS)
    try:
        demo.launch(
            server_name=LOOPBACK, server_port=port, share=share, prevent_thread_lock=not block, quiet=not block,
            css_paths=[HERE / "explorer.css"], theme=_theme(), footer_links=[], run_history=False, ssr_mode=False,
            enable_monitoring=False, mcp_server=False, pwa=False, max_file_size=MAX_UPLOAD, max_threads=VISITORS,
            allowed_paths=[str(app.root / "report.html")], blocked_paths=[], show_error=True, strict_cors=True,
        )  # fmt: skip
    except OSError as e:
        raise RunError(f"the page cannot be served on port {port}: {e}") from e
    return demo


def explore(root: str | Path, port: int | None = None, share: bool = False) -> None:
    """Open a run directory and serve its page until it is interrupted. Raises RunError for what is no run."""
    launch(Explorer(root), port, share)


def _header(app: Explorer) -> Markup:
    model = (app.info.get("model") or {}).get("name", "")
    return Markup('<header class="top"><h1>saeunlearn explorer</h1><span class="soft">{} · {} · {}</span></header>').format(
        app.root.name, model, app.info["config"].get("method", "")
    )


def _theme() -> gr.themes.Base:
    fonts = [gr.themes.Font(n) for n in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")]
    mono = [gr.themes.Font(n) for n in ("ui-monospace", "Menlo", "Consolas", "monospace")]
    return gr.themes.Default(font=fonts, font_mono=mono, primary_hue="blue", text_size="sm", spacing_size="sm")
