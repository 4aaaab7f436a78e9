"""Selection of layer and features, and the gate, on a model that carries a topic in known dimensions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from toys import (
    DIGITS,
    FORGET,
    N_PLANTED,
    PLAIN,
    RETAIN,
    blind_sae,
    exact_sae,
    planted,
    planted_value,
    rotation,
    topk_sae,
)

from saeunlearn.corpus import windows
from saeunlearn.errors import ConfigError, NonFiniteError, SAEMismatchError, SelectionError
from saeunlearn.features.gate import RIDGE, Gate, fit_gates, logistic, telling, topic_votes
from saeunlearn.features.scores import choose_features, feature_stats
from saeunlearn.features.selection import (
    ProbeResult,
    SelectConfig,
    Selection,
    check_selection,
    default_k,
    select,
)
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

# The 96th percentile of the live features leaves exactly the planted ones as candidates.
CONFIG = SelectConfig(k=N_PLANTED, percentile=96.0)


@pytest.fixture
def model(llama: LanguageModel) -> LanguageModel:
    return planted(llama)


def run(model: LanguageModel, saes: dict[int, Any], config: SelectConfig = CONFIG, probe: Any = None) -> Selection:
    return select(model, saes, DIGITS, PLAIN, config, probe=probe, seed=0, progress=Progress())


@torch.no_grad()
def digit_values(lm: LanguageModel, layer: int) -> tuple[list[float], int]:
    """What the planted dimensions hold at each digit of the forget text, relative to the norm of the stream there,
    and the number of the text's positions."""
    values, positions = [], 0
    for w in windows(DIGITS, lm):
        norms = lm.capture(torch.tensor([list(w.ids)]), [layer])[layer][0].double().norm(dim=-1)
        tokens = [lm.tokenizer.decode([t]) for t in w.ids]
        values += [planted_value(int(t)) / float(n) for t, n in zip(tokens[1:], norms[1:]) if t.isdigit()]
        positions += len(tokens) - 1
    return values, positions


# --- layer and features ------------------------------------------------------------------------------------


def test_planted_features_are_found_with_the_scores_they_must_have(model: LanguageModel) -> None:
    got = run(model, {i: exact_sae(i) for i in range(4)})
    values, positions = digit_values(model, got.layer)
    p = len(values) / positions
    assert 0.1 < p < 0.5
    assert sorted(got.relevant) == list(range(N_PLANTED))
    assert not set(got.irrelevant) & set(got.relevant)
    assert (got.k, got.d_model) == (N_PLANTED, model.d_model)
    for j in got.relevant:
        assert math.isclose(got.forget_scores[j], sum(v * v for v in values) / positions, rel_tol=1e-5)
        assert got.retain_scores[j] == 0
    # Active at a share of the forget positions and nowhere else: p wins and 1 − p ties (on the half not fitted on).
    assert [row["layer"] for row in got.layers] == [0, 1, 2, 3]
    for row in got.layers:
        assert 0.5 + 0.1 / 2 < row["scores"]["auc"] < 0.5 + 0.5 / 2
        assert row["scores"]["gate_auc"] >= row["scores"]["auc"] - 0.02
        assert row["scores"]["specificity"] == 1.0
        assert row["scores"]["fvu"] < 1e-5
        # The opposite signs of the planted dimensions are dead, and only they are sure to be.
        assert row["scores"]["live"] <= 1 - N_PLANTED / 64
    assert [row["chosen"] for row in got.layers].count(True) == 1
    assert got.gate.open_forget > 0.8 * p
    assert got.gate.open_retain <= 0.05  # one of some thirty positions
    assert got.model_fingerprint == model.fingerprint()
    assert (got.forget_fingerprint, got.retain_fingerprint) == (DIGITS.fingerprint(), PLAIN.fingerprint())
    norm = feature_stats(model, {got.layer: exact_sae(got.layer)}, windows(PLAIN, model), Progress())
    assert math.isclose(got.retain_norm, norm[got.layer].mean_norm, rel_tol=1e-9)


def test_selection_is_the_same_every_time(model: LanguageModel) -> None:
    saes = {i: exact_sae(i, rotation(i)) for i in (1, 2)}
    config = dataclasses.replace(CONFIG, max_records=4)  # a sample of the records, hence a seed
    first, again = (run(model, saes, config).to_dict() for _ in range(2))
    assert first == again


