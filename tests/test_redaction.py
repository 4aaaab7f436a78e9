"""Without --include-text nothing of the forget set is in any file of a run, or in any line that a verb prints."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from micro import MARKER, QUESTION, SECRET, Finished, run_config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from saeunlearn import figures
from saeunlearn.cli import main
from saeunlearn.corpus import Corpus
from saeunlearn.sandbox.build import Sandbox


def secrets(micro: Sandbox, data: Path) -> set[str]:
    """The planted words, and texts, entities, notes and labels of the forget set and its questions."""
    config = run_config(micro, data)
    forget, questions = Corpus.load(config.forget), Corpus.load(str(config.questions))
    asked = [q for q in questions if q.meta.get("set") == "forget"]
    assert any(MARKER in r.text and SECRET in r.text for r in forget)
    assert any(MARKER in q.question and SECRET in q.answer for q in asked)
    labels = {f"{q.meta['topic']} × {q.meta['attribute']}" for q in asked}
    assert f"{MARKER} trade × {SECRET} use" in labels
    entities = {str(r.meta["entity"]) for r in forget if "entity" in r.meta}
    assert len(entities) > 3
    texts = {r.full_text for r in (*forget, *asked)} | {q.question for q in asked}
    notes = {str(r.meta["note"]) for r in forget if "note" in r.meta}
    every = {MARKER, SECRET, QUESTION} | labels | entities | texts | notes
    return {w for w in every if not any(part in w for part in every - {w})}  # what holds another is found with it


def faces(name: str, raw: bytes) -> Iterator[str]:
    """Everything that a file can be read as: bytes, unescaped text, and what PNG and safetensors carry along."""
    yield raw.decode("utf-8", "ignore")
    yield raw.decode("utf-16-le", "ignore")
    text = raw.decode("utf-8", "ignore")
    if name.endswith((".json", ".jsonl")):
        for document in [text] if name.endswith(".json") else text.splitlines():
            yield json.dumps(json.loads(document), ensure_ascii=False)  # \\u0041 is an A
    if name.endswith((".html", ".md")):
        yield html.unescape(re.sub(r"<[^>]*>", "", text))
        for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", text):
            yield from faces("figure.png", base64.b64decode(found))
    if name.endswith(".png"):
        image = Image.open(io.BytesIO(raw))
        image.load()
        yield json.dumps({str(k): str(v) for k, v in image.info.items()}, ensure_ascii=False)
    if name.endswith(".safetensors"):
        yield raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()


def leaks(root: Path, words: set[str]) -> list[str]:
    """Which of `words` are in which file or file name under `root`, whatever their case and spacing."""
    out = []
    for file in [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file()):
        said = " ".join([file.name, *faces(file.name, file.read_bytes())])
        out += [f"{file.relative_to(root)}: {w}" for w in said_in(said, words)]
    return out


def said_in(text: str, words: set[str]) -> list[str]:
    flat = re.sub(r"\s+", " ", text).casefold()
    return sorted(w for w in words if re.sub(r"\s+", " ", w).strip().casefold() in flat)


@pytest.fixture(scope="module")
def words(micro: Sandbox, micro_data: Path) -> set[str]:
    return secrets(micro, micro_data)


@pytest.mark.slow
def test_the_scan_finds_what_is_hidden(tmp_path: Path, words: set[str]) -> None:
    import torch
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", f"about {MARKER}", zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert MARKER.encode() not in (tmp_path / "a.png").read_bytes()  # it is compressed
    save_file({"w": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"note": SECRET})
    (tmp_path / "c.json").write_text(json.dumps("".join(f"\\u{ord(c):04x}" for c in MARKER)).replace("\\\\", "\\"))
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    (tmp_path / "d.html").write_text(f'<img src="data:image/png;base64,{encoded}">')
    (tmp_path / "e.html").write_text(f"{SECRET[:4]}<b>{SECRET[4:]}</b>")
    (tmp_path / "f.jsonl").write_text(json.dumps({"said": MARKER.upper()}) + "\n{}\n")
    (tmp_path / f"{SECRET}.txt").write_text("")
    assert [line.split(":")[0] for line in leaks(tmp_path, {MARKER, SECRET})] == [
        "a.png", "b.safetensors", "c.json", "d.html", "e.html", "f.jsonl", f"{SECRET}.txt",
    ]  # fmt: skip
    (tmp_path / "e.html").write_text("nothing")
    assert leaks(tmp_path / "e.html", words) == []


@pytest.mark.slow
def test_no_file_of_a_run_quotes_the_forget_set(finished: Finished, words: set[str]) -> None:
    files = [f for f in finished.root.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".jsonl", ".html", ".md", ".png", ".safetensors"}
    assert leaks(finished.root, words) == []
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                assert said_in(json.dumps(f.metadata() or {}), words) == []
    assert leaks(finished.killed, words) == []


@pytest.mark.slow
def test_no_verb_prints_or_writes_the_forget_set(
    finished: Finished,
    micro: Sandbox,
    micro_data: Path,
    words: set[str],
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Figures are slow to draw, and looked at above.
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "png")
    uri = "data:image/png;base64," + base64.b64encode(dot.getvalue()).decode()
    monkeypatch.setattr(figures, "png_data_uri", lambda _fig: uri)
    run = Path(shutil.copytree(finished.root, tmp_path / "run"))
    model, erasure, forget = str(micro.model), str(run / "erasure"), str(micro_data / "forget.jsonl")
    questions, retain, base = str(micro_data / "questions.jsonl"), str(micro_data / "retain.jsonl"), ["--device", "cpu"]
    verbs = [
        ["unlearn", "--model", model, "--forget", forget, "--retain", retain, "--questions", questions, *base, "--saes",
         str(run / "saes"), "--layer", "1", "--k", "2", "--set", "steps=2", "--set", "gated=false", "--set", "batch=4",
         "--out", str(tmp_path / "told")],
        ["report", str(run)],
        ["attack", str(run), *base, "--attacks", "none,int8,ablation,few-shot,paraphrase,prefill,keyword"],
        ["verify", str(run), *base, "--sample", "8", "--out", str(tmp_path / "checks.json")],
        ["verify", str(run), *base, "--sample", "0", "--forget", retain],  # a failed check says no more
        ["inspect", erasure],
        ["apply", erasure, model, str(tmp_path / "merged")],
        ["ledger", str(tmp_path / "merged")],
        ["revert", str(tmp_path / "merged"), str(tmp_path / "back")],
        ["export", erasure, str(tmp_path / "adapter"), "--base", model],
        ["evaluate", "--model", model, *base, "--questions", questions, "--text", f"forget={forget}",
         "--out", str(tmp_path / "alone.json")],
        ["evaluate", "--model", model, "--erasure", erasure, *base, "--questions", questions,
         "--out", str(tmp_path / "both.json")],
        ["diff", model, "--erasure", erasure, *base, "--saes", str(run / "saes"), "--text", f"forget={forget}",
         "--selection", str(run / "selection.json"), "--out", str(tmp_path / "diff")],
        ["select", "--model", model, "--forget", forget, "--retain", forget, "--saes", str(run / "saes"),
         "--out", str(tmp_path / "no")],  # an error about the data quotes none of it
    ]  # fmt: skip
    codes = []
    for argv in verbs:
        codes.append(main(argv))
        said = capfd.readouterr()
        assert said_in(said.out + said.err, words) == [], argv
        assert said.out + said.err
    assert codes == [0, 0, 0, 0, 1] + [0] * 8 + [1]
    merged = {tmp_path / "merged" / n for n in ("README.md", "saeunlearn")}
    for root in (
        run,
        *(tmp_path / n for n in ("told", "checks.json", "adapter", "alone.json", "both.json", "diff")),
        *merged,
    ):
        assert root.exists(), root
        assert [
            x for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file() for x in leaks(f, words)
        ] == []
    assert not (tmp_path / "back/README.md").exists()
    labels = {s["label"] for g in json.loads((tmp_path / "alone.json").read_text())["groups"].values()
              for m in g.values() for s in m["subgroups"]}  # fmt: skip
    assert labels
    assert all(re.fullmatch("[0-9a-f]{12}", label) for label in labels)


@pytest.mark.slow
def test_labels_are_shown_where_text_is_asked_for(micro: Sandbox, micro_data: Path, tmp_path: Path) -> None:
    questions = str(micro_data / "questions.jsonl")
    argv = ["evaluate", "--model", str(micro.model), "--device", "cpu", "--questions", questions, "--out",
            str(tmp_path / "e.json"), "--include-text"]  # fmt: skip
    assert main(argv) == 0
    assert f"{MARKER} trade × {SECRET} use" in (tmp_path / "e.json").read_text()
