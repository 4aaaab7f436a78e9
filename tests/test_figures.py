"""Figures: what they draw is read back from their artists; every figure survives empty and odd data."""

from __future__ import annotations

import base64
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from saeunlearn import figures
from saeunlearn.figures_attacks import kept_against_relearned, over_compute

ROWS = [
    {"layer": 2, "scores": {"auc": 0.71}, "probe": {"forget_rise": 2.0}, "chosen": True},
    {"layer": 0, "scores": {"auc": 0.65}, "probe": None, "chosen": False},
]


def row(group: str, metric: str, before: float, after: float, **more: Any) -> dict[str, Any]:
    return {"group": group, "metric": metric, "n": 10, "before": before, "after": after, **more}


def texts(fig: Any) -> str:
    """Every text of a drawn figure."""
    from matplotlib.text import Text

    fig.draw_without_rendering()
    return "\n".join(t.get_text() for t in fig.findobj(Text))


def test_layer_table_draws_every_score_by_layer_and_marks_the_chosen() -> None:
    fig = figures.layer_table(ROWS)
    auc, probe = fig.axes
    assert [round(b.get_height(), 3) for b in auc.patches] == [0.65, 0.71]
    assert [b.get_hatch() for b in auc.patches] == [None, "//"]
    assert [t.get_text() for t in auc.get_xticklabels()] == ["0", "2"]
    assert [b.get_height() for b in probe.patches] == [2.0]
    assert probe.get_ylabel() == "rise (nats per token)"
    assert "chosen layer" in texts(fig)
    assert "not measured" in texts(fig)


def test_layer_table_of_a_deep_model_thins_its_labels() -> None:
    rows = [{"layer": i, "scores": {"auc": i / 48}, "probe": None, "chosen": i == 20} for i in range(48)]
    ax = figures.layer_table(rows).axes[0]
    assert len(ax.patches) == 48
    assert [t.get_text() for t in ax.get_xticklabels()][:3] == ["0", "4", "8"]


def test_feature_scores_places_features_and_leaves_out_dead_ones() -> None:
    forget, retain = [4.0, 0.01, 0.0, 0.5, 0.0], [0.1, 0.2, 0.0, 0.5, 3.0]
    fig = figures.feature_scores(forget, retain, relevant=[0], irrelevant=[1])
    ax = fig.axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    other, irrelevant, relevant = (c.get_offsets() for c in ax.collections)
    np.testing.assert_allclose(relevant, [[0.1, 4.0]])
    np.testing.assert_allclose(irrelevant, [[0.2, 0.01]])
    assert len(other) == 2  # feature 2 never fires; feature 4 sits on the lower edge
    assert other[:, 1].min() < 0.01
    assert "relevant (1)" in texts(fig)


def test_training_curves_show_what_was_recorded() -> None:
    losses = [{"step": i, "loss": 3.0 - i / 10, "forget": 2.0, "retain": 1.0 - i / 10} for i in range(5)]
    fig = figures.training_curves(losses)
    assert len(fig.axes) == 1
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), [3.0, 2.9, 2.8, 2.7, 2.6])
    full = figures.training_curves([{**s, "p_rel_dh": 0.6, "p_irr_dh": 0.1, "retain_rise": 0.02} for s in losses])
    assert [ax.get_ylabel() for ax in full.axes] == ["loss", "‖PΔh‖ / ‖h‖", "rise of the loss (%)"]
    np.testing.assert_allclose(full.axes[2].lines[0].get_ydata(), 2.0)
    gated = figures.training_curves([{**s, "retain_rise": 0.02, "other_rise": 0.03} for s in losses])
    np.testing.assert_allclose([line.get_ydata()[0] for line in gated.axes[1].lines], [2.0, 3.0])
    wide = figures.training_curves([{"step": i, "loss": 10.0**-i} for i in range(4)])
    assert wide.axes[0].get_yscale() == "log"


def test_before_after_draws_intervals_and_the_chance_line() -> None:
    more = {"before_low": 0.8, "before_high": 1.0, "after_low": 0.2, "after_high": 0.4, "chance": 0.25}
    rows = [row("forget/seen", "multiple_choice", 0.9, 0.3, **more), row("retain", "nll", 1.5, 1.6)]
    fig = figures.before_after(rows)
    choice, loss = fig.axes
    drawn = [tuple(np.round(line.get_xdata(), 3)) for line in choice.lines]
    assert drawn == [(0.9, 0.3), (0.8, 1.0), (0.9,), (0.2, 0.4), (0.3,), (0.25, 0.25)]
    assert "chance 0.25" in choice.get_xlabel()
    assert "nats per token" in loss.get_xlabel()
    assert "forget/seen  (n = 10)" in texts(fig)


