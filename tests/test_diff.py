"""Two checkpoints through the same SAEs: against a slow reference, closed forms, and scipy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, SENTENCES
from erasures import make
from scipy import stats
from sspu_runs import chosen
from toys import topk_sae

from saeunlearn import figures, figures_diff
from saeunlearn.corpus import Corpus, windows
from saeunlearn.errors import ConfigError, CorpusError, ModelError, SAEMismatchError, SelectionError
from saeunlearn.features import diff
from saeunlearn.features.diff import feature_diff, open_pair, weight_shares
from saeunlearn.features.subspace import orthonormal_basis
from saeunlearn.models import LanguageModel
from saeunlearn.terminal import diff_lines

NEAR = Corpus.of([*SENTENCES[:5], " ".join(SENTENCES[5:11]), "Mara."], "near")  # one record fills several windows
FAR = Corpus.of(SENTENCES[20:24], "far")
SAES = {1: topk_sae(1, k=4), 2: topk_sae(2, k=4, seed=1)}


def edited(lm: LanguageModel) -> LanguageModel:
    other = lm.copy()
    make(lm).apply(other)
    return other


def slow_means(lm: LanguageModel, layer: int, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(mean activation [record, m], firing rate [m]), one window at a time."""
    rows: dict[int, list[Any]] = {}
    for w in windows(corpus, lm):
        h = lm.capture(torch.tensor([w.ids]), [layer])[layer][0, 1:].detach()
        rows.setdefault(w.record, []).append(SAES[layer].encode(h).double().numpy())
    records = [np.concatenate(parts) for parts in rows.values()]
    return np.stack([r.mean(0) for r in records]), (np.concatenate(records) > 0).mean(0)


def benjamini_hochberg(p: list[float]) -> list[float]:
    order = sorted(range(len(p)), key=lambda i: p[i])
    q, smallest = [0.0] * len(p), 1.0
    for rank in range(len(p), 0, -1):
        smallest = min(smallest, p[order[rank - 1]] * len(p) / rank)
        q[order[rank - 1]] = smallest
    return q