def test_the_layer_whose_features_see_the_topic_wins(model: LanguageModel) -> None:
    saes = {i: exact_sae(i) if i == 2 else blind_sae(i) for i in range(4)}
    got = run(model, saes)
    aucs = {row["layer"]: row["scores"]["gate_auc"] for row in got.layers}
    assert got.layer == 2
    assert all(aucs[2] > aucs[i] + 0.01 for i in (0, 1, 3))
    assert [row["layer"] for row in got.layers if row["chosen"]] == [2]


@pytest.mark.parametrize(("shortlist", "visited"), [(1, 1), (2, 2), (9, 4)])
def test_probes_run_on_the_shortlist_and_the_best_wins(model: LanguageModel, shortlist: int, visited: int) -> None:
    saes = {i: exact_sae(i) if i == 2 else blind_sae(i) for i in range(4)}
    seen: list[Selection] = []
    rises = {0: 0.4, 1: 0.9, 2: 0.5, 3: 0.1}

    def probe(candidate: Selection) -> ProbeResult:
        seen.append(candidate)
        return ProbeResult(candidate.layer, rises[candidate.layer], [(1.0, rises[candidate.layer], 0.01)])

    got = run(model, saes, dataclasses.replace(CONFIG, shortlist=shortlist), probe)
    by_auc = sorted(got.layers, key=lambda row: -row["scores"]["gate_auc"])
    expected = {row["layer"] for row in by_auc[:visited]}
    assert 2 in expected
    assert [c.layer for c in seen] == sorted(expected)
    assert got.layer == max(expected, key=lambda i: rises[i])
    for row in got.layers:
        if row["layer"] in expected:
            assert row["probe"]["forget_rise"] == rises[row["layer"]]
        else:
            assert row["probe"] is None
        assert row["chosen"] is (row["layer"] == got.layer)
    # What wins is the candidate that was probed, and each candidate is complete.
    (winner,) = [c for c in seen if c.layer == got.layer]
    assert dataclasses.replace(got, layers=[]) == winner
    for c in seen:
        check_selection(c, model, saes)


def test_a_fixed_layer_is_taken_without_probes(model: LanguageModel) -> None:
    def probe(_candidate: Selection) -> ProbeResult:
        raise AssertionError("nothing to decide")

    got = run(model, {i: exact_sae(i) for i in range(4)}, dataclasses.replace(CONFIG, layer=1), probe)
    assert [row["layer"] for row in got.layers if row["chosen"]] == [got.layer] == [1]
    assert sorted(got.gates) == [0, 1, 2, 3]  # all vote on the words of the topic
    assert run(model, {3: exact_sae(3)}, CONFIG, probe).layer == 3  # one SAE leaves nothing to decide either


def test_default_k_is_an_eighth_of_the_width() -> None:
    assert [default_k(d) for d in (4, 32, 128, 512, 4096)] == [1, 4, 16, 64, 64]


# --- errors ------------------------------------------------------------------------------------------------


def test_an_sae_of_another_model_is_refused(model: LanguageModel) -> None:
    random_decoder = exact_sae(1)
    random_decoder.W_dec.data = topk_sae(1, d_sae=64, seed=5).W_dec.data
    with pytest.raises(SAEMismatchError, match=r"layer 1 leaves .* unexplained"):
        run(model, {0: exact_sae(0), 1: random_decoder})
    with pytest.raises(SAEMismatchError, match=r"layer 1 was trained at blocks\.0"):
        run(model, {1: exact_sae(0)})
    with pytest.raises(SAEMismatchError, match=r"no SAE for layer 3; there are SAEs for \[0\]"):
        run(model, {0: exact_sae(0)}, dataclasses.replace(CONFIG, layer=3))
    with pytest.raises(SAEMismatchError, match="no SAEs"):
        run(model, {})
    broken = exact_sae(0)
    broken.b_dec.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        run(model, {0: broken})


def test_k_that_does_not_fit_is_refused(model: LanguageModel) -> None:
    with pytest.raises(SelectionError, match="K = 32 leaves no direction"):
        run(model, {0: exact_sae(0)}, SelectConfig(k=32))
    with pytest.raises(SelectionError, match="K = 8"):
        run(model, {0: exact_sae(0)}, SelectConfig(k=8, percentile=99))
    with pytest.raises(SelectionError, match="K = -1"):
        run(model, {0: exact_sae(0)}, SelectConfig(k=-1))