def test_frontier_joins_each_series_in_order_and_keeps_labels_apart() -> None:
    points: list[dict[str, Any]] = [
        {"label": f"K = {k}", "x": x, "y": y, "x_err": 0.02, "y_err": (0.03, 0.04), "series": "SSPU"}
        for k, x, y in ((16, 0.99, 0.37), (64, 0.97, 0.31), (32, 0.985, 0.32))
    ] + [{"label": "", "x": 0.8, "y": 0.27, "series": "RMU"}]
    fig = figures.frontier(points)
    ax = fig.axes[0]
    sspu, rmu = (c.lines[0] for c in ax.containers)
    np.testing.assert_allclose(sspu.get_xdata(orig=False), [0.97, 0.985, 0.99])
    assert sspu.get_marker() != rmu.get_marker()
    assert sspu.get_linestyle() != rmu.get_linestyle()
    fig.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_every_series_looks_different_without_its_line() -> None:
    fig = figures.frontier([{"label": "", "x": i / 20, "y": 0.5, "series": f"method {i}"} for i in range(18)])
    drawn = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in fig.axes[0].containers}
    assert len(drawn) == 18
    assert len({figures.series_looks(i) for i in range(49)}) == 49


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.layer_table([]),
        lambda: figures.feature_scores([0.0, 0.0], [0.0, 0.0], [], []),
        lambda: figures.training_curves([]),
        lambda: figures.training_curves([{"step": 0, "loss": math.nan}]),
        lambda: figures.before_after([]),
        lambda: figures.frontier([]),
    ],
)
def test_no_data_is_a_figure_too(draw: Any) -> None:
    assert figures.png_data_uri(draw()).startswith("data:image/png;base64,iVBOR")


def test_saving_leaves_global_state_alone(tmp_path: Path) -> None:
    before = settings()
    fig = figures.layer_table(ROWS)
    figures.save(fig, tmp_path / "new" / "layers.png")
    uri = figures.png_data_uri(fig)
    assert (tmp_path / "new" / "layers.png").read_bytes()[:4] == b"\x89PNG"
    assert base64.b64decode(uri.partition(",")[2])[:4] == b"\x89PNG"
    assert settings() == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def settings() -> dict[str, Any]:
    """matplotlib's global settings; the backend resolves itself when it is read."""
    return {k: v for k, v in matplotlib.rcParams.items() if k != "backend"}


def test_losses_over_steps_shows_mean_and_range() -> None:
    runs = {"a": [{"step": [0, 10], "forget": [1.0, 4.0], "retain": [1.0, 1.5]},
                  {"step": [0, 10], "forget": [3.0, 8.0], "retain": [1.0, 2.5]}],
            "b": [{"step": [0, 10], "forget": [2.0, 2.0], "retain": [1.0, 1.0]}]}  # fmt: skip
    fig = figures.losses_over_steps(runs)
    forget, retain = fig.axes
    assert [list(line.get_ydata()) for line in forget.lines] == [[2.0, 6.0], [2.0, 2.0]]
    assert [list(line.get_ydata()) for line in retain.lines] == [[1.0, 2.0], [1.0, 1.0]]
    shaded = forget.collections[0].get_paths()[0].vertices[:, 1]
    assert (shaded.min(), shaded.max()) == (1.0, 8.0)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b"]


def test_kept_against_relearned_shows_every_point_and_both_levels() -> None:
    points = [
        {"name": "a", "kept": 0.9, "relearned": 0.8, "edited": 0.3},
        {"name": "b", "kept": 1.0, "relearned": 0.31, "edited": 0.28},
        {"name": "a", "kept": 0.7, "relearned": 0.6, "edited": 0.25},
    ]
    (ax,) = kept_against_relearned(points, 0.27, 0.25).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert [list(lines[n].get_xdata()) for n in ("a", "b")] == [[0.9, 0.7], [1.0]]
    assert [list(lines[n].get_ydata()) for n in ("a", "b")] == [[0.8, 0.6], [0.31]]
    assert [lines[n].get_ydata()[0] for n in ("oracle, relearned", "chance")] == [0.27, 0.25]
    falls = [list(line.get_ydata()) for line in ax.lines if str(line.get_label()).startswith("_")]
    assert falls == [[0.3, 0.8], [0.25, 0.6], [0.28, 0.31]]


def test_many_variants_look_different() -> None:
    points = [{"name": f"v{chr(97 + i)}", "kept": 0.1 * (i % 10), "relearned": 0.5, "edited": 0.4, "compute": 0.1}
              for i in range(20)]  # fmt: skip
    for fig in (kept_against_relearned(points, 0.27, 0.25), over_compute(points, 0.27, 0.25)):
        own = [x for x in fig.axes[0].lines if str(x.get_label()).startswith("v")]
        assert len({(x.get_color(), x.get_marker()) for x in own}) == 20


def test_over_compute_joins_the_sizes_of_one_variant() -> None:
    points = [
        {"name": name, "compute": compute, "kept": 0.9, "relearned": relearned}
        for name, compute, relearned in (("take-200", 0.2, 0.4), ("take-50", 0.05, 0.6), ("other", 0.3, 0.9))
    ]
    left, right = over_compute(points, 0.27, 0.25).axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["take"].get_xdata().tolist() == [0.05, 0.2]
    assert lines["take"].get_ydata().tolist() == [0.6, 0.4]
    assert lines["oracle"].get_ydata().tolist() == [0.27]
    assert "compute" in left.get_xlabel()
    assert right.get_ylim() == (0, 1.03)
