"""CRISP silences SAE features; ReGLU is its SAE-free relative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from erasures import IDS
from sspu_runs import chosen, sae_for
from toys import FORGET, RETAIN

from saeunlearn.corpus import windows
from saeunlearn.errors import ConfigError, SelectionError
from saeunlearn.methods.crisp import CRISP, CRISPConfig
from saeunlearn.methods.reglu import ReGLU, ReGLUConfig, output_covariances, top
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

LAYER = 2
CRISP_CONFIG = CRISPConfig(steps=20, batch=4, lr=0.1, check_every=10, max_retain_rise=5.0, blocks=2, retain_weight=0.1)
REGLU_CONFIG = ReGLUConfig(steps=6, batch=4, lr=0.1, check_every=3, max_retain_rise=0.3, rank=4)


def unlearn(method: Any, lm: LanguageModel, config: Any, **given: Any) -> Any:
    settings: dict[str, Any] = {"selection": None, "saes": {}, "seed": 0, "progress": Progress(), **given}
    return method.unlearn(lm, FORGET, RETAIN, config=config, **settings)


@pytest.mark.slow
def test_crisp_silences_the_relevant_features_and_nothing_stays_behind(lm: LanguageModel) -> None:
    sae, selection = sae_for(LAYER), chosen(lm)
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    erasure = unlearn(CRISP(), lm, CRISP_CONFIG, selection=selection, saes={LAYER: sae})
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())

    def activity() -> float:
        with torch.no_grad():
            h = [lm.capture(torch.tensor([w.ids]), [LAYER])[LAYER][0, 1:] for w in windows(FORGET, lm)]
            return float(sae.encode(torch.cat(h))[:, selection.relevant].sum(-1).mean())

    was = activity()
    with erasure.apply(lm):
        assert activity() < 0.9 * was
    blocks = {int(next(x for x in c["name"].split(".") if x.isdigit())) for c in changed(erasure)}
    assert blocks == {1, 2}
    assert {c["rank"] for c in changed(erasure)} == {4}


def changed(erasure: Any) -> list[dict[str, Any]]:
    return erasure.manifest["changed"]["parameters"]


def test_crisp_says_what_is_missing(llama: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="selection"):
        unlearn(CRISP(), llama, CRISP_CONFIG)
    with pytest.raises(ConfigError, match="coherence"):
        CRISP().check(llama, replace(CRISP_CONFIG, coherence=-1.0))
    dead = sae_for(LAYER)
    dead.b_enc.data[chosen(llama).relevant] = -1e6
    with pytest.raises(SelectionError, match="active nowhere"):
        unlearn(CRISP(), llama, CRISP_CONFIG, selection=chosen(llama), saes={LAYER: dead})


def test_reglu_writes_only_forget_directions_off_the_retain_ones(lm: LanguageModel) -> None:
    erasure = unlearn(ReGLU(), lm, REGLU_CONFIG)
    retain, _ = RETAIN.split(0.2, 0)
    writers = lm.writers(list(range(lm.n_layers)), ("mlp", "attn"))
    c_f, c_r = (output_covariances(lm, writers, c, 0) for c in (FORGET, retain))
    parts = {p.name: p for p in erasure.parts}
    assert parts.keys() == {w.name for w in writers}
    for w, f, r in zip(writers, c_f, c_r):
        delta = parts[w.name].delta().double()
        keep = top(r, 4)
        assert float((keep.T @ delta).norm() / delta.norm()) < 1e-5
        both = torch.linalg.qr(torch.cat([keep, top(f - r, 4)], dim=1))[0]
        assert float((delta - both @ (both.T @ delta)).norm() / delta.norm()) < 1e-5
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) <= 4
    with torch.no_grad(), erasure.apply(lm):
        changed_logits = lm.logits(IDS)
    assert float((changed_logits - lm.logits(IDS)).abs().max()) > 1e-3


def test_covariances_are_those_of_what_the_matrices_write(llama: LanguageModel) -> None:
    writers = llama.writers([0, 3])
    seen: list[torch.Tensor] = []
    hook = writers[1].module.register_forward_hook(lambda _m, _i, out: seen.append(out[0, 1:].double()))
    with torch.no_grad():
        for w in windows(FORGET, llama):
            llama.logits(torch.tensor([w.ids]))
    hook.remove()
    y = torch.cat(seen)
    torch.testing.assert_close(output_covariances(llama, writers, FORGET, 0)[1], y.T @ y / len(y))


def test_top_eigenvectors() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0]
    m = q @ torch.diag(torch.tensor([5.0, -9.0, 3.0, 1.0, 0.5, -2.0], dtype=torch.float64)) @ q.T
    got = top(m, 2)  # the largest, not the largest in size
    torch.testing.assert_close(got @ got.T, q[:, [0, 2]] @ q[:, [0, 2]].T)


@pytest.mark.parametrize(
    ("changes", "message"), [({"mix": 2.0}, "mix"), ({"rank": 30}, "no room"), ({"weights": "all"}, "weights")]
)
def test_bad_settings_of_reglu(llama: LanguageModel, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReGLU().check(llama, replace(REGLU_CONFIG, **changes))
