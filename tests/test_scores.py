"""Feature statistics, AUC and the choice of features against slow references, closed forms and SciPy."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import FORGET, RETAIN, exact_sae, rotation, topk_sae

from saeunlearn import corpus
from saeunlearn.corpus import Window, windows
from saeunlearn.errors import NonFiniteError, SAEMismatchError, SelectionError
from saeunlearn.features import scores
from saeunlearn.features.scores import FeatureStats, auc, check_sae, choose_features, feature_stats
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress


@torch.no_grad()
def slow_stream(lm: LanguageModel, items: list[Window], layer: int) -> list[Tensor]:
    """The stream after block `layer` at every position but the first of each window, one window at a time."""
    out = []
    for w in items:
        hidden = lm.capture(torch.tensor([list(w.ids)]), [layer])[layer][0]
        out += [hidden[t].double() for t in range(1, len(w.ids))]
    return out


def slow_encode(sae: Any, h: Tensor) -> Tensor:
    """TopK by hand: ReLU of the k largest pre-activations of one position."""
    pre = (h - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    z = torch.zeros_like(pre)
    for j in sorted(range(len(pre)), key=lambda j: -float(pre[j]))[: sae.cfg.k]:
        z[j] = max(0.0, float(pre[j]))
    return z


def stats(mean_square: list[float], active: list[int] | None = None, positions: int = 10) -> FeatureStats:
    s = torch.tensor(mean_square, dtype=torch.float64)
    a = (s > 0).double() if active is None else torch.tensor(active, dtype=torch.float64)
    return FeatureStats(s * positions, a, positions, 0.0, 0.0, torch.zeros(3))


# --- statistics --------------------------------------------------------------------------------------------


def test_statistics_equal_a_loop_over_positions(lm: LanguageModel) -> None:
    items = windows(corpus.Corpus.of([r.text[: 20 + 3 * i] for i, r in enumerate(FORGET)]), lm)
    assert len({len(w.ids) for w in items}) > 3  # so that batches hold padding
    saes = {1: topk_sae(1), 2: topk_sae(2, seed=1)}
    got = feature_stats(lm, saes, items, Progress())
    for layer, sae in saes.items():
        hs = slow_stream(lm, items, layer)
        zs = [slow_encode(sae, h) for h in hs]
        s = got[layer]
        assert s.positions == len(hs) == sum(len(w.ids) - 1 for w in items)
        relative = sum((z / h.norm()) ** 2 for z, h in zip(zs, hs)) / len(hs)
        torch.testing.assert_close(s.mean_square, relative, atol=1e-9, rtol=1e-4)
        torch.testing.assert_close(s.density, sum((z > 0).double() for z in zs) / len(hs), atol=1e-12, rtol=0)
        assert 0 < float(s.density.sum()) <= sae.cfg.k
        assert math.isclose(s.mean_norm, float(sum(h.norm() for h in hs)) / len(hs), rel_tol=1e-5)
        error = sum(float((h - z @ sae.W_dec.double() - sae.b_dec.double()).pow(2).sum()) for h, z in zip(hs, zs))
        variance = float(torch.stack(hs).var(0, correction=0).sum())
        assert math.isclose(s.fvu, error / len(hs) / variance, rel_tol=1e-4)


def test_statistics_do_not_depend_on_the_batches(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    items = windows(corpus.Corpus.of([r.text[: 15 + 5 * i] for i, r in enumerate(RETAIN)]), lm)
    saes = {2: topk_sae(2)}
    together = feature_stats(lm, saes, items, Progress())[2]
    for tokens in (1, 100):
        monkeypatch.setattr(scores, "batches", partial(corpus.batches, max_tokens=tokens))
        apart = feature_stats(lm, saes, items, Progress())[2]
        torch.testing.assert_close(apart.sum_sq, together.sum_sq, atol=1e-4, rtol=1e-5)
        assert torch.equal(apart.active, together.active)
        assert apart.positions == together.positions
        assert math.isclose(apart.fvu, together.fvu, rel_tol=1e-6)


def test_fvu_of_known_reconstructions(llama: LanguageModel) -> None:
    items = windows(RETAIN, llama)
    h = torch.stack(slow_stream(llama, items, 1))
    perfect = exact_sae(1, rotation(0))
    mean_only = exact_sae(1)
    mean_only.W_dec.data.zero_()
    mean_only.b_dec.data = h.mean(0).float()
    half = exact_sae(1)  # the first half of the coordinates exactly, the rest never
    half.W_dec.data[:, 16:] = 0
    expected = float(h[:, 16:].pow(2).mean(0).sum() / h.var(0, correction=0).sum())
    for sae, fvu in ((perfect, 0.0), (mean_only, 1.0), (half, expected)):
        assert math.isclose(feature_stats(llama, {1: sae}, items, Progress())[1].fvu, fvu, abs_tol=1e-5)
    # Both signs of a coordinate together are its mean square, relative to the norm: the shares of a direction.
    s_f = feature_stats(llama, {1: perfect}, items, Progress())[1].mean_square
    direction = h / h.norm(dim=-1, keepdim=True)
    expected_s = (direction @ rotation(0).double()).pow(2).mean(0)
    torch.testing.assert_close(s_f[:32] + s_f[32:], expected_s, atol=1e-7, rtol=1e-5)
    assert math.isclose(float(s_f.sum()), 1.0, rel_tol=1e-5)


def test_blocks_above_the_deepest_layer_do_not_run(llama: LanguageModel) -> None:
    ran: list[int] = []
    for i, block in enumerate(llama.blocks):
        block.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    feature_stats(llama, {0: topk_sae(0), 2: topk_sae(2)}, windows(FORGET, llama), Progress())
    assert set(ran) == {0, 1, 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_layer(llama: LanguageModel, bad: float) -> None:
    with torch.no_grad():
        llama.writers([2])[0].weight[3, 3] = bad
    items = windows(FORGET, llama)
    saes = {i: topk_sae(i) for i in (0, 1, 2, 3)}
    with pytest.raises(NonFiniteError, match="block 2 "):
        feature_stats(llama, saes, items, Progress())
    assert feature_stats(llama, {1: saes[1]}, items, Progress())[1].positions > 0


def test_a_broken_sae_gives_an_error_not_a_choice(llama: LanguageModel) -> None:
    sae = topk_sae(1)
    sae.W_enc.data[:] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1"):
        feature_stats(llama, {1: sae}, windows(FORGET, llama), Progress())


@pytest.mark.parametrize(
    ("hook", "fits"),
    [
        ("blocks.1.hook_resid_post", True),
        ("blocks.2.hook_resid_pre", True),
        ("blocks.2.hook_resid_post", False),
        ("blocks.1.hook_resid_pre", False),
        ("blocks.11.hook_resid_post", False),
        ("blocks.1.hook_mlp_out", False),
        ("blocks.1.attn.hook_z", False),
    ],
)
def test_hook_must_be_the_output_of_the_layer(llama: LanguageModel, hook: str, fits: bool) -> None:
    sae = topk_sae(hook=hook)
    if fits:
        check_sae(sae, 1, llama)
    else:
        with pytest.raises(SAEMismatchError, match=f"layer 1 was trained at {hook}"):
            check_sae(sae, 1, llama)


def test_width_must_be_the_models(llama: LanguageModel) -> None:
    with pytest.raises(SAEMismatchError, match="reads 16 dimensions, llama has 32"):
        feature_stats(llama, {1: topk_sae(1, d_in=16)}, windows(FORGET, llama), Progress())


# --- AUC ---------------------------------------------------------------------------------------------------

numbers = st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(a=numbers, b=numbers)
def test_auc_is_the_mann_whitney_statistic(a: list[float], b: list[float]) -> None:
    peer = scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b))
    assert math.isclose(auc(torch.tensor(a), torch.tensor(b)), peer, abs_tol=1e-12)


def test_auc_of_known_scores() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auc(torch.tensor([0.0]), torch.tensor([1.0, 2.0])) == 0.0
    assert auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) == 1.5 / 4  # a tie, a win of four pairs


# --- the choice of features --------------------------------------------------------------------------------


def slow_choice(s_f: list[float], s_r: list[float], k: int, percentile: float) -> tuple[list[int], list[int]]:
    live = [j for j in range(len(s_f)) if s_f[j] > 0 or s_r[j] > 0]
    eps = 1e-6 * sum(s_r) / len(s_r) + 1e-30
    rho = {j: s_f[j] / (s_r[j] + eps) for j in live}
    ordered = sorted(rho.values())
    at = percentile / 100 * (len(ordered) - 1)
    low = math.floor(at)
    cut = ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    candidates = [j for j in live if rho[j] >= cut * (1 - 1e-12) and s_f[j] > 0]
    if len(candidates) < k:
        raise SelectionError
    relevant = sorted(candidates, key=lambda j: (-s_f[j], j))[:k]
    return relevant, sorted((j for j in live if j not in relevant), key=lambda j: (s_f[j], j))[:k]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), m=st.integers(2, 40), k=st.integers(1, 8), percentile=st.sampled_from([0.0, 50, 75, 90, 100]))
def test_choice_equals_the_slow_reference(data: st.DataObject, m: int, k: int, percentile: float) -> None:
    score = st.one_of(st.just(0.0), st.integers(1, 4).map(float), st.floats(1e-3, 1e3))
    s_f = data.draw(st.lists(score, min_size=m, max_size=m))
    s_r = data.draw(st.lists(score, min_size=m, max_size=m))
    n_live = sum(a > 0 or b > 0 for a, b in zip(s_f, s_r))
    try:
        expected = slow_choice(s_f, s_r, k, percentile) if 2 * k <= n_live else None
    except SelectionError:
        expected = None
    if expected is None:
        with pytest.raises(SelectionError):
            choose_features(stats(s_f), stats(s_r), k, percentile)
        return
    got = choose_features(stats(s_f), stats(s_r), k, percentile)
    assert (got.relevant, got.irrelevant) == expected
    dead = {j for j in range(m) if s_f[j] == 0 == s_r[j]}
    assert not dead & set(got.relevant + got.irrelevant)
    assert not set(got.relevant) & set(got.irrelevant)
    assert {j for j in range(m) if math.isnan(float(got.ratio[j]))} == dead


def test_choice_by_hand() -> None:
    #      loud everywhere, forget only, forget mostly, retain only, silent on forget, dead
    s_f = [9.0, 4.0, 3.0, 0.0, 0.1, 0.0]
    s_r = [9.0, 0.0, 0.3, 5.0, 0.2, 0.0]
    got = choose_features(stats(s_f), stats(s_r), 2, 60)
    assert got.relevant == [1, 2]  # feature 0 is the loudest but no more active on forget text than elsewhere
    assert got.irrelevant == [3, 4]  # and never the dead one
    assert math.isclose(float(got.ratio[2]), 10.0, rel_tol=1e-3)


def test_choice_is_free_of_units() -> None:
    g = torch.Generator().manual_seed(0)
    s_f, s_r = torch.rand(2, 50, generator=g).tolist()
    one = choose_features(stats(s_f), stats(s_r), 4, 80)
    for unit in (1e-12, 1e12):
        other = choose_features(stats([unit * s for s in s_f]), stats([unit * s for s in s_r]), 4, 80)
        assert (other.relevant, other.irrelevant) == (one.relevant, one.irrelevant)


def test_errors_say_how_many_features_there_are() -> None:
    s = [float(j) for j in range(1, 11)]
    with pytest.raises(SelectionError, match=r"K = 6 .* 10 live features"):
        choose_features(stats(s), stats(s[::-1]), 6, 0)
    with pytest.raises(SelectionError, match="do not fit"):
        choose_features(stats(s), stats(s), 0, 0)
    with pytest.raises(SelectionError, match=r"only 1 features .* 95th percentile .* K = 3"):
        choose_features(stats(s), stats(s[::-1]), 3, 95)
    with pytest.raises(SelectionError, match="0 live"):
        choose_features(stats([0.0] * 4), stats([0.0] * 4), 1, 90)


def test_top_examples_are_the_largest_activations(llama: LanguageModel) -> None:
    from conftest import SENTENCES

    from saeunlearn.corpus import Corpus
    from saeunlearn.features.examples import top_examples

    sae, texts = topk_sae(1), Corpus.of(SENTENCES[:9], "x")
    features = [5, 40, 77]
    found = top_examples(llama, sae, 1, features, texts, Progress(), n=2)
    for i in features:
        peaks = {}
        for r, w in zip(texts, windows(texts, llama)):
            h = llama.capture(torch.tensor([w.ids]), [1])[1][0, 1:].detach()
            peaks[r.id[:16]] = float(sae.encode(h)[:, i].max())
        best = [p for p in sorted(peaks.values(), reverse=True)[:2] if p > 0]
        rows = found["features"][str(i)]
        assert [e["activation"] for e in rows] == pytest.approx(best, rel=1e-4)
        assert [peaks[e["id"]] for e in rows] == pytest.approx(best, rel=1e-4)  # equal prefixes: which one is open
        assert len({e["id"] for e in rows}) == len(rows)
        assert all(any(e["context"] in r.text for r in texts) and e["token"] in e["context"] for e in rows)
    assert any(found["features"].values())
