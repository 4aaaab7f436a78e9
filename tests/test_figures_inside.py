"""Figures of features, subspaces, one Erasure and several methods: what they draw is read back from their artists."""

from __future__ import annotations

from typing import Any

import pytest
from test_figures import texts

from saeunlearn import figures_erasure, figures_features, figures_methods
from saeunlearn.figures import BLUE, FORGET


def view(feature: int = 7) -> dict[str, Any]:
    example = {"id": "a", "quantile": 1.0, "activation": 2.0, "tokens": [" one", " $two", "\n"],
               "activations": [0.0, 2.0, 1.0], "at": 1}  # fmt: skip
    return {
        "feature": feature, "layer": 3, "density": {"forget": 0.25, "near": 0.0},
        "histogram": {"forget": {"edges": [1.0, 2.0, 4.0], "counts": [3, 1]}, "near": {"edges": [], "counts": []}},
        "examples": {"forget": [example], "near": []},
        "promoted": [{"token": " up", "logit": 2.0}], "suppressed": [{"token": " down", "logit": -1.0}],
    }  # fmt: skip


def test_a_feature_has_its_activity_as_shares_and_its_words() -> None:
    fig = figures_features.feature(view())
    left, right = fig.axes
    assert left.patches[0].get_data().values.tolist() == pytest.approx([0.1875, 0.0625])  # of all positions
    assert [b.get_width() for b in right.patches] == [2.0, -1.0]
    said = texts(fig)
    assert "near: never active" in said
    assert "' down'" in said
    empty = {**view(), "histogram": {"near": {"edges": [], "counts": []}}, "promoted": [], "suppressed": []}
    texts(figures_features.feature(empty))


def test_contexts_shade_tokens_by_activation() -> None:
    fig = figures_features.contexts([view(), view(9)], each=1)
    (ax,) = fig.axes
    shades = [p.get_alpha() for p in ax.patches]
    assert shades == pytest.approx([1.0, 0.575] * 2)
    assert [p.get_width() for p in ax.patches] == [5, 1] * 2  # characters
    assert "feature 9 of layer 3" in texts(fig)
    assert "no feature" in texts(figures_features.contexts([]))


def test_geometry_draws_the_range_of_the_controls() -> None:
    drawn = {"random features": [[1.5, 0.5], [1.2, 0.8]], "random directions": [[1.1, 0.9]]}
    found = {"K": 2, "d": 8, "spectra": {"relevant": [[1.9, 0.1]], "irrelevant": [[1.0, 1.0]], **drawn},
             "angles": {"irrelevant features": [[10.0, 80.0]], **drawn}}  # fmt: skip
    left, right = figures_features.geometry(found).axes
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [[1.9, 0.1], [1.0, 1.0]]
    band = left.collections[0].get_paths()[0].vertices
    assert {round(float(y), 2) for y in band[:, 1]} == {1.2, 1.5, 0.5, 0.8}
    assert right.lines[0].get_ydata().tolist() == [10.0, 80.0]


def test_shares_of_variance_have_a_panel_a_text() -> None:
    rows = [{"layer": i, "text": t, "features": 0.4 + i / 10, "random features": [0.1, 0.2], "random directions":
             [0.05, 0.3]} for i in (0, 1) for t in ("forget", "near")]  # fmt: skip
    fig = figures_features.variance_shares(rows)
    assert [ax.get_title() for ax in fig.axes] == ["forget text", "near text"]
    assert fig.axes[0].lines[0].get_ydata().tolist() == [0.4, 0.5]
    heights = [round(b.get_height(), 3) for b in fig.axes[1].patches]
    assert heights == [0.1, 0.1, 0.25, 0.25]
    texts(figures_features.variance_shares([]))


def test_scores_along_layers_have_intervals() -> None:
    rows = [{"layer": i, "series": s, "value": v, "low": v - 0.1, "high": v + 0.2, "chance": 0.25}
            for i in (0, 2) for s, v in (("forget/seen", 0.3), ("near", 0.7))]  # fmt: skip
    fig = figures_features.scores_along(rows, "layer", "Title")
    (ax,) = fig.axes
    segments = [s.tolist() for c in ax.collections for s in c.get_segments()]
    assert [[round(y, 2) for _, y in s] for s in segments] == [[0.2, 0.5]] * 2 + [[0.6, 0.9]] * 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2"]
    assert ax.lines[0].get_color() == FORGET
    assert "chance" in texts(fig)
    texts(figures_features.scores_along([], "layer", "Title"))


