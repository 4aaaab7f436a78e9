"""SSPU: what the update may touch, what it leaves alone, and that every way of using it gives the same model."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import Checkpoints
from erasures import IDS, applied_logits, plain_logits, same, same_logits, weights
from sspu_runs import CONFIG, LAYER, K, chosen, erase, prepared, sae_for
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, endless
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import Cancelled, ConfigError, NonFiniteError, OverlapError, SAEMismatchError, SelectionError
from saeunlearn.features.selection import Selection
from saeunlearn.features.subspace import principal_angles
from saeunlearn.methods import METHODS, get_method
from saeunlearn.methods.deltas import attached
from saeunlearn.methods.sspu import SSPU, SSPUConfig, fit, settle
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress


def off_span(selection: Selection) -> np.ndarray:
    """I − P of the relevant decoder rows, by SciPy."""
    u = scipy.linalg.orth(sae_for(selection.layer).W_dec[selection.relevant].double().numpy().T)
    return np.eye(len(u)) - u @ u.T


def written(lm: LanguageModel, part: WeightDelta) -> np.ndarray:
    """What ΔW writes to the stream [d, d_in]: behind the gain of the norm that follows it, where one does."""
    delta = part.delta().double().numpy()
    block = lm.blocks[int(part.name.split(".")[2])]
    if hasattr(block, "post_feedforward_layernorm"):
        norm = block.post_attention_layernorm if "attn" in part.name else block.post_feedforward_layernorm
        delta = (1 + norm.weight.detach().double().numpy())[:, None] * delta
    return delta


def outside_share(lm: LanguageModel, erasure: Erasure, selection: Selection) -> float:
    """‖(I − P)ΔW‖ / ‖ΔW‖ over all matrices."""
    off = off_span(selection)
    writes = [written(lm, p) for p in erasure.parts]
    return math.sqrt(sum(np.sum((off @ w) ** 2) for w in writes) / sum(np.sum(w**2) for w in writes))


def hooks(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


# --- what the update is ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_hard_update_writes_into_the_relevant_subspace_only(lm: LanguageModel, attention: bool) -> None:
    selection = chosen(lm)
    erasure = erase(lm, replace(CONFIG, attention=attention), selection=selection)
    expected = [w.name for w in lm.writers([0, 1, 2], ("mlp", "attn") if attention else ("mlp",))]
    assert sorted(p.name for p in erasure.parts) == sorted(expected)
    off = off_span(selection)
    for part in erasure.parts:
        delta, write = part.delta().double().numpy(), written(lm, part)
        assert np.linalg.norm(delta) > 1e-3
        assert np.linalg.matrix_rank(delta, tol=1e-5 * np.linalg.norm(delta, 2)) <= K
        assert part.rank <= K
        assert np.linalg.norm(off @ write) < 1e-5 * np.linalg.norm(write)
    assert erasure.manifest["extra"]["subspace"]["outside_dw"] < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_stream_moves_inside_the_relevant_subspace(checkpoints: Checkpoints, arch: str) -> None:
    # Only the last block is trained, so Δh at its output is what that one matrix writes. (Not so in Gemma-2, whose
    # post-norm rescales the old write too.)
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    selection = chosen(lm)
    with torch.enable_grad():
        erasure = erase(lm, replace(CONFIG, blocks=1), selection=selection)
    before = lm.capture(IDS, [0, 1, 2])
    with erasure.apply(lm):
        after = lm.capture(IDS, [0, 1, 2])
    assert torch.equal(before[1], after[1])
    dh = (after[2] - before[2])[0].double().numpy()
    assert np.linalg.norm(dh) > 1e-2
    assert np.linalg.norm(dh @ off_span(selection)) < 1e-4 * np.linalg.norm(dh)


@pytest.mark.parametrize("target", ["relevant", "irrelevant"])
def test_direction_lies_in_the_subspace_of_the_target(llama: LanguageModel, target: str) -> None:
    run = prepared(llama, replace(CONFIG, target=target))
    u = run.direction.double()
    assert math.isclose(float(u.norm()), 1.0, rel_tol=1e-5)
    u_rel, u_irr = run.u_rel.double(), run.u_irr.double()
    inside, outside = (u_rel, u_irr) if target == "relevant" else (u_irr, u_rel)
    assert float((u - inside @ (inside.T @ u)).norm()) < 1e-5
    assert float((outside.T @ u).norm()) < 1e-5
    if target == "irrelevant":
        rows = sae_for().W_dec[run.selection.relevant].double()
        assert float((rows @ u).abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_first_loss_is_relative_to_each_positions_norm(llama: LanguageModel, gamma: float) -> None:
    # Before the first step h is where it was: the loss is the mean of ‖h − γ‖h‖u‖²/‖h‖² = 1 − 2γ cos(h, u) + γ².
    run = prepared(llama, replace(CONFIG, gamma=gamma, gated=False, steps=1, batch=len(FORGET)))
    batch = next(endless(run.forget, llama.pad_id, len(FORGET), run.seed))
    h = llama.capture(batch.ids, [LAYER], batch.attention_mask)[LAYER][batch.mask].double()
    cosine = (h @ run.direction.double()) / h.norm(dim=-1)
    with torch.enable_grad():
        (row,) = fit(run, Progress())
    assert math.isclose(row["forget"], float((1 - 2 * gamma * cosine + gamma**2).mean()), rel_tol=1e-5)
    assert row["retain"] == 0.0


def test_the_forget_loss_falls(lm: LanguageModel) -> None:
    rows = erase(lm, replace(CONFIG, steps=25, gated=False)).manifest["losses"]
    assert [r["step"] for r in rows] == list(range(25))
    assert rows[0]["retain"] == 0  # nothing has moved yet
    assert sum(r["forget"] for r in rows[-5:]) < 0.95 * sum(r["forget"] for r in rows[:5])


def test_a_closed_gate_changes_nothing(llama: LanguageModel) -> None:
    selection = chosen(llama)
    closed = replace(selection, gate=replace(selection.gate, threshold=1e9))
    for part in erase(llama, selection=closed).parts:
        assert float(part.delta().abs().max()) == 0.0
    for part in erase(llama, replace(CONFIG, gated=False), selection=closed).parts:
        assert float(part.delta().abs().max()) > 0


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_trained_blocks_end_at_the_layer(llama: LanguageModel, layer: int) -> None:
    erasure = erase(llama, replace(CONFIG, blocks=2), selection=chosen(llama, layer))
    assert erasure.manifest["extra"]["subspace"]["blocks"] == list(range(max(0, layer - 1), layer + 1))


@pytest.mark.slow
def test_soft_penalty_pulls_the_update_into_the_subspace(lm: LanguageModel) -> None:
    selection = chosen(lm)
    shares = []
    for lam in (0.0, 30.0, 3000.0):
        erasure = erase(lm, replace(CONFIG, form="soft", lam=lam, steps=10), selection=selection)
        assert all(p.rank is None for p in erasure.parts)
        shares.append(outside_share(lm, erasure, selection))
        assert math.isclose(erasure.manifest["extra"]["subspace"]["outside_dw"], shares[-1], rel_tol=1e-3)
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.8 * shares[0]


# --- every way of using it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_applied_attached_merged_and_exported_agree(lm: LanguageModel, arch_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    erasure = erase(lm)
    applied = applied_logits(lm, erasure)
    with torch.no_grad():
        original = lm.logits(IDS)
        assert float((applied - original).abs().max()) > 0.01

        run = prepared(lm)  # the same run, step by step
        with torch.enable_grad():
            fit(run, Progress())
        settle(run)
        with attached(run.deltas):
            assert same_logits(lm.logits(IDS), applied)
            there = lm.capture(IDS, [LAYER])[LAYER]
        with erasure.apply(lm):
            assert torch.allclose(lm.capture(IDS, [LAYER])[LAYER], there, atol=1e-5, rtol=0)
        assert torch.equal(lm.logits(IDS), original)

    erasure.save(tmp_path / "erasure")
    assert same_logits(applied_logits(lm, Erasure.load(tmp_path / "erasure")), applied)
    erasure.merge(arch_path, tmp_path / "merged")
    assert same_logits(plain_logits(tmp_path / "merged"), applied)
    erasure.to_peft(tmp_path / "adapter", arch_path)
    base = AutoModelForCausalLM.from_pretrained(arch_path)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert same_logits(adapted(input_ids=IDS).logits, applied)


def test_model_is_untouched(lm: LanguageModel) -> None:
    selection = chosen(lm)
    before, fingerprint, logits = weights(lm), lm.fingerprint(), lm.logits(IDS)
    erase(lm, selection=selection)
    assert same(weights(lm), before)
    assert torch.equal(lm.logits(IDS), logits)
    assert lm.fingerprint() == fingerprint
    assert hooks(lm) == 0
    assert not lm.model.training
    assert all(p.requires_grad for p in lm.model.parameters())


def test_no_gradient_is_left_on_the_model(llama: LanguageModel) -> None:
    erase(llama)
    assert all(p.grad is None for p in llama.model.parameters())


def test_blocks_above_the_layer_never_run_while_training(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(llama)
    monkeypatch.setattr(run.budget, "check", lambda _deltas: {"retain": 0.0})  # a loss needs all blocks
    ran: list[int] = []
    for i, block in enumerate(llama.blocks):
        block.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    fit(run, Progress())
    assert set(ran) == {0, 1, 2}
    assert ran.count(2) >= CONFIG.steps


def test_manifest_says_what_was_done_and_quotes_nothing(llama: LanguageModel) -> None:
    selection = chosen(llama)
    m = erase(llama, selection=selection, seed=3).manifest
    assert (m["method"], m["seed"], m["config"]) == ("sspu", 3, json.loads(json.dumps(dataclasses.asdict(CONFIG))))
    assert m["parent_fingerprint"] == llama.fingerprint()
    assert (m["forget_fingerprint"], m["retain_fingerprint"]) == (FORGET.fingerprint(), RETAIN.fingerprint())
    assert (m["selection"]["layer"], m["selection"]["relevant"]) == (LAYER, selection.relevant)
    assert m["extra"]["subspace"]["k_over_d"] == K / 32
    assert [r["step"] for r in m["losses"] if "retain_rise" in r] == [2, 5]
    text = json.dumps(m)
    assert not any(r.text in text or r.text[:25] in text for r in (*FORGET, *RETAIN))


@pytest.mark.slow
def test_bfloat16_model(checkpoints: Checkpoints) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu", dtype="bfloat16")
    run = prepared(lm)
    assert {d.free.dtype for d in run.deltas} == {torch.float32}
    fit(run, Progress())
    for d in run.deltas:  # more than bfloat16 could hold
        assert not torch.equal(d.free.detach().bfloat16().float(), d.free.detach())
        assert torch.isfinite(d.free).all()
    erasure = erase(lm)
    assert outside_share(lm, erasure, chosen(lm)) < 1e-5
    with torch.no_grad():
        original = lm.logits(IDS)
        with erasure.apply(lm):
            assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
            assert float((lm.logits(IDS) - original).abs().max()) > 0.01
        assert torch.equal(lm.logits(IDS), original)


# --- controls, seeds ---------------------------------------------------------------------------------------


def test_controls_have_the_same_rank_and_another_span(llama: LanguageModel) -> None:
    runs = {b: prepared(llama, replace(CONFIG, basis=b)) for b in ("relevant", "random_rows", "random_basis")}
    w_dec = sae_for().W_dec
    for name, run in runs.items():
        assert run.u_rel.shape == (32, K)
        assert torch.allclose(run.u_rel.T @ run.u_rel, torch.eye(K), atol=1e-5)
        assert float((run.u_rel.T @ run.u_irr).abs().max()) < 1e-5
        if name != "relevant":
            assert principal_angles(run.u_rel, runs["relevant"].u_rel).max() > 0.3
            assert [d.free.shape for d in run.deltas] == [d.free.shape for d in runs["relevant"].deltas]
            other = prepared(llama, replace(CONFIG, basis=name), seed=1)
            assert principal_angles(run.u_rel, other.u_rel).max() > 0.3  # every seed draws its own
    # Random rows are rows of the decoder: K of them lie in their span, and none in that of a random basis.
    inside = {n: (w_dec @ r.u_rel).norm(dim=-1) > 1 - 1e-5 for n, r in runs.items()}
    assert int(inside["random_rows"].sum()) >= K
    assert int(inside["random_basis"].sum()) == 0


def test_one_seed_gives_one_erasure(llama: LanguageModel) -> None:
    selection = chosen(llama)
    first, again, other = (erase(llama, selection=selection, seed=s) for s in (0, 0, 1))
    assert first.id == again.id != other.id
    assert first.manifest["losses"] == again.manifest["losses"]


# --- errors ------------------------------------------------------------------------------------------------


def test_a_cancelled_run_changes_nothing(lm: LanguageModel) -> None:
    selection, before = chosen(lm), weights(lm)
    progress = Progress()
    progress.on_event = lambda e: setattr(progress, "cancelled", e.get("done") == 2 and "loss" in e)
    with pytest.raises(Cancelled):
        erase(lm, selection=selection, progress=progress)
    assert same(weights(lm), before)
    assert hooks(lm) == 0


def test_nan_in_the_weights_is_named(llama: LanguageModel) -> None:
    selection = chosen(llama)
    with torch.no_grad():
        llama.writers([1])[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        erase(llama, selection=selection)


def test_a_diverging_run_is_stopped(llama: LanguageModel) -> None:
    selection, before = chosen(llama), weights(llama)
    with pytest.raises(NonFiniteError):
        erase(llama, replace(CONFIG, lr=1e38, alpha=1e30), selection=selection)
    assert same(weights(llama), before)
    assert hooks(llama) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"gamma": 0.0}, {"alpha": -1.0}, {"lr": 0.0}, {"blocks": 0}, {"max_retain_rise": 0.0},
        {"basis": "none"},
        {"form": "firm"}, {"batch": 0}, {"check_every": 0}, {"lam": -1.0}, {"max_retain_rise": math.inf},
        {"max_retain_rise": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_any_training(llama: LanguageModel, bad: dict[str, Any]) -> None:
    progress = Progress()
    selection = chosen(llama)
    progress.on_event = lambda e: pytest.fail("training began") if "SSPU" in e.get("what", "") else None
    with pytest.raises(ConfigError):
        erase(llama, replace(CONFIG, **bad), selection=selection, progress=progress)


def test_what_does_not_belong_together_is_refused(llama: LanguageModel) -> None:
    selection = chosen(llama)
    shared = Corpus((*RETAIN.records, FORGET.records[3]), "retain")
    with pytest.raises(OverlapError):
        erase(llama, selection=selection, retain=shared)
    method = SSPU()
    run = {"config": CONFIG, "seed": 0, "progress": Progress()}
    with pytest.raises(ConfigError, match="needs a selection"):
        method.unlearn(llama, FORGET, RETAIN, selection=None, saes={LAYER: sae_for()}, **run)
    with pytest.raises(SelectionError, match="layer 2"):
        method.unlearn(llama, FORGET, RETAIN, selection=selection, saes={1: sae_for(1)}, **run)
    with pytest.raises(SAEMismatchError, match="trained at"):
        method.unlearn(llama, FORGET, RETAIN, selection=selection, saes={LAYER: sae_for(1)}, **run)


@pytest.mark.slow
def test_bos_is_held(llama: LanguageModel) -> None:
    moved = {}
    for alpha in (0.0, 1e3):
        erasure = erase(llama, replace(CONFIG, gated=False, alpha=alpha, steps=30))
        with torch.no_grad():
            before = llama.capture(IDS, [LAYER])[LAYER][:, 0]
            with erasure.apply(llama):
                after = llama.capture(IDS, [LAYER])[LAYER][:, 0]
        moved[alpha] = float((after - before).norm() / before.norm())
    assert moved[1e3] < 0.2 * moved[0.0]


def test_what_begins_a_retain_text_too_is_never_pushed(llama: LanguageModel) -> None:
    # Every forget text is the beginning of a retain text, so nothing is left to push.
    forget = Corpus.of(["a red map", "the old mill"])
    retain = Corpus.of([f"{t} is {w}" for t in ("a red map", "the old mill") for w in ("wet", "near", "far", "big")])
    erasure = erase(llama, replace(CONFIG, gated=False), forget=forget, retain=retain)
    assert all(row["forget"] == 0.0 for row in erasure.manifest["losses"])


def test_registry() -> None:
    assert "sspu" in METHODS
    method = get_method("sspu")
    assert (method.name, method.Config, method.needs) == ("sspu", SSPUConfig, {"saes", "selection"})
    with pytest.raises(ConfigError, match=r"unknown method 'rmu2'; known: .*sspu"):
        get_method("rmu2")
