"""One Erasure taken apart, against the models themselves; and what several runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from erasures import make
from explored import LAYER, RELEVANT, TEXTS, opened, selection
from guarded import guard

from saeunlearn.corpus import Corpus, Record, windows
from saeunlearn.erasure import WeightDelta
from saeunlearn.errors import ConfigError, RunError, SelectionError
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.explore.runs import kept_by, left_of, recovered_by, scores_of, worst_of
from saeunlearn.explore.steer import steering, steering_guard
from saeunlearn.explore.taken_apart import answers_by_layer, stream_changes, weight_changes
from saeunlearn.models import LanguageModel


def inside(lm: LanguageModel, rows: torch.Tensor) -> WeightDelta:
    """A change of the first block's writer along these directions alone."""
    (w,) = lm.writers([0])
    return WeightDelta(w.name, w.transposed, dense=rows.float().T @ torch.ones(len(rows), w.d_in) * 0.05)


@torch.no_grad()
def test_weights_are_split_by_feature(lm: LanguageModel) -> None:
    run = opened(lm)
    row = run.sae(LAYER).W_dec[[RELEVANT[0]]]
    run.erasures |= {"one": make(lm, [inside(lm, row)]), "any": make(lm), "guard": make(lm, [guard()])}
    one = weight_changes(run, "one")
    scale = next(w.post_scale for w in lm.writers([0]))
    if scale is None:
        assert one["by_feature"][RELEVANT[0]] == pytest.approx(D_MODEL, rel=1e-4)  # all of it
        assert [w["share"] for w in one["writers"] if w["block"] == 0 and "mlp" in w["name"]] == [pytest.approx(1)]
    assert max(range(len(one["by_feature"])), key=one["by_feature"].__getitem__) == RELEVANT[0]
    found = weight_changes(run, "any")["by_feature"]
    assert 0.5 < sum(found) / len(found) < 1.5  # of a random change a feature has as much as any direction
    assert set(weight_changes(run, "guard")["by_feature"]) == {0.0}
    with pytest.raises(ConfigError, match="no Erasure"):
        weight_changes(run, "none")


@torch.no_grad()
def test_changes_of_the_stream_are_pooled_over_records(llama: LanguageModel) -> None:
    run = opened(llama)
    run.erasures["one"] = make(llama)
    rows = stream_changes(run, "one", records=5)
    assert [(r["text"], r["layer"]) for r in rows] == [(t, i) for t in TEXTS for i in range(llama.n_layers)]
    u_rel = run.bases()[0]  # type: ignore[index]
    changed = whole = size = 0.0
    for w in windows(TEXTS["near"].sample(5, run.config.seed), llama):
        before, after = (_stream(run, n, w.ids) for n in ("original", "one"))
        delta = after - before
        changed += float((delta @ u_rel).pow(2).sum())
        whole += float(delta.pow(2).sum())
        size += float(before.pow(2).sum())
    (r,) = (r for r in rows if r["text"] == "near" and r["layer"] == LAYER)
    assert r["relevant"]["mean"] == pytest.approx(changed / whole, rel=1e-5)
    assert r["total"]["mean"] == pytest.approx(whole / size, rel=1e-5)
    assert r["relevant"]["low"] <= r["relevant"]["mean"] <= r["relevant"]["high"]
    assert sum(r[s]["mean"] for s in ("relevant", "irrelevant", "other")) == pytest.approx(1, abs=1e-6)
    run.erasures["none"] = make(llama, [inside(llama, torch.zeros(1, D_MODEL))])
    still = stream_changes(run, "none", records=2)
    assert {(r["relevant"], r["total"]["mean"]) for r in still} == {(None, 0.0)}


def _stream(run: Any, name: str, ids: Any) -> torch.Tensor:
    with run.edited(name) as model:
        return model.capture(torch.tensor([ids]), [LAYER])[LAYER][0, 1:].double()


