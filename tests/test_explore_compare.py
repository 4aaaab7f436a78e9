"""A prompt through the original and its edits, against the models themselves."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from erasures import make, same, weights
from explored import IRRELEVANT, LAYER, RELEVANT, opened, saes
from guarded import guard
from micro import Finished
from test_offsets import offset_of
from test_tokens import TEXT, new_token
from torch.nn.functional import cross_entropy

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError, SelectionError
from saeunlearn.evaluation.metrics import answer_logprobs
from saeunlearn.explore.compare import compare_view, residual_shares
from saeunlearn.explore.opened import OpenedRun, open_run
from saeunlearn.models import LanguageModel

PROMPT = " ".join(SENTENCES[0].split()[:6])
ANSWERS = ["mill", "old harbour"]
NEW = 5


def run_of(lm: LanguageModel) -> OpenedRun:
    parts = {"weights": None, "guard": [guard(strength=8.0)], "token": [new_token(lm)], "offset": [offset_of(lm)]}
    return opened(lm, **{name: make(lm, p) for name, p in parts.items()})


def ids_of(lm: LanguageModel, prompt: str = PROMPT) -> torch.Tensor:
    bos = [] if lm.bos_id is None else [lm.bos_id]
    return torch.tensor([[*bos, *lm.tokenizer(prompt, add_special_tokens=False).input_ids]])


@torch.no_grad()
def test_every_sort_of_erasure_says_what_its_model_says(lm: LanguageModel) -> None:
    run = run_of(lm)
    before = weights(lm)
    view = compare_view(run, PROMPT, run.names, ANSWERS, max_new_tokens=NEW)
    json.dumps(view, allow_nan=False)
    assert list(view["models"]) == run.names
    assert same(before, weights(lm))
    assert lm.lineage == []
    pairs = Corpus((Record(question=PROMPT, answer=ANSWERS[0], choices=tuple(ANSWERS)),))
    for name, got in view["models"].items():
        with run.edited(name) as model:
            ids = ids_of(model)
            logits = model.logits(ids)[0]
            assert got["generated"] == model.generate([PROMPT], NEW)[0]
            sums = answer_logprobs(model, pairs)[0]
        assert "".join(got["tokens"]).endswith(PROMPT)
        assert len(got["loss"]) == len(got["tokens"]) == ids.shape[1]
        assert got["loss"][0] is None
        losses = cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        assert got["loss"][1:] == pytest.approx(losses, abs=1e-4)
        assert [a["text"] for a in got["answers"]] == ANSWERS
        assert [a["probability"] for a in got["answers"]] == pytest.approx([math.exp(s) for s in sums], rel=1e-3)
        assert all(a["probability"] <= a["per_token"] <= 1 for a in got["answers"])
        last = got["lens"][-1]
        assert last["layer"] == lm.n_layers - 1
        assert [p[0]["token"] for p in last["tokens"]] == run.token_texts(logits.argmax(-1).tolist(), lm)
        assert [p[0]["probability"] for p in last["tokens"]] == pytest.approx(
            logits.softmax(-1).max(-1).values.tolist(), rel=1e-3
        )
    said = [view["models"][n]["loss"][1:] for n in ("original", "weights", "guard", "offset")]
    assert all(a != b for i, a in enumerate(said) for b in said[:i])


@torch.no_grad()
def test_the_lens_is_norm_and_head_of_each_stream(llama: LanguageModel) -> None:
    run = opened(llama, guard=make(llama, [guard(strength=8.0)]))
    rows = compare_view(run, PROMPT, ["guard"], max_new_tokens=1)["models"]["guard"]["lens"]
    assert [r["layer"] for r in rows] == [0, 1, 2, 3]
    with run.edited("guard"):
        for r in rows:
            h = llama.capture(ids_of(llama), [r["layer"]])[r["layer"]][0]
            best = llama.model.lm_head(llama.model.model.norm(h)).softmax(-1).topk(5)
            for position, tokens in enumerate(r["tokens"]):
                assert [t["token"] for t in tokens] == run.token_texts(best.indices[position].tolist())
                expected = best.values[position].tolist()
                assert [t["probability"] for t in tokens] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_changed_features_and_shares_are_those_of_the_streams(lm: LanguageModel) -> None:
    run = opened(lm, weights=make(lm))
    got = compare_view(run, PROMPT, ["weights"], max_new_tokens=1)["models"]
    assert got["original"]["features"] == got["original"]["residual"] == []
    streams = {}
    for name in ("original", "weights"):
        with run.edited(name) as model:
            streams[name] = model.capture(ids_of(lm), range(lm.n_layers))
    sizes = []
    for row in got["weights"]["features"]:
        layer, j = row["layer"], row["feature"]
        means = []
        for name, label in (("original", "before"), ("weights", "after")):
            z = saes()[layer].encode(streams[name][layer][0, 1:])
            means.append(z.mean(0))
            assert row[label] == pytest.approx(float(means[-1][j]), rel=1e-3, abs=1e-4)
        change = (means[1] - means[0]).abs()
        assert int((change > change[j] * 1.001).sum()) < 10
        sizes.append(float(change[j]) / float(streams["original"][layer][0, 1:].norm(dim=-1).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert {r["layer"] for r in got["weights"]["features"]} == {LAYER, 2}
    w_dec = saes()[LAYER].W_dec.double()
    q = torch.linalg.qr(w_dec[RELEVANT].T)[0]
    for row in got["weights"]["residual"]:
        h, g = (streams[n][row["layer"]][0, 1:].double() for n in ("original", "weights"))
        delta = g - h
        whole = delta.pow(2).sum()
        inside = (delta @ q @ q.T).pow(2).sum() / whole
        both = torch.linalg.qr(w_dec[[*RELEVANT, *IRRELEVANT]].T)[0]
        spanned = (delta @ both @ both.T).pow(2).sum() / whole
        assert row["relevant"] == pytest.approx(float(inside), abs=1e-6)
        assert row["irrelevant"] == pytest.approx(float(spanned - inside), abs=1e-6)
        assert row["other"] == pytest.approx(float(1 - spanned), abs=1e-6)
        assert row["total"] == pytest.approx(float(whole / h.pow(2).sum()), rel=1e-3)
    one = compare_view(run, PROMPT, ["weights"], layer=2, max_new_tokens=1)["models"]["weights"]["features"]
    assert {r["layer"] for r in one} == {2}


def test_shares_of_changes_that_were_made_by_hand(llama: LanguageModel) -> None:
    run = opened(llama)
    rows, h = saes()[LAYER].W_dec, torch.randn(6, llama.d_model, generator=torch.Generator().manual_seed(0))
    push = h + 2 * rows[RELEVANT[1]]
    assert residual_shares(run, h, push) == pytest.approx({"relevant": 1, "irrelevant": 0, "other": 0,
                                                           "total": 24 / float(h.pow(2).sum())}, abs=1e-5)  # fmt: skip
    bases = run.bases()
    assert bases is not None
    mixed = h + 3 * bases[0][:, 0].float() + 4 * bases[1][:, 1].float()
    assert residual_shares(run, h, mixed)["relevant"] == pytest.approx(9 / 25, abs=1e-5)
    assert residual_shares(run, h, mixed)["irrelevant"] == pytest.approx(16 / 25, abs=1e-5)
    assert residual_shares(run, h, h) == {"relevant": None, "irrelevant": None, "other": None, "total": 0.0}
    run.selection = None
    assert residual_shares(run, h, push)["relevant"] is None
    assert residual_shares(run, h, push)["total"] > 0


def test_a_new_token_in_the_prompt_is_read_by_its_own_model(llama: LanguageModel) -> None:
    run = opened(llama, token=make(llama, [new_token(llama)]))
    models = compare_view(run, f"{PROMPT}{TEXT}", ["token"], max_new_tokens=1)["models"]
    assert models["token"]["tokens"][-1] == TEXT
    assert len(models["original"]["tokens"]) > len(models["token"]["tokens"])
    assert models["token"]["features"] == models["token"]["residual"] == []  # positions do not correspond


@pytest.mark.parametrize(
    ("change", "match"),
    [({"prompt": "  "}, "at least one word"), ({"max_new_tokens": 0}, "at least one new token"),
     ({"prompt": "x " * 200}, "tokens; with"), ({"names": ["other"]}, "no Erasure"), ({"answers": [" "]}, "is empty")],
)  # fmt: skip
def test_bad_input(llama: LanguageModel, change: dict[str, Any], match: str) -> None:
    run = opened(llama, weights=make(llama))
    given = {"prompt": PROMPT, "names": ["weights"], "max_new_tokens": NEW, **change}
    with pytest.raises(ConfigError, match=match):
        compare_view(run, **given)
    with pytest.raises(SelectionError, match="has SAEs for"):
        compare_view(run, PROMPT, ["weights"], layer=0)


@pytest.mark.slow
def test_on_a_real_run_the_change_lies_where_the_method_put_it(finished: Finished) -> None:
    run = open_run(finished.root)
    assert run.selection is not None
    assert run.questions is not None
    question = next(q for q in run.questions if q.meta["set"] == "forget")
    got = compare_view(run, question.question, ["sspu"], question.choices, max_new_tokens=3)["models"]
    shares = {r["layer"]: r for r in got["sspu"]["residual"]}
    # SSPU writes up to the selection's layer, into the relevant subspace only; later blocks react as they please.
    assert shares[run.selection.layer]["total"] > 0
    assert shares[0]["relevant"] > 0.5
    assert got["sspu"]["features"]
    gold = question.choices.index(question.answer)
    assert got["sspu"]["answers"][gold]["probability"] < got["original"]["answers"][gold]["probability"]
