"""A headless Chromium, and the explorer's server in a process of its own whose every connection is watched."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# The verb itself, in a process that says where it connects to.
SERVE = """
import socket, sys
connect = socket.socket.connect
def watched(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("FOREIGN", address, flush=True)
        raise OSError("no network in tests")
    return connect(self, address)
socket.socket.connect = watched
from saeunlearn.cli import main
sys.exit(main(sys.argv[1:]))
"""


def chromium_or_skip() -> str:
    """Where Chromium is. Skips without one, and fails under CI=true."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        with sync_playwright() as p:
            own = p.chromium.executable_path
        found = own if Path(own).exists() else None
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no Chromium: install chromium, or run `playwright install chromium`")
        pytest.skip("no Chromium: the explorer's page was not tested (install chromium)")
    return found


@dataclass
class Server:
    """A running explorer."""

    url: str
    run: Path
    log: Path
    seconds: float  # until it answered


@contextlib.contextmanager
def serving(run: Path, log: Path, **environment: str) -> Iterator[Server]:
    """`saeunlearn explore RUN` on a free port, ended with the context."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", SERVE, "explore", str(run), "--port", str(port)], stdout=out,
                                   stderr=subprocess.STDOUT, env={**os.environ, **environment})  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}/"
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < 120, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=10).read()
                break
            time.sleep(0.1)
        yield Server(url, run, log, time.monotonic() - started)
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Watched:
    """A page, what its console said, and which other hosts it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched_page(browser: Any, server: Server, width: int = 1280, query: str = "") -> Iterator[Watched]:
    """A page of its own session on the explorer; requests to other hosts are noted and stopped."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    seen = Watched(page)

    def route(r: Any) -> None:
        if r.request.url.startswith(server.url):
            r.continue_()
        else:
            seen.foreign.append(r.request.url)
            r.abort()

    context.route("**/*", route)
    page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: seen.errors.append(str(e)))
    page.on("dialog", lambda d: (seen.errors.append(f"a dialog: {d.message}"), d.dismiss()))
    page.goto(server.url + query)
    page.wait_for_selector(".overview")
    try:
        yield seen
    finally:
        context.close()