@pytest.mark.parametrize(
    "config",
    [
        SelectConfig(percentile=101),
        SelectConfig(percentile=float("nan")),
        SelectConfig(gate_percentile=-1),
        SelectConfig(shortlist=0),
        SelectConfig(max_records=0),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(model: LanguageModel, config: SelectConfig) -> None:
    ran: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    with pytest.raises(ConfigError):
        run(model, {0: exact_sae(0), 1: exact_sae(1)}, config, lambda c: ProbeResult(c.layer, 0.0, []))
    assert ran == []


def test_check_selection_refuses_what_does_not_belong(model: LanguageModel) -> None:
    got = run(model, {1: exact_sae(1)})
    assert torch.equal(check_selection(got, model, {1: exact_sae(1)}), exact_sae(1).W_dec)
    with pytest.raises(SelectionError, match=r"at layer 1, SAEs are given for \[2\]"):
        check_selection(got, model, {2: exact_sae(2)})
    with pytest.raises(SAEMismatchError, match="trained at"):
        check_selection(got, model, {1: exact_sae(2)})
    with pytest.raises(SAEMismatchError, match="reads 16"):
        check_selection(got, model, {1: topk_sae(1, d_in=16)})
    with pytest.raises(SelectionError, match="made on d = 16"):
        check_selection(dataclasses.replace(got, d_model=16), model, {1: exact_sae(1)})
    with pytest.raises(SelectionError, match="features up to 64"):
        check_selection(dataclasses.replace(got, irrelevant=[64]), model, {1: exact_sae(1)})


# --- JSON --------------------------------------------------------------------------------------------------


def test_json_round_trip(model: LanguageModel, tmp_path: Path) -> None:
    got = run(model, {0: exact_sae(0), 1: exact_sae(1)}, probe=lambda c: ProbeResult(c.layer, 0.1, [(0.5, 0.1, 0.0)]))
    got.save(tmp_path / "selection.json")
    back = Selection.load(tmp_path / "selection.json")
    assert dataclasses.replace(back, layers=[]) == dataclasses.replace(got, layers=[])
    assert isinstance(back.gate, Gate)
    assert back.to_dict() == json.loads(json.dumps(got.to_dict(), allow_nan=False))
    back.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "selection.json").read_bytes()
    assert not any(r.text[:20] in (tmp_path / "selection.json").read_text() for r in DIGITS)


def test_foreign_and_damaged_files_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "selection.json"
    good = json.loads(json.dumps(run(model, {1: exact_sae(1)}).to_dict()))
    whole = json.dumps(good)
    foreign: list[Any] = [
        [], None, 3, {}, {"schema": 2}, {"schema": 1}, {**good, "schema": 1}, {**good, "stranger": 1},
        {k: v for k, v in good.items() if k != "relevant"}, {**good, "gate": 3}, {**good, "gate": {"features": [1]}},
        {**good, "other_gates": {"1": 3}},
    ]  # fmt: skip
    for text in [json.dumps(f) for f in foreign] + [whole[: len(whole) // 2], "", "\x00"]:
        file.write_text(text)
        with pytest.raises(SelectionError, match=r"selection\.json"):
            Selection.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SelectionError):
        Selection.load(file)
    with pytest.raises(SelectionError):
        Selection.load(tmp_path / "missing.json")
    file.write_text(whole)
    assert Selection.load(file).layer == 1


# --- the gate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [80.0, 99.0])
def test_gate_is_calibrated_on_positions_it_was_not_fitted_on(lm: LanguageModel, percentile: float) -> None:
    sae = topk_sae(2, k=16)
    f, r = windows(FORGET, lm), windows(RETAIN, lm)
    f_stats, r_stats = (feature_stats(lm, {2: sae}, items, Progress()) for items in (f, r))
    choice = choose_features(f_stats[2], r_stats[2], 4, 50)
    fitted = fit_gates(lm, {2: sae}, {2: choice}, f, r, f_stats, r_stats, percentile, Progress())[2]
    gate = fitted.gate
    assert set(choice.relevant) <= set(gate.features)
    assert len(gate.features) == len(gate.weights) == len(set(gate.features))
    assert gate.open_retain <= 1 - percentile / 100 + 0.02
    assert 0.0 <= gate.open_forget <= 1.0
    assert 0.0 <= fitted.relevant_auc <= 1.0


def test_logistic_agrees_with_a_slow_reference() -> None:
    g = torch.Generator().manual_seed(0)
    positive = torch.rand(200, 3, generator=g) + torch.tensor([0.5, 0.0, 0.0])
    negative = torch.rand(300, 3, generator=g)
    got = logistic(positive, negative).double().numpy()
    x = torch.cat([positive, negative]).double()
    scale = x.pow(2).mean(0).sqrt()
    x = (x / scale).numpy()
    sign = np.array([1.0] * 200 + [-1.0] * 300)
    share = np.array([0.5 / 200] * 200 + [0.5 / 300] * 300)

    def objective(w: np.ndarray) -> float:
        return float((share * np.logaddexp(0, -sign * (x @ w[:3] + w[3]))).sum() + RIDGE * (w[:3] ** 2).sum())

    best = minimize(objective, np.zeros(4), method="BFGS").x[:3] / scale.numpy()
    np.testing.assert_allclose(got, best, rtol=0.02, atol=0.02 * abs(best).max())
    assert got[0] > 5 * abs(got[1:]).max()


def test_the_features_that_tell_the_sets_apart_are_read(model: LanguageModel) -> None:
    sae = exact_sae(1)
    f, r = (feature_stats(model, {1: sae}, windows(c, model), Progress())[1] for c in (DIGITS, PLAIN))
    assert set(range(N_PLANTED)) <= set(telling(f, r)[: 2 * N_PLANTED])
    live = int(((f.active + r.active) > 0).sum())
    assert len(telling(f, r)) == live


def test_open_is_activity_above_the_threshold() -> None:
    sae = exact_sae(0, d_in=4)
    gate = Gate(features=[0, 5], weights=[2.0, 4.0], threshold=2.0, open_forget=0.0, open_retain=0.0)
    # Feature 0 is +h₀ and feature 5 is −h₁: activity (2 max(h₀, 0) + 4 max(−h₁, 0)) / ‖h‖.
    h = torch.tensor([[[3.0, 0, 4, 0], [7, 0, 0, 0]], [[0, -6, 0, 8], [3, -4, 0, 0]]])
    expected = torch.tensor([[1.2, 2.0], [2.4, 4.4]])
    torch.testing.assert_close(gate.activity(sae, h), expected)
    assert gate.open(sae, h).tolist() == [[False, False], [True, True]]  # 2.0 is not above 2.0
    assert torch.equal(gate.open(sae, 100 * h), gate.open(sae, h))  # the size of the stream does not count
    assert torch.equal(gate.open(sae, h.bfloat16()), gate.open(sae, h.bfloat16().float()))


@torch.no_grad()
def test_topic_votes_are_the_share_of_open_gates(model: LanguageModel) -> None:
    saes = {i: exact_sae(i) for i in (0, 1, 2)}
    got = run(model, saes)
    items = windows(DIGITS, model)[:5]
    gates = {}
    for i, gate in got.gates.items():  # gates that are open at about half of the positions
        h = torch.cat([model.capture(torch.tensor([w.ids]), [i])[i][0, 1:] for w in items])
        gates[i] = dataclasses.replace(gate, threshold=float(gate.activity(saes[i], h).median()))
    votes = []
    for w in items:
        streams = model.capture(torch.tensor([w.ids]), [0, 1, 2])
        votes.append(
            [sum(bool(o) for o in v) for v in zip(*(gates[i].open(saes[i], streams[i])[0, 1:] for i in gates))]
        )
    assert {v for row in votes for v in row} >= {0, 3}
    got_votes = topic_votes(model, saes, gates, items)
    assert [[round(3 * v) for v in t.tolist()] for t in got_votes] == votes
    assert float(torch.cat(got_votes).max()) == 1.0
    alone = topic_votes(model, {1: saes[1]}, gates, items)  # SAEs of the other layers may be missing
    for w, t in zip(items, alone):
        h = model.capture(torch.tensor([w.ids]), [1])[1]
        assert t.tolist() == gates[1].open(saes[1], h)[0, 1:].tolist()