def test_answers_by_layer_end_in_the_models_own(llama: LanguageModel) -> None:
    run = opened(llama)
    run.erasures["one"] = make(llama)
    asked = Corpus(tuple(Record(question=f"{q} keeps the old", answer="map", choices=("map", "mill", "violin"))
                         for q in ("Mara", "Tobin", "Elsa", "Quill")), "q")  # fmt: skip
    rows = answers_by_layer(run, ["original", "one"], asked)
    assert [(r["model"], r["layer"]) for r in rows] == [(m, i) for m in ("original", "one") for i in range(4)]
    assert rows[3]["mean"] == multiple_choice(llama, asked).mean
    assert all(r["low"] <= r["mean"] <= r["high"] and r["chance"] == pytest.approx(1 / 3) for r in rows)


def test_steering_ends_with_its_context(llama: LanguageModel) -> None:
    run = opened(llama)
    before = llama.generate(["Mara keeps"], 4)
    with steering(run, LAYER, {RELEVANT[0]: {"clamp": 50.0}}) as model:
        assert model is llama
        assert model.generate(["Mara keeps"], 4) != before
    assert llama.generate(["Mara keeps"], 4) == before
    assert steering_guard(run, LAYER, {RELEVANT[0]: {"scale": 0.0}}).runtime.spec["rules"] == [{"scale": 0.0}]


def test_without_a_selection_there_is_nothing_to_split_by(llama: LanguageModel) -> None:
    run = opened(llama)
    assert run.selection == selection(llama)
    run.selection = None
    with pytest.raises(SelectionError, match="no selection"):
        weight_changes(run, "original")


# --- several runs ------------------------------------------------------------------------------------------


def finished(folder: Path, *rows: tuple[str, str, float, float]) -> Path:
    folder.mkdir()
    table = [{"group": g, "metric": m, "before": b, "after": a, "chance": 0.25} for g, m, b, a in rows]
    (folder / "evaluation.json").write_text(json.dumps({"comparison": table}))
    return folder


def test_scores_of_runs_are_gathered_by_method(tmp_path: Path) -> None:
    choice = "multiple_choice"
    first = finished(tmp_path / "a", ("forget/seen", choice, 1.0, 0.2), ("forget/held_out", choice, 1.0, 0.4),
                     ("near/seen", choice, 0.8, 0.4), ("far/seen", choice, 1.0, 0.9))  # fmt: skip
    second = finished(tmp_path / "b", ("forget/seen", choice, 1.0, 0.3), ("forget/held_out", choice, 1.0, 0.5),
                      ("near/seen", choice, 0.8, 0.8), ("far/seen", choice, 1.0, 0.7))  # fmt: skip
    rows = scores_of({"m": [first, second], "n": [first]})
    assert [(r["method"], r["group"], r["runs"]) for r in rows][:2] == [
        ("m", "forget/seen", [0.2, 0.3]), ("m", "forget/held_out", [0.4, 0.5])]  # fmt: skip
    assert {m: pytest.approx(v) for m, v in left_of(rows, choice).items()} == {"m": [0.3, 0.4], "n": [0.3]}
    assert kept_by(rows, choice, "near", "far") == {"m": [0.5, 0.7], "n": [0.5]}
    assert kept_by(rows, choice, "far")["m"] == [0.9, 0.7]
    with pytest.raises(RunError, match="different groups"):
        scores_of({"m": [first, finished(tmp_path / "c", ("far/seen", choice, 1.0, 1.0))]})
    with pytest.raises(RunError, match="no evaluation there"):
        scores_of({"m": [tmp_path]})


def test_what_attacks_recover_is_read_from_their_document() -> None:
    def entry(name: str, kind: str, share: float | None) -> dict[str, Any]:
        return {"name": name, "kind": kind, "best": {"recovered": share}}

    document = {"attacks": [entry("int4", "quantisation", 0.1), entry("lens", "probing", None),
                            entry("a", "relearning", 0.4), entry("b", "relearning", 0.7),
                            {"name": "bypass", "kind": "bypass", "skipped": "no hook"}]}  # fmt: skip
    assert recovered_by(document, "int4") == [0.1]
    assert (recovered_by(document, "lens"), recovered_by(document, "bypass")) == (None, None)
    assert worst_of(document, "a", "b", "int4", "lens") == 0.7
    assert worst_of(document, "lens", "bypass") is None