def test_the_columns_are_those_of_a_slow_reference(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "CHUNK", 2)
    after = edited(llama)
    found = feature_diff(llama, after, SAES, {"near": NEAR, "far": FAR})
    assert len(windows(NEAR, llama)) > len(NEAR)
    every_p: list[float] = []
    every_q: list[float] = []
    for entry in found["layers"]:
        for name, corpus in (("near", NEAR), ("far", FAR)):
            t = entry["texts"][name]
            f = {k: np.asarray([np.nan if v is None else v for v in c], float) for k, c in t["features"].items()}
            (a, rate_a), (b, rate_b) = (slow_means(m, entry["layer"], corpus) for m in (llama, after))
            fires = np.flatnonzero((rate_a + rate_b) > 0)
            assert f["feature"].tolist() == fires.tolist()
            a, b = a[:, fires], b[:, fires]
            close = {"rtol": 1e-4, "atol": 1e-5}
            np.testing.assert_allclose(f["mean_before"], a.mean(0), **close)
            np.testing.assert_allclose(f["mean_after"], b.mean(0), **close)
            np.testing.assert_allclose(f["rate_before"], rate_a[fires], **close)
            np.testing.assert_allclose(f["rate_after"], rate_b[fires], **close)
            paired = stats.ttest_rel(b, a)
            interval = paired.confidence_interval(0.95)
            np.testing.assert_allclose(f["p"], paired.pvalue, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(f["low"], interval.low, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(f["high"], interval.high, rtol=1e-3, atol=1e-5)
            pooled = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)
            with np.errstate(divide="ignore"):
                d = (b - a).mean(0) / pooled
            d[~np.isfinite(d)] = np.nan  # no spread at all: None in the file
            np.testing.assert_allclose(f["d"], d, rtol=1e-3, atol=1e-5)
            every_p += t["features"]["p"]
            every_q += t["features"]["q"]
            sure = f["q"] < 0.05
            assert (t["lost"], t["gained"]) == (
                int((sure & (f["change"] < 0)).sum()),
                int((sure & (f["change"] > 0)).sum()),
            )
    assert found["tests"] == len(every_p)
    np.testing.assert_allclose(every_q, benjamini_hochberg(every_p), rtol=1e-4)
    assert sum(t["lost"] + t["gained"] for e in found["layers"] for t in e["texts"].values()) > 0
    assert found["weights"]["rank"] is None
    assert found["after"]["fingerprint"] == after.fingerprint() != found["before"]["fingerprint"]


def test_chunks_change_nothing(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    after = edited(llama)
    whole = feature_diff(llama, after, SAES, {"near": NEAR})["layers"][0]["texts"]["near"]["features"]
    monkeypatch.setattr(diff, "CHUNK", 1)
    parts = feature_diff(llama, after, SAES, {"near": NEAR})["layers"][0]["texts"]["near"]["features"]
    np.testing.assert_allclose(whole["mean_after"], parts["mean_after"], rtol=1e-4, atol=1e-6)


def test_equal_models_do_not_differ(llama: LanguageModel) -> None:
    found = feature_diff(llama, llama.copy(), SAES, {"near": NEAR}, selection=chosen(llama))
    for entry in found["layers"]:
        t = entry["texts"]["near"]
        assert (t["lost"], t["gained"]) == (0, 0)
        assert set(t["features"]["d"]) == {0.0}
        assert set(t["features"]["q"]) == {1.0}
        assert t["fvu_before"] == t["fvu_after"]
    assert {w["share"] for w in found["weights"]["writers"]} == {None}
    assert found["weights"]["elsewhere"] is None
    assert "no weights differ" in diff_lines(found)


# --- weights -----------------------------------------------------------------------------------------------

K = 5
RELEVANT = [3, 11, 40, 41, 70]


def with_change(lm: LanguageModel, rows: torch.Tensor) -> LanguageModel:
    """A copy whose writers changed by `rows.T` times something, as the stream sees it."""
    other = lm.copy()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for w in other.writers(range(lm.n_layers), ("mlp", "attn")):
            delta = rows.T.float() @ torch.randn(len(rows), w.d_in, generator=g)
            if w.post_scale is not None:
                delta = delta / w.post_scale[:, None]
            w.weight.add_(delta.T if w.transposed else delta)
    return other


def test_a_change_inside_the_span_has_share_1_and_one_outside_0(lm: LanguageModel) -> None:
    w_dec = SAES[1].W_dec
    u = orthonormal_basis(w_dec[RELEVANT])
    off = torch.linalg.svd(u, full_matrices=True)[0][:, K:].T  # an orthonormal basis of the complement
    for rows, share in ((w_dec[RELEVANT], 1.0), (off, 0.0), (torch.cat([u.T, off]), None)):
        found = weight_shares(lm, with_change(lm, rows), w_dec, RELEVANT, 0)
        assert (found["rank"], found["expected"]) == (K, K / D_MODEL)
        assert len(found["writers"]) == 2 * lm.n_layers
        for w in found["writers"]:
            if share is not None:
                assert w["share"] == pytest.approx(share, abs=1e-5)
            assert len(w["random"]) == diff.CONTROLS
        assert found["elsewhere"] == pytest.approx(0, abs=1e-9)
        if share is None:  # a change in all directions alike: K/d for the named and for random ones
            means = [np.mean([w["share"] for w in found["writers"]]), np.mean([w["random"] for w in found["writers"]])]
            assert means == pytest.approx([K / D_MODEL] * 2, rel=0.15)


def test_controls_are_seeded_and_leave_the_named_out(llama: LanguageModel) -> None:
    after, w_dec = edited(llama), SAES[1].W_dec
    first, again, other = (weight_shares(llama, after, w_dec, RELEVANT, s)["writers"][0]["random"] for s in (0, 0, 1))
    assert first == again != other
    basis = torch.eye(D_MODEL)[: K + 1]  # only one feature is left, and it points elsewhere
    found = weight_shares(llama, with_change(llama, basis[:K]), basis, list(range(K)), 0)
    assert all(w["share"] == pytest.approx(1, abs=1e-5) and max(w["random"]) < 1e-9 for w in found["writers"])


def test_a_change_elsewhere_is_said(llama: LanguageModel) -> None:
    other = llama.copy()
    with torch.no_grad():
        other.model.get_input_embeddings().weight[3] += 1.0
    found = weight_shares(llama, other, SAES[1].W_dec, RELEVANT, 0)
    assert found["elsewhere"] == 1.0
    assert {w["share"] for w in found["writers"]} == {None}


# --- input and output --------------------------------------------------------------------------------------


def test_bad_input_is_refused(llama: LanguageModel, checkpoints: Any, tmp_path: Path) -> None:
    gpt2 = LanguageModel.open(checkpoints("gpt2"), device="cpu")
    with pytest.raises(ModelError, match="different architectures"):
        feature_diff(llama, gpt2, SAES, {"near": NEAR})
    other = llama.copy()
    other.tokenizer = gpt2.tokenizer
    with pytest.raises(ModelError, match="different vocabularies"):
        feature_diff(llama, other, SAES, {"near": NEAR})
    with pytest.raises(CorpusError, match="near has one record"):
        feature_diff(llama, llama, SAES, {"near": Corpus.of(["one"])})
    with pytest.raises(SAEMismatchError):
        feature_diff(llama, llama, {0: SAES[1]}, {"near": NEAR})
    with pytest.raises(SelectionError):
        feature_diff(llama, llama, {1: SAES[1]}, {"near": NEAR}, selection=dataclasses.replace(chosen(llama), layer=0))
    for after, erasure in ((None, None), ("b", tmp_path)):
        with pytest.raises(ConfigError, match="either a second checkpoint or --erasure"):
            open_pair("a", after, erasure, "cpu", "auto")


def test_an_erasure_or_the_merged_folder_give_the_same(llama: LanguageModel, tmp_path: Path) -> None:
    assert llama.source is not None
    erasure, base = make(llama), str(llama.source)
    erasure.save(tmp_path / "erasure")
    erasure.merge(base, tmp_path / "merged")
    pairs = [open_pair(base, None, tmp_path / "erasure", "cpu", "auto"),
             open_pair(base, str(tmp_path / "merged"), None, "cpu", "auto")]  # fmt: skip
    found = [feature_diff(a, b, SAES, {"near": NEAR}, selection=chosen(llama)) for a, b in pairs]
    assert found[0]["layers"] == found[1]["layers"]
    assert found[0]["weights"] == found[1]["weights"]
    text = diff_lines(found[0])
    for w in found[0]["weights"]["writers"]:
        assert (f"{w['name']}: " in text) == (w["share"] is not None)
    assert f"{found[0]['tests']} tests" in text
    t = found[0]["layers"][0]["texts"]["near"]
    assert f"{t['lost']:5d}  {t['gained']:6d}" in text


def test_figures_are_drawn(llama: LanguageModel, tmp_path: Path) -> None:
    found = feature_diff(llama, edited(llama), SAES, {"near": NEAR}, selection=chosen(llama))
    entry = found["layers"][0]
    fig = figures_diff.activity(entry, [entry["texts"]["near"]["features"]["feature"][0]], 0.05)
    (ax,) = fig.axes
    counts = [entry["texts"]["near"][k] for k in ("gained", "lost")]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels[1:] == [f"gained ({counts[0]})", f"lost ({counts[1]})", "named (1)"]
    fig = figures_diff.weight_shares(found["weights"])
    assert len(fig.axes[0].get_yticklabels()) == 2  # the two writers that changed
    figures.save(fig, tmp_path / "w.png")
    assert not figures_diff.weight_shares({"writers": [], "expected": None}).axes
