"""The explorer's page against its bars, and the pictures of docs/explorer.md.

    python benchmarks/explorer.py runs/demo                               # times
    python benchmarks/explorer.py runs/demo --screenshots docs/images     # pictures, on a copy of the run (minutes)

Times are of whole answers over HTTP on this machine. The first page is drawn in Chromium, which runs already; the time
before that is the process's own, from its start. The index and the model's files are in the caches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeunlearn_explorer.state import Explorer

from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus
from saeunlearn.documents import read_json
from saeunlearn.errors import ConfigError

VISITORS = 20
BARS = {"first page": 2.0, "a layer": 0.3, "a feature": 0.3, "a comparison": 2.0}
WIDTH, NARROW = 1280, 390


@contextmanager
def serving(*command: str) -> Iterator[tuple[str, float]]:
    """(URL, when it was started) of `python COMMAND PORT` in a process of its own, once it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command, str(port)], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read()
                break
            except OSError:
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/", started
    finally:
        process.terminate()
        process.wait()


def exploring(run: Path) -> Any:
    return serving("-m", "saeunlearn.cli", "explore", str(run), "--port")


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, url: str, width: int = WIDTH, theme: str = "light") -> Any:
    """A page with the overview on it."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{url}?__theme={theme}")
    page.wait_for_selector(".overview")
    return page


BARE = """
import sys
import gradio as gr
with gr.Blocks(analytics_enabled=False) as demo:
    gr.HTML("nothing")
demo.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), ssr_mode=False, quiet=True)
"""


def measured(run: Path) -> dict[str, Any]:
    """Seconds of everything that has a bar, and what else is worth knowing."""
    from gradio_client import Client

    found: dict[str, Any] = {}
    with serving("-c", BARE) as (_, started):
        found["an empty Gradio page served"] = time.perf_counter() - started
    with chromium() as browser, exploring(run) as (url, started):
        found["page served"] = time.perf_counter() - started
        page = opened(browser, url)
        found["first page"] = time.perf_counter() - started
        found["first page, beyond an empty Gradio page"] = found["first page"] - found["an empty Gradio page served"]
        page.wait_for_function("!document.querySelector('#status .opening')", timeout=900_000)
        found["everything opened"] = time.perf_counter() - started
        page.close()
        client = Client(url, verbose=False)
        layers, relevant, chosen = (read_json(run / "selection.json")[k] for k in ("layers", "relevant", "layer"))
        numbers = [r["layer"] for r in layers]
        found["a layer, with its way to the client"] = median(
            lambda i: client.predict(numbers[i % len(numbers)], {}, api_name="/layer"), 8
        )
        found["a feature, with its way to the client"] = median(
            lambda i: client.predict(chosen, str(relevant[i]), api_name="/feature"), len(relevant)
        )
        name = read_json(run / "run.json")["config"]["method"]
        prompts = questions(run)

        def compare(visitor: Client, i: int) -> Any:
            q = prompts[i % len(prompts)]
            return visitor.predict(q.question, "\n".join(q.choices), [name], 16, api_name="/compare")

        found["a comparison"] = median(lambda i: compare(client, i), 8)
        clients = [Client(url, verbose=False) for _ in range(VISITORS)]
        began = time.perf_counter()
        with ThreadPoolExecutor(VISITORS) as pool:
            said = list(pool.map(lambda i: compare(clients[i], i), range(VISITORS)))
        found[f"{VISITORS} visitors, the slowest comparison"] = time.perf_counter() - began
        found["visitors answered"] = sum(not trouble and "model" in content for trouble, content in said)
    return found | in_process(run)


def in_process(run: Path) -> dict[str, float]:
    """Seconds of the server's own part of a switch: computing and rendering, the model opened and nothing kept yet."""
    from saeunlearn_explorer.views import feature, layers

    from saeunlearn.explore.feature import feature_view, layer_view

    app = Explorer(run)
    opened_run, index = app.run(), app.index_when_ready()
    choice = read_json(run / "selection.json")

    def layer(i: int) -> Any:
        view = layer_view(opened_run, index, i)
        return "", layers.listing(view), layers.described(view)

    def one(i: int) -> Any:
        return "", feature.rendered(feature_view(opened_run, index, choice["layer"], choice["relevant"][i]))

    one(0)
    return {"a layer": median(layer, len(choice["layers"])), "a feature": median(one, len(choice["relevant"]))}


