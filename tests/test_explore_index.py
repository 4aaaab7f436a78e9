"""The index against brute force, and what it refuses and survives."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from erasures import make
from explored import FORGET, LAYER, NEAR, TEXTS, dense, opened, saes
from guarded import random_sae
from micro import NoTraining, at_step
from test_tokens import new_token
from toys import topk_sae

from saeunlearn.corpus import Corpus, windows
from saeunlearn.errors import Cancelled, ConfigError, CorpusError, RunError, SAEMismatchError
from saeunlearn.explore import index as module
from saeunlearn.explore.index import AFTER, BEFORE, SAMPLE, Index, build_index, index_folder, run_index, tokenised
from saeunlearn.features.topk import Best, Hits
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

N = 3
CASES = [(LAYER, "forget"), (LAYER, "near"), (2, "forget"), (2, "near")]


@pytest.fixture(scope="module")
def lm(checkpoints: Any) -> LanguageModel:
    return LanguageModel.open(checkpoints("llama"), device="cpu")


@pytest.fixture(scope="module")
def folder(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "one"
    build_index(lm, saes(), TEXTS, out, Progress(), n=N)
    return out


def padded(z: torch.Tensor, at: int, feature: int) -> list[float]:
    places = range(at - BEFORE, at + AFTER + 1)
    return [float(z[i, feature]) if 0 <= i < len(z) else 0.0 for i in places]


@pytest.mark.parametrize(("layer", "text"), CASES)
def test_the_top_is_that_of_brute_force(lm: LanguageModel, folder: Path, layer: int, text: str) -> None:
    found, rows = Index.open(folder).at(text, layer), dense(lm, saes()[layer], layer, TEXTS[text])
    assert len({w.record for w, _ in rows}) < len(rows) or text == "near"
    shown = 0
    for feature in range(saes()[layer].cfg.d_sae):
        peaks: dict[int, float] = {}
        for w, z in rows:
            peaks[w.record] = max(peaks.get(w.record, 0.0), float(z[:, feature].max()))
        best = sorted((v for v in peaks.values() if v > 0), reverse=True)[:N]
        values, places = found.top["value"][:, feature], found.top["place"][:, :, feature].T.tolist()
        assert values[: len(best)].tolist() == pytest.approx(best, rel=1e-4)
        assert [p[0] >= 0 for p in places] == [True] * len(best) + [False] * (N - len(best))
        assert len({p[0] for p in places[: len(best)]}) == len(best)  # a record comes once
        for i, (record, window, at) in enumerate(places[: len(best)]):
            assert rows[window][0].record == record
            assert float(rows[window][1][at, feature]) == pytest.approx(float(values[i]), rel=1e-4)
            around = found.top["around"][i, feature].tolist()
            assert around == pytest.approx(padded(rows[window][1], at, feature), rel=1e-4, abs=1e-6)
        shown += len(best)
    assert shown > 50


@pytest.mark.parametrize(("layer", "text"), CASES)
def test_sums_and_histograms_are_numpys(lm: LanguageModel, folder: Path, layer: int, text: str) -> None:
    found = Index.open(folder).at(text, layer)
    z = torch.cat([z[1:] for _, z in dense(lm, saes()[layer], layer, TEXTS[text])]).numpy()
    assert found.stats.positions == len(z)
    assert found.mean.numpy() == pytest.approx(z.mean(0), rel=1e-4, abs=1e-6)
    assert found.stats.density.numpy() == pytest.approx((z > 0).mean(0), abs=1e-12)
    edges = np.linspace(-12, 20, 129)
    assert (module.LOWEST, module.BINS / module.PER_OCTAVE, found.histogram.shape[1]) == (-12, 32, 128)
    moved = 0
    for feature in np.flatnonzero((z > 0).any(0)):
        logs = np.log2(z[z[:, feature] > 0, feature])
        counts, _ = np.histogram(logs, edges)
        got = found.histogram[int(feature)].numpy()
        assert got.sum() == len(logs)
        moved += int(np.abs(got - counts).sum())  # rounding may move a value that lies on an edge
        value = float(np.median(z[z[:, feature] > 0, feature]))
        share = float((logs < np.log2(value)).mean())
        width = counts[np.clip(np.searchsorted(edges, np.log2(value)) - 1, 0, 127)] / len(logs)
        assert found.quantile(int(feature), value) == pytest.approx(share, abs=width + 1e-6)
    assert moved <= 2


def test_the_sample_is_of_active_positions(lm: LanguageModel, folder: Path) -> None:
    found, rows = Index.open(folder).at("forget", LAYER), dense(lm, saes()[LAYER], LAYER, FORGET)
    full = 0
    for feature in range(96):
        active = {(i, t) for i, (_, z) in enumerate(rows) for t in range(len(z)) if z[t, feature] > 0}
        places = [p for p in found.sample["place"][:, :, feature].T.tolist() if p[0] >= 0]
        assert len(places) == min(SAMPLE, len(active))
        assert len({(w, at) for _, w, at in places}) == len(places)
        assert {(w, at) for _, w, at in places} <= active
        for i, (_, w, at) in enumerate(places):
            assert float(found.sample["value"][i, feature]) == pytest.approx(float(rows[w][1][at, feature]), rel=1e-4)
        full += len(active) > SAMPLE
    assert full > 5


def test_random_keys_draw_uniformly() -> None:
    counts, m, total, n = torch.zeros(60), 100, 60, 12
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        best = Best(n, m, 0, 0, distinct=False, device=torch.device("cpu"))
        for start in range(0, total, 7):  # a stream of small batches
            size = min(7, total - start)
            at = torch.arange(start, start + size)
            p, feature = torch.ones(size, m).nonzero().unbind(1)
            h = Hits(torch.ones(size, m), p, feature, torch.zeros(size).long(), torch.stack([at, at, at]))
            best.update(h, torch.rand(len(p), generator=generator, dtype=torch.float64))
        counts += torch.bincount(best.place[2].flatten().long(), minlength=total)
    share, expected = counts / 800, n / total
    spread = (expected * (1 - expected) / 800) ** 0.5
    assert float(counts.sum()) == 800 * n
    assert float((share - expected).abs().max()) < 4.5 * spread


def test_batches_do_not_matter(
    lm: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ACTIVATIONS", 1)  # batches of 64 tokens
    monkeypatch.setattr(module, "CHUNK", 4)
    small = build_index(lm, saes(), TEXTS, tmp_path / "small", Progress(), n=N)
    for layer, text in CASES:
        a, b = small.at(text, layer), Index.open(folder).at(text, layer)
        assert torch.allclose(a.top["value"], b.top["value"], rtol=1e-4, atol=1e-3)
        assert torch.equal(a.top["place"] < 0, b.top["place"] < 0)
        same = (a.top["place"] == b.top["place"]).all(0)  # but for equal activations of equal beginnings
        assert float(same.double().mean()) > 0.8
        assert int((a.histogram - b.histogram).abs().sum()) <= 2
        assert torch.allclose(a.stats.sum_sq, b.stats.sum_sq, rtol=1e-4)


# --- disk --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_cancelled_build_goes_on(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    def cancel(progress: Progress) -> None:
        progress.cancelled = True

    with pytest.raises(Cancelled):
        build_index(lm, saes(), TEXTS, tmp_path, at_step("index of near", cancel, -1), n=N)
    with pytest.raises(RunError, match="not finished"):
        Index.open(tmp_path)
    stages: list[str] = []
    listening = Progress(lambda e: stages.append(e["what"]) if e["event"] == "start" else None)
    build_index(lm, saes(), TEXTS, tmp_path, listening, n=N)
    assert stages == ["index of near"]
    assert contents(tmp_path) == contents(folder)


def test_only_what_is_missing_is_made(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    build_index(lm, saes(), TEXTS, tmp_path, Progress(), n=N)
    whole = contents(tmp_path)
    (tmp_path / f"text-0-layer-{LAYER}.safetensors").unlink()
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    build_index(lm, saes(), TEXTS, tmp_path, Progress(), n=N)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert contents(tmp_path) == whole == contents(folder)  # one seed, one result


@pytest.mark.parametrize("what", ["model", "saes", "texts", "name", "settings", "seed"])
def test_a_foreign_index_is_refused(what: str, lm: LanguageModel, checkpoints: Any, folder: Path) -> None:
    model, found, texts, settings = lm, saes(), dict(TEXTS), {"n": N, "seed": 0}
    if what == "model":
        model = LanguageModel(lm.copy().model, lm.tokenizer, lm.name)
        with torch.no_grad():
            next(model.model.parameters()).mul_(2)
    elif what == "saes":
        found[2] = random_sae("jumprelu", 2)
        found[2].b_enc.data += 1
    elif what == "texts":
        texts["near"] = Corpus(NEAR.records[1:], "near")
    elif what == "name":
        texts = {"forget": FORGET, "far": NEAR}
    else:
        settings["n" if what == "settings" else "seed"] = 5
    with pytest.raises(RunError, match="made with another"):
        build_index(model, found, texts, folder, Progress(), **settings)
    if what not in ("settings", "seed"):
        with pytest.raises(RunError, match="made with another"):
            Index.open(folder).check(model, found, texts)
        assert index_folder(model, found, texts) != index_folder(lm, saes(), TEXTS)


def test_what_it_cannot_be_made_from(lm: LanguageModel, tmp_path: Path, folder: Path) -> None:
    for saes_, texts, n in (({}, TEXTS, 3), (saes(), {}, 3), (saes(), TEXTS, 0)):
        with pytest.raises(ConfigError, match="an index needs"):
            build_index(lm, saes_, texts, tmp_path, Progress(), n=n)
    with pytest.raises(SAEMismatchError):
        build_index(lm, {1: topk_sae(3)}, TEXTS, tmp_path, Progress())
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"index\.json"):
        Index.open(tmp_path)
    with pytest.raises(ConfigError, match="holds the layers"):
        Index.open(folder).at("forget", 3)
    with pytest.raises(ConfigError, match="holds the layers"):
        Index.open(folder).at("far", 1)


def test_a_damaged_index_is_refused(lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    build_index(lm, saes(), TEXTS, tmp_path, Progress(), n=N)
    file = tmp_path / f"text-0-layer-{LAYER}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match="damaged"):
        Index.open(tmp_path).at("forget", LAYER)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(RunError, match="damaged"):
        Index.open(tmp_path)
    (tmp_path / "index.json").write_text('{"schema": 99}')
    with pytest.raises(RunError, match="schema 99"):
        Index.open(tmp_path)


def test_it_holds_no_words_and_no_tokens(lm: LanguageModel, folder: Path) -> None:
    from safetensors import safe_open

    words = {w for s in SENTENCES for w in s.split() if len(w) > 3} - set(TEXTS)  # the texts' names
    for file in folder.iterdir():
        raw = file.read_bytes()
        assert not [w for w in words if w.encode() in raw or w.encode("utf-16-le") in raw]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                names = set(f.keys())
                places = {n: f.get_tensor(n) for n in names if n.endswith("place")}
            bests = {f"{b}.{n}" for b in ("top", "sample") for n in ("value", "place", "around")}
            assert names == {"sum_sq", "active", "centred_sum", "sums", "total", "histogram"} | bests
            for t in places.values():  # numbers of records and windows and positions: small, and no ids of tokens
                assert int(t[0].max()) < len(FORGET)
                assert int(t[1].max()) < 20


def test_memory_does_not_grow_with_the_text(lm: LanguageModel) -> None:
    sizes = []
    for k in (1, 6):
        running = module._Running(N, 96, torch.device("cpu"))
        corpus = Corpus(FORGET.records * k, "text")
        module._read_text(
            lm, {LAYER: topk_sae(LAYER)}, corpus, {LAYER: running}, 256, 0, Progress(), "x", nullcontext()
        )
        sizes.append(SimpleNamespace(bytes=sum(t.numel() for t in running.tensors().values()), n=running.stats))
    assert sizes[0].bytes == sizes[1].bytes
    assert sizes[1].n.positions == 6 * sizes[0].n.positions


def test_a_run_is_indexed_while_others_edit_its_model(
    folder: Path, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEUNLEARN_HOME", str(tmp_path))
    monkeypatch.setattr(module, "MAX_ACTIVATIONS", 1)
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    run, over = opened(lm, weights=make(lm), token=make(lm, [new_token(lm)])), threading.Event()

    def edit() -> None:
        while not over.is_set():
            for name in run.erasures:
                with run.edited(name):
                    time.sleep(0.001)
            time.sleep(0.001)

    thread = threading.Thread(target=edit)
    thread.start()
    try:
        index = run_index(run, Progress())
    finally:
        over.set()
        thread.join()
    assert index.folder.parent == tmp_path / "explorer"
    assert index.folder == index_folder(lm, run.saes, run.texts)
    for layer, text in CASES:
        a, b = index.at(text, layer).stats, Index.open(folder).at(text, layer).stats
        assert torch.allclose(a.sum_sq, b.sum_sq, rtol=1e-4)
    assert run_index(run, NoTraining()).folder == index.folder


def test_chunks_are_the_windows_of_the_whole(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    parts = list(tokenised(FORGET, lm))
    assert [n for _, n in parts] == [4, 4, 3]
    assert [w for items, _ in parts for w in items] == windows(FORGET, lm)


def test_a_chunk_without_a_word_is_passed_over(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    gpt2 = LanguageModel.open(checkpoints("gpt2"), device="cpu")  # no BOS: a text of one token has no window
    corpus = Corpus.of(["a", "b", *SENTENCES[:3]])
    assert [w for items, _ in tokenised(corpus, gpt2) for w in items] == windows(corpus, gpt2)
    with pytest.raises(CorpusError, match="longer than one token"):
        list(tokenised(Corpus.of(["a", "b", "c"]), gpt2))


def test_progress_counts_every_record_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "MAX_ACTIVATIONS", 1)
    monkeypatch.setattr(module, "CHUNK", 4)
    ends: list[tuple[str, int]] = []
    progress = Progress(lambda e: ends.append((e["what"], e["done"])) if e["event"] == "finish" else None)
    build_index(lm, saes(), TEXTS, tmp_path, progress, n=N)
    assert ends == [("index of forget", len(FORGET)), ("index of near", len(NEAR))]
