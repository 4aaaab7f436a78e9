"""Views of layers and features against the models and SAEs themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from erasures import IDS, make
from explored import IRRELEVANT, LAYER, RELEVANT, TEXTS, dense, opened, saes
from guarded import guard
from toys import topk_sae

from saeunlearn.errors import ConfigError, RunError, SelectionError
from saeunlearn.explore.erased import add_erasure
from saeunlearn.explore.feature import feature_view, find_features, layer_view
from saeunlearn.explore.index import Index, build_index
from saeunlearn.explore.opened import OpenedRun
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress


@pytest.fixture(scope="module")
def run(checkpoints: Any) -> OpenedRun:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    return opened(lm, weights=make(lm), guard=make(lm, [guard(strength=8.0)]))


@pytest.fixture(scope="module")
def index(run: OpenedRun, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(run.model, run.saes, run.texts, tmp_path_factory.mktemp("index"), Progress(), n=4)


# --- from the stream to the vocabulary ---------------------------------------------------------------------


@torch.no_grad()
def test_the_last_stream_unembeds_to_the_logits(lm: LanguageModel) -> None:
    last = lm.n_layers - 1
    assert torch.allclose(lm.unembed(lm.capture(IDS, [last])[last]), lm.logits(IDS), atol=1e-5)


@torch.no_grad()
def test_directions_are_what_norm_and_head_make_of_a_small_step(lm: LanguageModel) -> None:
    """Through the norm itself: a direction that is added to a stream, measured at the norm's own scale."""
    rows = topk_sae().W_dec[:5]
    norm = lm.model.base_model.norm if hasattr(lm.model.base_model, "norm") else None
    for name in ("ln_f", "final_layer_norm"):
        norm = norm or getattr(lm.model.base_model, name, None)
    head = lm.model.get_output_embeddings()
    centred = rows - rows.mean(-1, keepdim=True) if lm.name in ("gpt2", "gpt_neox") else rows
    size = centred.pow(2).mean(-1, keepdim=True).sqrt()
    big = 1e4 * rows  # the norm's ε does not count beside it
    slow = size * (head(norm(big)) - head(norm(torch.zeros_like(rows))))
    assert torch.allclose(lm.direction_logits(rows), slow, atol=1e-4, rtol=1e-3)
    assert torch.allclose(lm.direction_logits(rows, [7, 3]), lm.direction_logits(rows)[:, [7, 3]], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_directions_are_those_of_transformer_lens(arch: str, checkpoints: Any) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    bridge = lm.transformer_lens()
    bridge.enable_compatibility_mode(fold_ln=True, center_writing_weights=True, center_unembed=False)
    rows = topk_sae().W_dec[:5]
    if arch == "gpt_neox":  # TransformerLens folds the centring into what writes to the stream
        rows = rows - rows.mean(-1, keepdim=True)
    assert torch.allclose(lm.direction_logits(rows), rows @ bridge.W_U, atol=1e-4)


def test_bfloat16(checkpoints: Any) -> None:
    wide = LanguageModel.open(checkpoints("gemma2"), device="cpu")
    lm = LanguageModel.open(checkpoints("gemma2"), device="cpu", dtype="bfloat16")
    rows = topk_sae().W_dec[:5]
    assert torch.allclose(lm.direction_logits(rows), wide.direction_logits(rows), atol=0.05, rtol=0.05)


# --- layers ------------------------------------------------------------------------------------------------


def test_a_layer_is_scored_as_the_selection_scores_it(run: OpenedRun, index: Index) -> None:
    from saeunlearn.corpus import windows
    from saeunlearn.features.scores import feature_stats

    view = layer_view(run, index, LAYER, chosen=[11])
    stats = {t: feature_stats(run.model, {LAYER: run.saes[LAYER]}, windows(c, run.model), Progress())[LAYER]
             for t, c in TEXTS.items()}  # fmt: skip
    live = view["features"]
    assert live == (stats["forget"].active + stats["near"].active).nonzero()[:, 0].tolist()
    assert view["forget"] == pytest.approx(stats["forget"].mean_square[live].tolist(), rel=1e-6)
    assert view["retain"] == pytest.approx(stats["near"].mean_square[live].tolist(), rel=1e-6)
    both = sum(s.positions for s in stats.values())
    expected = (stats["forget"].active + stats["near"].active)[live] / both
    assert view["density"] == pytest.approx(expected.tolist())
    marks = dict(zip(live, view["marks"]))
    wanted = {**dict.fromkeys(IRRELEVANT, "irrelevant"), **dict.fromkeys(RELEVANT, "relevant"), 11: "chosen"}
    assert {j: m for j, m in marks.items() if m} == {j: m for j, m in wanted.items() if j in marks}
    assert view["texts"]["forget"]["fvu"] == pytest.approx(stats["forget"].fvu)
    json.dumps(view, allow_nan=False)
    assert "chosen" not in layer_view(run, index, LAYER)["marks"]  # one visitor's choice is not another's
    assert set(layer_view(run, index, 2)["marks"]) == {""}
    with pytest.raises(ConfigError, match="holds the layers"):
        layer_view(run, index, 3)


def test_a_feature_is_named_by_its_strongest_tokens(run: OpenedRun, index: Index) -> None:
    view = layer_view(run, index, LAYER)
    rows = [r for c in TEXTS.values() for r in dense(run.model, saes()[LAYER], LAYER, c)]
    for feature, tokens in zip(view["features"], view["tokens"]):
        w, z = max(rows, key=lambda r: float(r[1][:, feature].max()))
        assert 1 <= len(tokens) == len(set(tokens)) <= 5
        assert tokens[0] == run.model.tokenizer.decode([w.ids[int(z[:, feature].argmax())]])


# --- one feature -------------------------------------------------------------------------------------------


def test_a_feature(run: OpenedRun, index: Index) -> None:
    view = feature_view(run, index, LAYER, RELEVANT[0])
    json.dumps(view, allow_nan=False)
    assert view["mark"] == "relevant"
    at = layer_view(run, index, LAYER)["features"].index(RELEVANT[0])
    assert view["scores"]["forget"] == layer_view(run, index, LAYER)["forget"][at]
    for text, corpus in TEXTS.items():
        z = torch.cat([z[1:] for _, z in dense(run.model, saes()[LAYER], LAYER, corpus)])[:, RELEVANT[0]].numpy()
        assert view["mean"][text] == pytest.approx(z.mean(), rel=1e-4)
        assert view["density"][text] == pytest.approx((z > 0).mean())
        edges, counts = view["histogram"][text]["edges"], view["histogram"][text]["counts"]
        if not (z > 0).any():
            assert edges == counts == []
            continue
        assert counts[0] > 0
        assert counts[-1] > 0
        assert counts == np.histogram(z[z > 0], np.array(edges))[0].tolist()
        assert sum(counts) == (z > 0).sum()


def test_examples_quote_the_record_and_point_at_the_token(run: OpenedRun, index: Index) -> None:
    seen_bands = set()
    for feature in layer_view(run, index, LAYER)["features"][:20]:
        for text, rows in feature_view(run, index, LAYER, feature)["examples"].items():
            records = {r.id[:16]: r for r in TEXTS[text]}
            assert len({(e["id"], e["at"], e["activation"]) for e in rows}) == len(rows)
            top = [e for e in rows if e["quantile"] == 1.0]
            assert rows[: len(top)] == top
            assert [e["activation"] for e in top] == sorted((e["activation"] for e in top), reverse=True)
            for e in rows:
                assert len(e["tokens"]) == len(e["activations"]) <= 16
                assert e["activations"][e["at"]] == e["activation"] > 0
                assert "".join(e["tokens"]).replace("<s>", "") in records[e["id"]].text
                assert 0 <= e["quantile"] <= 1
                seen_bands.add(min(3, int(e["quantile"] * 4)))
            rest = [min(3, int(e["quantile"] * 4)) for e in rows[len(top) :]]
            assert rest == sorted(rest, reverse=True)
    assert seen_bands == {0, 1, 2, 3}


def test_words_and_neighbours_of_a_feature(run: OpenedRun, index: Index) -> None:
    view = feature_view(run, index, LAYER, 9)
    rows = saes()[LAYER].W_dec
    lm = run.model
    logits = (rows[9] * lm.model.model.norm.weight.detach()) @ lm.model.lm_head.weight.detach().T
    order = logits.argsort(descending=True).tolist()
    decode = lm.tokenizer.decode
    assert [w["token"] for w in view["promoted"]] == [decode([i]) for i in order[:10]]
    assert [w["token"] for w in view["suppressed"]] == [decode([i]) for i in order[::-1][:10]]
    assert view["promoted"][0]["logit"] == pytest.approx(float(logits.max()), rel=1e-4)
    cosines = torch.nn.functional.cosine_similarity(rows, rows[9][None])
    nearest = [j for j in cosines.argsort(descending=True).tolist() if j != 9][:8]
    assert [n["feature"] for n in view["nearest"]] == nearest
    assert view["nearest"][0]["cosine"] == pytest.approx(float(cosines[nearest[0]]), rel=1e-5)
    assert view["mark"] == ""


def test_dead_and_absent_features(run: OpenedRun, index: Index) -> None:
    live = set(layer_view(run, index, LAYER)["features"])
    dead = next(iter(set(range(96)) - live), None)
    if dead is not None:
        view = feature_view(run, index, LAYER, dead)
        assert view["examples"] == {"forget": [], "near": []}
        assert view["histogram"]["forget"] == {"edges": [], "counts": []}
    for feature in (-1, 96):
        with pytest.raises(ConfigError, match="features 0 … 95"):
            feature_view(run, index, LAYER, feature)
    with pytest.raises(SelectionError, match="has SAEs for"):
        feature_view(run, index, 0, 1)


def test_search_by_number_and_word(run: OpenedRun, index: Index) -> None:
    assert find_features(run, index, " 7 ", LAYER) == [{"feature": 7, "by": "number", "value": None}]
    assert find_features(run, index, "96", LAYER) == []
    assert find_features(run, index, "  ", LAYER) == []
    columns = layer_view(run, index, LAYER)
    word = columns["tokens"][3][0]
    found = find_features(run, index, word, LAYER)
    active = [r["feature"] for r in found if r["by"] == "active on"]
    said = {
        j
        for j, t in zip(columns["features"], columns["tokens"])
        if any(word.strip().casefold() in x.casefold() for x in t)
    }
    assert columns["features"][3] in active
    assert set(active) <= said
    assert len(active) == min(20, len(said))
    (token,) = run.encode(word)
    logits = run.model.direction_logits(saes()[LAYER].W_dec)[:, token]
    promotes = [r for r in found if r["by"] == "promotes" and r["value"] == pytest.approx(float(logits.max()))]
    assert promotes[0]["feature"] == int(logits.argmax())


# --- under an Erasure --------------------------------------------------------------------------------------


def test_what_an_erasure_does_to_a_feature(run: OpenedRun, index: Index) -> None:
    assert feature_view(run, index, 2, 4)["erasures"] == {}
    for name in ("weights", "guard"):
        add_erasure(run, index, name, Progress())
    assert run.model.lineage == []
    for feature in (4, 17):
        got = feature_view(run, index, 2, feature)["erasures"]
        assert set(got) == {"weights", "guard"}
        for name, by_text in got.items():
            for text, change in by_text.items():
                for when, label in (("original", "before"), (name, "after")):
                    with run.edited(when) as model:
                        z = torch.cat([z[1:] for _, z in dense(model, saes()[2], 2, TEXTS[text])])[:, feature]
                    assert change[f"mean_{label}"] == pytest.approx(float(z.mean()), rel=1e-3, abs=1e-5)
                    assert change[f"rate_{label}"] == pytest.approx(float((z > 0).double().mean()), abs=1e-9)
    stages: list[str] = []
    add_erasure(run, index, "guard", Progress(lambda e: stages.append(e["event"])))
    assert stages == []  # kept
    with pytest.raises(ConfigError, match="no Erasure"):
        add_erasure(run, index, "original", Progress())


def test_a_damaged_measurement_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    run = opened(lm, weights=make(lm))
    index = build_index(lm, run.saes, run.texts, tmp_path, Progress(), n=2)
    add_erasure(run, index, "weights", Progress())
    file = next(tmp_path.glob("erasure-*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(RunError, match="damaged"):
        feature_view(run, index, LAYER, 0)
