"""Key erasure: the closed form by least squares, block after block, weighted positions, the budget, and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoints
from erasures import IDS, applied_logits, same, weights
from sspu_runs import LAYER, chosen, sae_for
from toys import FORGET, RETAIN

from saeunlearn.corpus import Corpus, windows
from saeunlearn.erasure import Erasure
from saeunlearn.errors import Cancelled, ConfigError, ErasureError, NonFiniteError, OverlapError, SelectionError
from saeunlearn.losses import mean_loss
from saeunlearn.methods import get_method
from saeunlearn.methods.keyerasure import KeyErasureConfig, feature_weights, spectrum
from saeunlearn.models import LanguageModel
from saeunlearn.parts import WeightDelta
from saeunlearn.progress import Progress

# Every setting that a test relies on is written out: the defaults are not its business.
CONFIG = KeyErasureConfig(
    matrices="gate,up,down,o,v", first=1, last=2, lam=2.0, eps=0.03, max_length=32, max_retain_rise=1e6
)
# The edited matrices of a block, by the test's own knowledge.
LAYOUT = {
    "llama": ("model.layers.{}.", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj",
                                   "self_attn.v_proj"]),
    "gemma2": ("model.layers.{}.", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj",
                                    "self_attn.v_proj"]),
    "gpt2": ("transformer.h.{}.", ["mlp.c_fc", "mlp.c_proj", "attn.c_proj", "attn.c_attn"]),
    "gpt_neox": ("gpt_neox.layers.{}.", ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense",
                                         "attention.query_key_value"]),
}  # fmt: skip


def erase(lm: LanguageModel, config: KeyErasureConfig = CONFIG, name: str = "key-erasure", *, seed: int = 0,
          forget: Corpus = FORGET, retain: Corpus = RETAIN, progress: Progress | None = None, **kw: Any
          ) -> Erasure:  # fmt: skip
    given = {"selection": None, "saes": {}} | kw
    return get_method(name).unlearn(
        lm, forget, retain, config=config, seed=seed, progress=progress or Progress(), **given
    )


@torch.no_grad()
def rows_of(lm: LanguageModel, corpus: Corpus, names: list[str], first: bool) -> dict[str, torch.Tensor]:
    """Inputs of the matrices, one text at a time, by the test's own hooks: at the first positions, or at the others."""
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    modules = dict(lm.model.named_modules())
    handles = [
        modules[n].register_forward_hook(
            lambda _m, args, _out, n=n: seen[n].append(args[0][0, :1] if first else args[0][0, 1:])
        )
        for n in names
    ]
    for w in windows(corpus, lm, CONFIG.max_length):
        lm.model(input_ids=torch.tensor([w.ids]))
    for h in handles:
        h.remove()
    return {n: torch.cat(x).double() for n, x in seen.items()}