def test_weights_by_feature_are_ranked_and_relevant_ones_marked() -> None:
    others, own, random = figures_erasure.weights_by_feature([0.5, 4.0, 0.0, 2.0], [3]).axes[0].lines
    assert others.get_ydata().tolist() == [4.0, 2.0, 0.5]  # 0 has no place on a logarithmic axis
    assert (own.get_xdata().tolist(), own.get_ydata().tolist()) == ([2], [2.0])
    assert random.get_ydata() == [1, 1]
    assert "no weights changed" in texts(figures_erasure.weights_by_feature([0.0], [0]))


def test_changes_of_the_stream_have_a_column_a_text() -> None:
    def part(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean / 2, "high": mean * 1.5}

    rows = [{"layer": i, "text": t, "n": 9, "total": part(0.1), "relevant": part(0.6), "irrelevant": part(0.1),
             "other": None if t == "near" else part(0.3)} for i in (0, 1) for t in ("forget", "near")]  # fmt: skip
    fig = figures_erasure.stream_changes(rows)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["forget text (n = 9)", "near text (n = 9)"]
    below = fig.axes[2]
    assert [line.get_ydata()[0] for line in below.lines if line.get_label().startswith("_")] == [0.6, 0.1, 0.3]
    assert "elsewhere" in texts(fig)
    texts(figures_erasure.stream_changes([]))


def prompt(probability: float) -> dict[str, Any]:
    cell = [{"token": " said", "probability": probability}]
    return {
        "tokens": ["<s>", " He"],
        "loss": [None, 1.5],
        "lens": [{"layer": i, "tokens": [cell, cell]} for i in (0, 1)],
    }


def test_the_lens_has_layers_upwards_and_losses_begin_at_the_second_token() -> None:
    models = {"original": prompt(0.9), "sspu": prompt(0.1)}
    fig = figures_erasure.lens(models)
    first = fig.axes[0]
    assert [t.get_text() for t in first.get_yticklabels()] == ["1", "0"]
    assert first.images[0].get_array().tolist() == [[0.9, 0.9]] * 2
    assert texts(fig).count("said") == 8
    (ax,) = figures_erasure.token_losses(models).axes
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines] == [([1], [1.5])] * 2


def test_scores_of_methods_show_every_run() -> None:
    rows = [{"method": m, "measure": "forget", "runs": [0.2, 0.4], "forget": True} for m in ("a", "b")]
    rows += [{"method": "a", "measure": "near", "runs": [0.9], "forget": False}]
    fig = figures_methods.scores(rows, {"forget": {"chance": 0.25}})
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["a", "b"]
    assert [line.get_xdata().tolist() for line in left.lines[:3]] == [[0.2, 0.4], [0.2, 0.4], [pytest.approx(0.3)]]
    assert {line.get_color() for line in right.lines} >= {BLUE}
    assert "chance" in texts(fig)
    texts(figures_methods.scores([]))


def test_recovered_shares_come_by_attack_and_method() -> None:
    def best(share: float | None) -> dict[str, Any]:
        return {"recovered": share, "recovered_low": 0.0, "recovered_high": 1.0}

    documents = {"a": {"attacks": [{"name": "none", "best": best(0.1)}, {"name": "int4", "best": best(0.2)},
                                   {"name": "lora", "best": best(0.9)}]},
                 "b": {"attacks": [{"name": "lora", "best": best(0.3)}, {"name": "lens", "best": best(0.9)},
                                   {"name": "int4", "best": best(None)}, {"name": "bypass", "skipped": "no"},
                                   {"name": "none", "best": best(0.0)}]}}  # fmt: skip
    fig = figures_methods.recovered(documents)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["no attack", "lora", "int4"]
    texts(fig)
    assert "no attack was carried out" in texts(figures_methods.recovered({"a": {"attacks": []}}))
