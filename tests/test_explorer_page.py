"""The explorer's page in a real browser, on a run of the tiny sandbox; and many visitors at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import Server, Watched, chromium_or_skip, serving, watched_page
from micro import MARKER, SECRET

from saeunlearn.cli import main
from saeunlearn.erasure import Erasure

pytestmark = pytest.mark.slow

VIEWS = ("Overview", "Layers", "Feature", "Compare", "Steer", "Erase")
EVIL = "<img src=x onerror=alert(1)>{{value}}${1+1}"


@pytest.fixture(scope="module")
def server(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("explorer")
    run = folder / "run"
    shutil.copytree(finished.root, run)
    with serving(run, folder / "log.txt", SAEUNLEARN_HOME=str(folder / "home")) as s:
        yield s


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    where = chromium_or_skip()
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.fixture
def seen(browser: Any, server: Server) -> Iterator[Watched]:
    """A fresh visitor; the test fails for an error in the console or the log, and for a request to elsewhere."""
    with watched_page(browser, server) as w:
        w.page.wait_for_function("!document.querySelector('#status .opening')", timeout=60_000)
        yield w
        assert w.errors == []
        assert w.foreign == []
    log = server.log.read_text()
    assert "Traceback" not in log, log
    assert "FOREIGN" not in log, log


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} :is(input, textarea)").first


def test_a_feature_is_found_and_opened(seen: Watched) -> None:
    page = seen.page
    tab(page, "Layers")
    page.wait_for_selector("#features [data-feature]")
    drawn = page.evaluate("""() => { const c = document.querySelector("#scatter canvas"), d =
        c.getContext("2d").getImageData(0, 0, c.width, c.height).data; return d.some((v) => v > 0); }""")
    assert drawn
    first = page.locator("#features [data-feature]").first
    number = first.text_content()
    field(page, "search").fill(number)
    field(page, "search").press("Enter")
    page.wait_for_selector("#features :text('number')")
    first.focus()
    page.keyboard.press("Enter")  # by the keyboard alone
    page.wait_for_selector(f"#feature h2:has-text('feature {number}')")
    assert page.locator("#feature .example").count() > 0
    assert field(page, "feature-number").input_value() == number
    neighbour = page.locator("#feature [data-feature]").first
    wanted = neighbour.text_content()
    neighbour.click()
    page.wait_for_selector(f"#feature h2:has-text('feature {wanted}')")
    field(page, "feature-number").fill("1000000")
    page.locator("#feature-show").click()
    page.wait_for_selector("[role=alert]:has-text('features 0')")


def test_a_click_on_a_point_opens_its_feature(seen: Watched) -> None:
    page = seen.page
    tab(page, "Layers")
    page.wait_for_selector("#features [data-feature]")
    page.wait_for_timeout(300)
    box = page.locator("#scatter canvas").bounding_box()
    for y in range(int(box["height"] * 0.05), int(box["height"] * 0.9), 12):
        for x in range(70, int(box["width"]) - 20, 25):
            page.mouse.move(box["x"] + x, box["y"] + y)
            if page.locator("#scatter .tip").is_visible():
                break
        else:
            continue
        break
    said = page.locator("#scatter .tip").text_content()
    page.mouse.down()
    page.mouse.up()
    number = re.match(r"feature (\d+)", said).group(1)  # type: ignore[union-attr]
    page.wait_for_selector(f"#feature h2:has-text('feature {number}')")
    assert page.get_by_role("tab", name="Feature").get_attribute("aria-selected") == "true"
    assert field(page, "feature-number").input_value() == number


def test_a_prompt_is_compared(seen: Watched, finished: Any) -> None:
    page = seen.page
    tab(page, "Compare")
    question = next(q for q in finished.run.questions if q.meta["set"] == "forget")
    field(page, "compare-prompt").fill(question.question)
    field(page, "compare-answers").fill("\n".join(question.choices))
    page.locator("#compare-run").click()
    page.wait_for_selector("#compare .model >> nth=1")
    shares = [
        float(s.rstrip("%")) for s in re.findall(r"[\d.]+%", page.locator("#compare .answers").first.inner_text())
    ]
    assert len(shares) == len(question.choices)
    with Erasure.load(finished.run.erasure_dir).apply(finished.run.model):
        said = finished.run.model.generate([question.question], 16)[0]
    assert page.locator("#compare .generated").nth(1).text_content() == (said or "(nothing)")
    page.locator("#compare summary").last.click()
    assert page.locator("#compare .lens td").count() > 0
    field(page, "compare-prompt").fill(EVIL)
    page.locator("#compare-run").click()
    page.wait_for_selector("#compare .tokens:has-text('onerror')")
    assert page.locator("#compare img").count() == 0
    assert page.locator("#compare .tokens").first.text_content().endswith(EVIL)
    field(page, "compare-prompt").fill(" ")
    page.locator("#compare-run").click()
    page.wait_for_selector("[role=alert]:has-text('write a prompt')")


def test_a_guard_is_saved_and_opened_by_the_command_line(seen: Watched, server: Server, finished: Any,
                                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    page = seen.page
    tab(page, "Feature")
    field(page, "feature-number").fill("3")
    page.locator("#feature-show").click()
    page.wait_for_selector("#feature h2")
    page.locator("#feature-steer").click()
    page.wait_for_selector("#steer-run")
    page.wait_for_function("document.querySelector('#steer-feature-0 :is(input, textarea)').value == '3'")
    field(page, "steer-prompt").fill("The raw material of")
    page.locator("#steer-run").click()
    page.wait_for_selector("#steer .model >> nth=1")
    field(page, "steer-name").fill("quiet")
    page.locator("#steer-save").click()
    page.wait_for_selector("#steer :text('is saved in')")
    folder = server.run / "guards" / "quiet"
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "acts at inference" in capsys.readouterr().out
    config = finished.run.config
    assert main(["evaluate", "--model", config.model, "--erasure", str(folder), "--questions", config.questions]) == 0
    assert "multiple_choice" in capsys.readouterr().out.replace(" ", "_")
    page.locator("#steer-save").click()
    page.wait_for_selector("[role=alert]:has-text('already')")
    tab(page, "Compare")
    page.get_by_label("quiet").wait_for()


def test_an_erasure_is_made_to_its_end(seen: Watched, server: Server, tmp_path: Path) -> None:
    page = seen.page
    tab(page, "Erase")
    field(page, "erase-settings").fill("steps=many")
    page.locator("#erase-start").click()
    page.wait_for_selector("#erase-status [role=alert]:has-text('steps must be a whole number')")
    field(page, "erase-settings").fill("gated=false\ngamma=6.0\nalpha=1.0\nlr=0.5\nblocks=2\nsteps=4\nbatch=8\n"
                                       "max_length=16\ncheck_every=4")  # fmt: skip
    field(page, "erase-name").fill("second")
    page.locator("#erase-start").click()
    page.wait_for_selector(
        "#compare .model >> nth=2", timeout=90_000
    )  # it lands on Compare, with both beside the original
    assert [h.text_content() for h in page.locator("#compare .model h3").all()] == ["original", "sspu", "second"]
    made = server.run / "erasures" / "second"
    info = json.loads((made / "run.json").read_text())
    assert info["status"] == "done"
    assert info["config"]["settings"]["steps"] == 4
    assert Erasure.load(made / "erasure").manifest["config"]["steps"] == 4
    upload = tmp_path / "forget.exe"
    upload.write_text("MZ")
    tab(page, "Erase")
    page.locator("#erase-forget input[type=file]").set_input_files(str(upload))
    page.wait_for_selector("text=Invalid file type")
    again = page.context.new_page()  # the same visitor in another tab: the frontier has it, and it lands nowhere anew
    again.goto(server.url)
    again.wait_for_selector("#overview-pictures td:has-text('second')")
    again.wait_for_function(
        "[...document.querySelectorAll('#overview-pictures img')].every((i) => i.naturalWidth > 300)"
    )
    assert again.locator("#overview-pictures img.picture").count() == 2
    again.wait_for_timeout(1500)
    assert again.get_by_role("tab", name="Overview").get_attribute("aria-selected") == "true"


def test_views_at_390_pixels_and_in_the_dark(browser: Any, server: Server) -> None:
    with watched_page(browser, server, width=390, query="?__theme=dark") as w:
        page = w.page
        for name in VIEWS:
            tab(page, name)
            page.wait_for_timeout(200)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{name} is {wide} pixels wide"
        dark = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        assert max(map(int, re.findall(r"\d+", dark)[:3])) < 80
        assert w.errors == []
        assert w.foreign == []


def test_twenty_visitors_each_get_their_own_answer(server: Server) -> None:
    from gradio_client import Client

    def visit(i: int) -> tuple[str, str]:
        client = Client(server.url, verbose=False)
        return client.predict(f"Visitor number {i} asks", f"answer{i}", ["sspu"], 4, api_name="/compare")

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(visit, range(20)))
    for i, (trouble, content) in enumerate(found):
        assert trouble == ""
        words = "".join(re.findall(r'<span class="t[^>]*>(.*?)</span>', content.split("</section>")[0]))
        assert words.endswith(f"Visitor number {i} asks")
        assert re.findall(r"answer(\d+)<", content) == [str(i)] * 2


def test_files_of_the_machine_are_not_served(server: Server) -> None:
    import urllib.error
    import urllib.request

    def status(path: Path) -> int:
        try:
            return urllib.request.urlopen(f"{server.url}gradio_api/file={path}").status
        except urllib.error.HTTPError as e:
            return e.code

    assert status(server.run / "report.html") == 200
    assert status(server.run / "run.json") == 403
    assert status(Path("/etc/passwd")) == 403


def test_only_this_machine_and_only_small_files(server: Server) -> None:
    from gradio_client import Client

    port = int(server.url.rstrip("/").rpartition(":")[2])
    table = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [row[1] for row in table if row[3] == "0A" and row[1].endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    config = Client(server.url, verbose=False).config
    assert config["max_file_size"] == 64 * 2**20 or config["max_file_size"] == 64 * 10**6
    assert not config["analytics_enabled"]


def test_nothing_written_holds_the_forget_text(server: Server) -> None:
    """Neither the index, nor the guards and runs made on the page, nor what the server prints."""
    files = [f for root in (server.run, server.log.parent / "home") for f in root.rglob("*") if f.is_file()]
    assert any("explorer" in f.parts for f in files)
    for file in (*files, server.log):
        content = file.read_bytes()
        assert MARKER.encode() not in content, file
        assert SECRET.encode() not in content, file


def test_a_deleted_run_is_said_on_the_page(browser: Any, server: Server) -> None:
    with watched_page(browser, server) as w:
        tab(w.page, "Feature")
        (server.run / "run.json").rename(server.run / "run.gone")
        try:
            field(w.page, "feature-number").fill("3")
            w.page.locator("#feature-show").click()
            w.page.wait_for_selector("[role=alert]:has-text('holds no run')")
        finally:
            (server.run / "run.gone").rename(server.run / "run.json")
        assert w.errors == []