def by_least_squares(
    lm: LanguageModel, config: KeyErasureConfig, forget_weights: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """ΔW as stored, of the objective as stacked rows; each block on a copy whose weights hold what came before."""
    arch = lm.model.config.model_type
    used = RETAIN.split(0.2, 0)[0]
    edited, changes = lm.copy(), {}
    stored = dict(edited.model.named_parameters())
    for block in range(config.first, config.last + 1):
        prefix, tails = LAYOUT[arch]
        names = [prefix.format(block) + t for t in tails]
        before, now, unwanted, before0, now0 = (
            rows_of(m, c, names, first) for m, c, first in
            ((lm, used, False), (edited, used, False), (edited, FORGET, False), (lm, used, True), (edited, used, True))
        )  # fmt: skip
        for n in names:
            p = stored[n + ".weight"]
            conv = arch == "gpt2"
            w = p.detach().double().T if conv else p.detach().double()
            a, a2, f = before[n], now[n], unwanted[n]
            weigh = (a2.pow(2).sum() / now0[n].pow(2).sum()).sqrt()  # the first positions count as much as the others
            n_others = len(a2)
            a, a2 = torch.cat([a, weigh * before0[n]]), torch.cat([a2, weigh * now0[n]])
            eps = config.eps * float(a2.pow(2).sum() / n_others) / w.shape[1]
            weight = torch.ones(len(f), 1).double() if forget_weights is None else forget_weights[:, None]
            left = torch.cat([a2 / n_others**0.5, f * (config.lam * weight / len(f)).sqrt(),
                              eps**0.5 * torch.eye(w.shape[1]).double()])  # fmt: skip
            right = torch.cat([a @ w.T / n_others**0.5, 0 * f @ w.T, eps**0.5 * w.T])
            delta = torch.linalg.lstsq(left, right).solution.T - w
            if conv and n.endswith("attn.c_attn"):
                delta[: 2 * len(delta) // 3] = 0
            changes[n + ".weight"] = delta.T if conv else delta
        with torch.no_grad():
            for n in names:
                stored[n + ".weight"] += changes[n + ".weight"].float()
    return changes


def assert_equal(erasure: Erasure, want: dict[str, torch.Tensor]) -> None:
    got = {p.name: p.delta().T if p.transposed else p.delta() for p in erasure.parts}
    assert got.keys() == want.keys()
    for n, w in want.items():
        torch.testing.assert_close(got[n].double(), w, atol=2e-4 * float(w.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_closed_form_is_least_squares_block_after_block(checkpoints: Checkpoints, arch: str) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    erasure = erase(lm)
    assert erasure.manifest["extra"]["budget"]["scale"] == 1.0
    want = by_least_squares(lm, CONFIG)
    assert_equal(erasure, want)
    # The edited inputs matter: solved alone, the second block comes out otherwise.
    alone = by_least_squares(lm, replace(CONFIG, first=2))
    n = next(n for n in alone if "down_proj" in n or "mlp.c_proj" in n)
    assert float((alone[n] - want[n]).norm()) > 0.05 * float(want[n].norm())


def test_weights_are_as_before_and_the_erasure_comes_off_exactly(lm: LanguageModel, tmp_path: Path) -> None:
    before, flags = weights(lm), [p.requires_grad for p in lm.model.parameters()]
    config = replace(CONFIG, first=0, last=None)
    erasure = erase(lm, config)
    assert same(before, weights(lm))
    assert flags == [p.requires_grad for p in lm.model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    arch = lm.model.config.model_type
    prefix, tails = LAYOUT[arch]
    assert [p.name for p in erasure.parts] == [f"{prefix.format(b)}{t}.weight" for b in range(4) for t in tails]
    assert erasure.manifest["extra"]["edits"].keys() == {p.name for p in erasure.parts}
    expected = applied_logits(lm, erasure)
    assert not torch.allclose(expected, lm.logits(IDS), atol=1e-2)
    assert same(before, weights(lm))
    erasure.save(tmp_path / "e")
    assert torch.equal(applied_logits(lm, Erasure.load(tmp_path / "e")), expected)
    assert erase(lm, config).id == erasure.id != erase(lm, config, seed=1).id


def test_only_the_values_of_attention_change(lm: LanguageModel) -> None:
    lm.model.set_attn_implementation("eager")
    run = {"input_ids": IDS, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        old = lm.model(**run)
        with erase(lm, replace(CONFIG, matrices="v", first=0, last=0)).apply(lm):
            new = lm.model(**run)
    assert torch.equal(old.attentions[0], new.attentions[0])
    assert not torch.allclose(old.hidden_states[1], new.hidden_states[1], atol=1e-3)
    (part,) = erase(lm, replace(CONFIG, matrices="v", first=0, last=0)).parts
    moved = part.delta().abs().sum(-1) > 0
    assert int(moved.sum()) == {"llama": 16, "gemma2": 16}.get(lm.model.config.model_type, 32)  # two of four heads


@pytest.mark.slow
def test_positions_weigh_as_the_relevant_features_are_active(llama: LanguageModel) -> None:
    selection, sae = chosen(llama), sae_for()
    items = windows(FORGET, llama, CONFIG.max_length)
    found = feature_weights(llama, items, selection, sae, Progress())
    slow = []
    with torch.no_grad():
        for w in items:
            h = llama.model(input_ids=torch.tensor([w.ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
            z = sae.encode(h)
            slow.append(torch.stack([sum(z[t, j] for j in selection.relevant) / h[t].norm() for t in range(1, len(h))]))
    flat = torch.cat(slow).double()
    flat = flat / flat.mean()
    assert [len(f) for f in found] == [len(w.ids) - 1 for w in items]
    assert float(torch.cat(found).mean()) == pytest.approx(1.0)
    assert float(torch.cat(found).std()) > 0.1
    torch.testing.assert_close(torch.cat(found), flat, atol=1e-4, rtol=0)

    given = {"selection": selection, "saes": {LAYER: sae}}
    guided = erase(llama, name="key-erasure-sae", **given)
    assert_equal(guided, by_least_squares(llama, CONFIG, flat))
    assert guided.manifest["selection"] == selection.to_dict()
    n = guided.parts[2].name
    plain = by_least_squares(llama, CONFIG)[n]
    assert float((guided.parts[2].delta() - plain).norm()) > 0.01 * float(plain.norm())


def test_guided_needs_a_selection_whose_features_are_active(llama: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="needs a selection"):
        erase(llama, name="key-erasure-sae")
    sae = sae_for()
    sae.b_enc.data.fill_(-1e6)
    with pytest.raises(SelectionError, match="active nowhere"):
        erase(llama, name="key-erasure-sae", selection=chosen(llama), saes={LAYER: sae})
    with pytest.raises(SelectionError, match="layer 2"):
        erase(llama, name="key-erasure-sae", selection=chosen(llama), saes={1: sae_for(1)})


def test_budget_is_kept(llama: LanguageModel) -> None:
    # What the random model itself goes on with: any other text it may only come to read better.
    prompts = [" ".join(r.text.split()[:3]) for r in RETAIN]
    own = Corpus.of([f"{p} {g}" for p, g in zip(prompts, llama.generate(prompts, 12))])
    held = windows(own.split(0.2, 0)[1], llama, CONFIG.max_length)
    before = mean_loss(llama, held)
    wide = erase(llama, replace(CONFIG, lam=30.0), retain=own)
    limit = wide.manifest["extra"]["budget"]["retain_rise"] / 3
    assert limit > 0.01  # or there would be nothing to keep
    tight = erase(llama, replace(CONFIG, lam=30.0, max_retain_rise=limit), retain=own)
    said = tight.manifest["extra"]["budget"]
    with tight.apply(llama):
        rise = mean_loss(llama, held) / before - 1
    assert rise == pytest.approx(said["retain_rise"], abs=1e-5)
    assert 0 < rise <= limit + 1e-5
    assert 0 < said["scale"] < 1
    for a, b in zip(tight.parts, wide.parts):
        torch.testing.assert_close(a.delta(), said["scale"] * b.delta())


def test_spectrum_by_hand() -> None:
    change = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.0]).double())  # energies 9, 1, 1
    assert spectrum(change) == {"largest_share": pytest.approx(9 / 11), "rank_90": 2, "full_rank": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": 0.0}, "lam must be positive"),
        ({"token_lam": 0.0}, "token_lam must be positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"max_retain_rise": float("inf")}, "max_retain_rise must be positive and finite"),
        ({"matrices": "down,query"}, "query.*use some of embed,gate,up,down,o,v"),
        ({"matrices": "down,down"}, "one twice"),
        ({"matrices": ""}, "use some of"),
        ({"first": 3, "last": 1}, "first is block 3 and last block 1"),
        ({"last": 4}, "blocks 0 … 3"),
    ],
)
def test_bad_settings_are_refused_before_any_work(llama: LanguageModel, change: dict[str, Any], message: str) -> None:
    class NoWork(Progress):
        def start(self, what: str, total: int | None = None) -> None:
            pytest.fail(f"a long stage began: {what}")

    config = replace(CONFIG, **change)
    for name in ("key-erasure", "key-erasure-sae"):
        with pytest.raises(ConfigError, match=message):
            get_method(name).check(llama, config)
        with pytest.raises(ConfigError, match=message):
            erase(llama, config, name, progress=NoWork())


def test_matrices_that_the_layout_lacks(checkpoints: Checkpoints) -> None:
    lm = LanguageModel.open(checkpoints("gpt2"), device="cpu")
    with pytest.raises(ConfigError, match="none of the matrices gate"):
        get_method("key-erasure").check(lm, replace(CONFIG, matrices="gate"))


def test_what_cannot_be_solved_leaves_the_model_as_it_was(llama: LanguageModel) -> None:
    before = weights(llama)
    with pytest.raises(OverlapError):
        erase(llama, retain=FORGET)
    progress = Progress()

    def stop(event: dict[str, Any]) -> None:
        progress.cancelled = event.get("what") == "key erasure"

    progress.on_event = stop
    with pytest.raises(Cancelled):
        erase(llama, progress=progress)
    assert same(before, weights(llama))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
    with torch.no_grad():
        llama.model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        erase(llama)


# --- the embedding -----------------------------------------------------------------------------------------


def rows_by_hand(lm: LanguageModel, config: KeyErasureConfig, token_weights: list[float] | None = None) -> torch.Tensor:
    """The new embedding, each row by minimising the weighted squares to its old place and to the mean."""
    e = lm.model.get_input_embeddings().weight.detach().double()
    used = windows(RETAIN.split(0.2, 0)[0], lm, config.max_length)
    items = windows(FORGET, lm, config.max_length)
    kept = [i for w in used for i in w.ids] + [w.ids[0] for w in items]
    gone = [i for w in items for i in w.ids[1:]]
    weigh = token_weights or [1.0] * len(gone)
    mean = torch.stack([e[i] for i in set(kept)]).mean(0)
    out = e.clone()
    for t in set(gone):
        n_r = kept.count(t) / len(kept)
        n_f = config.token_lam * sum(v for i, v in zip(gone, weigh) if i == t) / sum(weigh)
        left = torch.tensor([[n_r**0.5], [n_f**0.5]]).double()
        out[t] = torch.linalg.lstsq(left, torch.stack([n_r**0.5 * e[t], n_f**0.5 * mean])).solution[0]
    return out


TOKENS = replace(CONFIG, matrices="embed", token_lam=0.4)


def test_rows_of_the_embedding_by_hand(lm: LanguageModel) -> None:
    want, old = rows_by_hand(lm, TOKENS), lm.model.get_input_embeddings().weight.detach().clone()
    erasure = erase(lm, TOKENS)
    with erasure.apply(lm):
        now = lm.model.get_input_embeddings().weight.detach().clone()
        head = lm.model.get_output_embeddings().weight
        assert torch.equal(head, now) == lm.model.config.tie_word_embeddings
    torch.testing.assert_close(now.double(), want, atol=1e-6, rtol=0)
    read = {i for w in windows(FORGET, lm, 32) for i in w.ids[1:]}
    moved = (now != old).any(1).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= read  # a token that forget text does not have stays to the bit
    (entry,) = erasure.manifest["changed"]["parameters"]
    assert entry["count"] == len(moved) * lm.d_model


def test_a_token_of_forget_text_alone_is_any_token(lm: LanguageModel) -> None:
    """Two texts that differ in such tokens alone are one text to the edited model."""
    items = windows(FORGET, lm, 32)
    retain = {i for w in windows(RETAIN, lm, 32) for i in w.ids} | {w.ids[0] for w in items}
    own = sorted({i for w in items for i in w.ids} - retain)
    assert len(own) >= 2
    a, b = (torch.tensor([[min(retain), t, *sorted(retain)[:5]]]) for t in own[:2])
    assert not torch.allclose(lm.logits(a), lm.logits(b), atol=1e-4)
    with erase(lm, TOKENS).apply(lm):
        torch.testing.assert_close(lm.logits(a), lm.logits(b), atol=1e-5, rtol=0)


def test_blocks_are_solved_on_what_the_new_rows_give(lm: LanguageModel) -> None:
    both = replace(CONFIG, matrices="embed,down", first=1, last=1, token_lam=0.4)
    rows = rows_by_hand(lm, both)
    erasure = erase(lm, both)
    edited = lm.copy()
    with torch.no_grad():
        edited.model.get_input_embeddings().weight.copy_(rows.float())
    name = erasure.parts[1].name.removesuffix(".weight")
    used = RETAIN.split(0.2, 0)[0]
    a, now, f = (
        rows_of(lm, used, [name], False),
        rows_of(edited, used, [name], False),
        rows_of(edited, FORGET, [name], False),
    )
    a0, now0 = rows_of(lm, used, [name], True)[name], rows_of(edited, used, [name], True)[name]
    w = dict(lm.model.named_parameters())[name + ".weight"].detach().double()
    w = w.T if erasure.parts[1].transposed else w
    c = now[name].pow(2).sum() / now0.pow(2).sum()
    n = len(now[name])
    same_ = (now[name].T @ now[name] + c * now0.T @ now0) / n
    cross = (a[name].T @ now[name] + c * a0.T @ now0) / n
    ridge = both.eps * same_.trace() / len(same_) * torch.eye(len(same_)).double()
    full = same_ + both.lam * f[name].T @ f[name] / len(f[name]) + ridge
    want = w @ (cross + ridge) @ torch.linalg.inv(full) - w
    torch.testing.assert_close(erasure.parts[1].delta().double(), want, atol=2e-4 * float(want.abs().max()), rtol=0)


def test_rows_weigh_as_the_relevant_features_are_active(llama: LanguageModel) -> None:
    selection, sae = chosen(llama), sae_for()
    weigh = feature_weights(llama, windows(FORGET, llama, 32), selection, sae, Progress())
    guided = erase(llama, TOKENS, "key-erasure-sae", selection=selection, saes={LAYER: sae})
    with guided.apply(llama):
        now = llama.model.get_input_embeddings().weight.detach().clone()
    want = rows_by_hand(llama, TOKENS, torch.cat(weigh).tolist())
    torch.testing.assert_close(now.double(), want, atol=1e-6, rtol=0)
    assert float((want - rows_by_hand(llama, TOKENS)).abs().max()) > 1e-3


def test_rows_survive_disk_and_merge(checkpoints: Checkpoints, lm: LanguageModel, tmp_path: Path) -> None:
    erasure = erase(lm, TOKENS)
    expected = applied_logits(lm, erasure)
    erasure.save(tmp_path / "e")
    again = Erasure.load(tmp_path / "e")
    assert again.id == erasure.id
    assert torch.equal(applied_logits(lm, again), expected)
    again.merge(checkpoints(lm.model.config.model_type), tmp_path / "m")
    torch.testing.assert_close(LanguageModel.open(tmp_path / "m", device="cpu").logits(IDS), expected)


@pytest.mark.parametrize("rows", [[0, 0], [0], [-1, 2], [0, 9]])
def test_rows_that_make_no_delta(rows: list[int]) -> None:
    with pytest.raises(ErasureError, match="of 9"):
        WeightDelta("e", False, dense=torch.ones(2, 3), rows=torch.tensor(rows), height=9)