def median(do: Any, n: int) -> float:
    """Median seconds of do(0) … do(n − 1)."""
    times = []
    for i in range(n):
        began = time.perf_counter()
        trouble, *_ = do(i)
        if trouble:
            raise ConfigError(trouble)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def questions(run: Path) -> list[Any]:
    config = read_json(run / "run.json")["config"]
    found = [q for q in Corpus.load(config["questions"]) if q.meta.get("set") == "forget"]
    return found[:VISITORS]


# --- pictures ----------------------------------------------------------------------------------------------


def pictures(run: Path, out: Path) -> None:
    """explorer-*.png of every view, on a copy of the run that gets a second Erasure and a guard."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        copy = Path(folder) / "demo"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("erasures", "guards"))
        with exploring(copy) as (url, _):
            page = opened(browser, url)
            page.set_default_timeout(600_000)
            page.wait_for_function("!document.querySelector('#status .opening')")

            def shoot(name: str, of: Any = page) -> None:
                of.mouse.move(5, 5)
                of.wait_for_timeout(800)
                of.screenshot(path=out / f"explorer-{name}.png", clip=clip(of), full_page=True)
                print(out / f"explorer-{name}.png")

            tab(page, "Erase")
            page.locator("#erase-method input").click()
            page.get_by_role("option", name="rmu (weights)").click()
            page.wait_for_timeout(500)
            fill(page, "erase-rise", "0.02")
            fill(page, "erase-name", "rmu")
            page.locator("#erase-start").click()
            page.wait_for_selector("#erase-status [aria-valuenow]")
            page.wait_for_timeout(4000)
            shoot("erase")
            page.wait_for_selector("#compare .model >> nth=2")
            tab(page, "Layers")
            page.locator("#features [data-feature]").first.wait_for()
            shoot("layers")
            page.locator("#features [data-feature]").first.click()
            page.wait_for_selector("#feature .example")
            shoot("feature")
            page.locator("#feature-steer").click()
            page.wait_for_selector("#steer-run")
            page.wait_for_timeout(500)
            question = questions(run)[0]
            for i, feature in enumerate(read_json(run / "selection.json")["relevant"][:4]):
                fill(page, f"steer-feature-{i}", str(feature))
            page.locator("#steer-mode-0 input").click()
            page.get_by_role("option", name="clamp").click()
            page.wait_for_timeout(1500)
            page.locator("#steer-value-0 input[type=number]").fill("30")
            fill(page, "steer-prompt", question.question)
            page.locator("#steer-run").click()
            page.wait_for_selector("#steer .model >> nth=1")
            shoot("steer")
            fill(page, "steer-name", "quiet")
            page.locator("#steer-save").click()
            page.wait_for_selector("#steer :text('is saved in')")
            tab(page, "Compare")
            page.get_by_label("quiet").check()
            page.locator("#compare-run").click()
            page.wait_for_selector("#compare .model >> nth=3")
            page.locator("#compare summary:has-text('say next')").first.click()
            shoot("compare")
            light = opened(browser, url)
            light.wait_for_selector("img.picture >> nth=1")  # drawn after the words
            shoot("overview", light)
            dark = opened(browser, url, theme="dark")
            tab(dark, "Layers")
            dark.locator("#features [data-feature]").first.wait_for()
            shoot("dark", dark)
            narrow = opened(browser, url, NARROW)
            shoot("narrow", narrow)


def clip(page: Any, most: int = 2400) -> dict[str, float]:
    """The page from its top to where it ends, at most so many pixels."""
    size = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
    page.evaluate("window.scrollTo(0, 0)")
    return {"x": 0, "y": 0, "width": size[0], "height": min(size[1], most)}


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def fill(page: Any, name: str, value: str) -> None:
    page.locator(f"#{name} :is(input, textarea)").first.fill(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--screenshots", type=Path, help="write the pictures here instead of measuring")
    parser.add_argument("--out", type=Path, help="JSON file for the times")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.screenshots:
        pictures(args.run, args.screenshots)
        return
    found = measured(args.run)
    for name, value in found.items():
        bar = f"   bar {BARS[name]:g} s: {'met' if value < BARS[name] else 'MISSED'}" if name in BARS else ""
        print(f"{name:40} {value:8.3f}{bar}" if isinstance(value, float) else f"{name:40} {value}")
    if args.out:
        write_json(args.out, {"schema": 1, "run": args.run.name, "bars": BARS, "seconds": found})


if __name__ == "__main__":
    main()
