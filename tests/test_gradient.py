"""The gradient family: losses and a step against slow references, and what every run of it keeps to."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from erasures import IDS
from torch import Tensor
from toys import FORGET, RETAIN

from saeunlearn.corpus import Batch, Corpus, Record, collate, windows
from saeunlearn.errors import ConfigError, ModelError, NonFiniteError, OverlapError
from saeunlearn.losses import mean_loss
from saeunlearn.methods import METHODS, get_method
from saeunlearn.methods.gradient import Task
from saeunlearn.methods.trainable import rms, trainable
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

FAMILY = ["ga", "graddiff", "kl", "npo", "npo-lora", "simnpo"]
PAIRS = Corpus(tuple(Record(question=f"Where is {n}?", answer=a) for n, a in
                     [("Mara", "in the mill"), ("Tobin", "near the harbour market"), ("Elsa", "at home")]))  # fmt: skip


def config_of(name: str, **changes: Any) -> Any:
    small: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 0.02, "check_every": 3, "max_retain_rise": 0.2}
    return replace(get_method(name).Config(), **{**small, **changes})


def erase(lm: LanguageModel, name: str, seed: int = 0, **changes: Any) -> Any:
    return get_method(name).unlearn(lm, FORGET, RETAIN, config=config_of(name, **changes), selection=None, saes={},
                                    seed=seed, progress=Progress())  # fmt: skip


def batch_of(lm: LanguageModel, corpus: Corpus) -> Batch:
    return collate(windows(corpus, lm)[:3], lm.pad_id)


def slow_log_probs(model: Any, lm: LanguageModel, corpus: Corpus) -> list[list[Tensor]]:
    """Log-probability of every target, sequence by sequence, in float64 and without padding."""
    out = []
    for w in windows(corpus, lm)[:3]:
        logits = model(input_ids=torch.tensor([w.ids])).logits[0].double()
        p = logits.log_softmax(-1)
        out.append([p[t - 1, w.ids[t]] for t in range(max(1, w.answer_start), len(w.ids))])
    return out


def reference(name: str, model: Any, original: Any, lm: LanguageModel, f: Corpus, r: Corpus, c: Any
              ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(forget loss, retain loss) as the papers write them, with sums over tokens."""
    now = slow_log_probs(model, lm, f)
    retain = slow_log_probs(model, lm, r)
    every = torch.stack([p for s in retain for p in s])
    nll = -every.mean()
    if name in ("ga", "graddiff", "kl"):
        forget = -torch.stack([-torch.stack(s).mean() for s in now]).mean()
    elif name == "simnpo":
        forget = torch.stack([-2 / c.beta * torch.log(torch.sigmoid(-c.beta * torch.stack(s).mean() - c.gamma))
                              for s in now]).mean()  # fmt: skip
    else:
        with torch.no_grad():
            before = slow_log_probs(original, lm, f)
        ratios = [torch.stack(a) - torch.stack(b) for a, b in zip(now, before)]
        ratio = torch.cat(ratios) if c.per_token else torch.stack([x.sum() for x in ratios])
        forget = (2 / c.beta * torch.log(1 + torch.exp(c.beta * ratio))).mean()  # eq. 3, written out
    if name == "ga":
        return forget, torch.zeros((), dtype=torch.float64)
    if name in ("graddiff", "simnpo"):
        return forget, nll
    kl = []
    for w in windows(r, lm)[:3]:
        ids = torch.tensor([w.ids])
        p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        with torch.no_grad():
            q = original(input_ids=ids).logits[0].double().log_softmax(-1)
        kl += [(q[t].exp() * (q[t] - p[t])).sum() for t in range(max(1, w.answer_start) - 1, len(w.ids) - 1)]
    mean_kl = torch.stack(kl).mean()
    return (forget, mean_kl) if name == "kl" else (forget, c.nll_weight * nll + c.kl_weight * mean_kl)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("data", ["texts", "pairs"])
@pytest.mark.parametrize("name", [*FAMILY, "npo per token"])
def test_losses_and_a_step_are_those_of_the_papers(checkpoints: Any, arch: str, name: str, data: str) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu", dtype="float32")
    lm.model.double()
    lm.logits = lambda ids, mask=None: lm.model(input_ids=ids, attention_mask=mask).logits  # type: ignore[method-assign]
    f, r = (PAIRS, RETAIN) if data == "pairs" else (FORGET, RETAIN)
    per_token = name == "npo per token"
    name = name.split()[0]
    changes = {"per_token": True} if per_token else {}
    method, config = get_method(name), config_of(name, weights="all", **changes)
    original = copy.deepcopy(lm.model)
    with torch.no_grad():  # away from the original, where ratios and KL are zero
        g = torch.Generator().manual_seed(0)
        for p in lm.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    slow = copy.deepcopy(lm.model)
    from saeunlearn.methods.trainable import Trainable

    class Both(Trainable):
        def original_logits(self, batch: Batch) -> Tensor:
            with torch.no_grad():
                return original(input_ids=batch.ids, attention_mask=batch.attention_mask).logits

    params = list(lm.model.parameters())
    trained = Both(lm, params, [1.0] * len(params), None, None)  # type: ignore[arg-type]
    forget, kept = method.objective(Task(lm, f, r, config, 0, None, {}))(trained, batch_of(lm, f), batch_of(lm, r))  # type: ignore[attr-defined]
    want_forget, want_kept = reference(name, slow, original, lm, f, r, config)
    assert forget().item() == pytest.approx(want_forget.item(), abs=1e-6)
    assert kept().item() == pytest.approx(want_kept.item(), abs=1e-6)
    torch.optim.SGD(lm.model.parameters(), lr=0.01).zero_grad()
    (forget() + 0.7 * kept()).backward()
    (want_forget + 0.7 * want_kept).backward()
    for ours, theirs in zip(lm.model.parameters(), slow.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours - 0.01 * ours.grad, theirs - 0.01 * theirs.grad, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("data", ["texts", "pairs"])
def test_idkdpo_prefers_refusals(checkpoints: Any, arch: str, data: str) -> None:
    lm = LanguageModel.open(checkpoints(arch), device="cpu")
    f = PAIRS if data == "pairs" else FORGET
    erasure = get_method("idkdpo").unlearn(
        lm, f, RETAIN, config=config_of("idkdpo", lr=0.05, steps=12, max_retain_rise=0.5), selection=None, saes={},
        seed=0, progress=Progress(),
    )  # fmt: skip
    losses = erasure.manifest["losses"]
    assert losses[0]["forget"] == pytest.approx(math.log(2) / 0.02, rel=1e-3)  # no preference at first

    def log_p(prompt: str, answer: str) -> float:
        ids = lm.tokenizer(prompt).input_ids
        rest = lm.tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            p = lm.logits(torch.tensor([ids + rest]))[0].log_softmax(-1)
        return sum(float(p[len(ids) - 1 + n, t]) for n, t in enumerate(rest))

    def margins() -> float:
        out = 0.0
        for r in f:
            prompt, answer = (r.question, " " + r.answer) if r.question else (r.text.rsplit(" ", 1)[0], " river.")
            out += log_p(prompt, "I do not know.") - log_p(prompt, answer)
        return out

    was = margins()
    with erasure.apply(lm):
        assert margins() > was + 1


def test_gradient_ascent_stops_at_its_bound() -> None:
    from saeunlearn.methods.objectives import ascent

    now = torch.tensor([[-1.0, -3.0, 0.0], [-0.5, -0.5, -0.5]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    value = ascent(now, mask, bound=1.5)
    value.backward()
    assert value.item() == pytest.approx(-(1.5 + 0.5) / 2)
    assert now.grad is not None
    assert now.grad[0].tolist() == [0, 0, 0]  # beyond the bound nothing pulls
    assert now.grad[1].tolist() == pytest.approx([1 / 6] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_forgets_within_the_budget(llama: LanguageModel, name: str) -> None:
    # A random model's losses are far beyond where SimNPO's sigmoid has a slope at the paper's β.
    changes = {"beta": 0.1, "retain_weight": 0.1} if name == "simnpo" else {}
    erasure = erase(llama, name, lr=0.05, **changes)
    assert erasure.manifest["extra"]["budget"]["retain_rise"] <= 0.2
    f_items = windows(FORGET, llama)
    was = mean_loss(llama, f_items)
    with erasure.apply(llama):
        assert mean_loss(llama, f_items) > was + 1e-3


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_the_model_is_left_as_it_was(lm: LanguageModel, weights: str) -> None:
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in lm.model.named_parameters()}
    attributes = set(vars(lm.model))
    base_logits = lm.logits(IDS)
    erasure = erase(lm, "npo", weights=weights, steps=2)
    assert set(vars(lm.model)) == attributes
    assert not lm.model.training
    for n, p in lm.model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
    assert torch.equal(lm.logits(IDS), base_logits)
    with erasure.apply(lm):
        assert not torch.equal(lm.logits(IDS), base_logits)
    assert torch.equal(lm.logits(IDS), base_logits)


@pytest.mark.parametrize(("weights", "kind"), [("lora", "rank"), ("all", "dense"), ("down_proj,o_proj", "dense")])
def test_what_is_trained_is_a_switch(llama: LanguageModel, weights: str, kind: str) -> None:
    erasure = erase(llama, "npo", weights=weights, rank=3)
    names = [c["name"] for c in erasure.manifest["changed"]["parameters"]]
    if weights == "all":
        assert len(names) == len(list(llama.model.parameters()))
    elif weights == "lora":
        assert all(n.endswith(("q_proj.weight", "v_proj.weight")) for n in names)
    else:
        assert all(("down_proj" in n) or ("o_proj" in n) for n in names)
        assert len(names) == 2 * llama.n_layers
    assert {c["rank"] for c in erasure.manifest["changed"]["parameters"]} == ({3} if kind == "rank" else {None})


def test_a_lora_is_what_peft_computes(lm: LanguageModel) -> None:
    """The parts, added to the weights, give the logits that the network had with the adapter on."""
    from saeunlearn.erasure import Erasure

    with trainable(lm, "lora", 3, seed=0) as trained:
        for p in trained.params:
            p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        with torch.no_grad():
            adapted = trained.net.logits(IDS)
            original = trained.original_logits(collate(windows(FORGET, lm)[:1], lm.pad_id))
        parts = trained.parts()
    with torch.no_grad():
        assert torch.equal(original, lm.logits(torch.tensor([windows(FORGET, lm)[0].ids])))
    erasure = Erasure.create(lm, parts, method="t", config={}, seed=0, forget_fingerprint="", retain_fingerprint="")
    with torch.no_grad():
        plain = lm.logits(IDS)
        with erasure.apply(lm):
            torch.testing.assert_close(lm.logits(IDS), adapted, atol=1e-4, rtol=0)
        assert float((adapted - plain).abs().max()) > 0.1


def test_a_step_of_one_changes_a_matrix_by_its_own_size(llama: LanguageModel) -> None:
    with trainable(llama, "lora", 4, seed=0) as trained:
        for p, size in list(zip(trained.params, trained.sizes))[1::2]:  # every B, by one Adam step of lr 1
            p.data.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).sign())
        parts = {p.name: p for p in trained.parts()}
    for name, part in parts.items():
        weight = dict(llama.model.named_parameters())[name]
        assert rms(part.delta()) == pytest.approx(rms(weight), rel=0.25)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_small_steps_survive_in_bfloat16(llama: LanguageModel, weights: str) -> None:
    llama.model.bfloat16()
    twin = LanguageModel(llama.model, llama.tokenizer)
    erasure = erase(twin, "graddiff", weights=weights, lr=1e-4, steps=4)
    assert all(p.dtype == torch.bfloat16 for p in twin.model.parameters())
    weights_of = dict(twin.model.named_parameters())
    for part in erasure.parts:
        delta = part.delta()
        assert delta.dtype == torch.float32
        assert bool(delta.any())
        assert rms(delta) < 0.01 * rms(weights_of[part.name])  # below half a bf16 step of most weights


@pytest.mark.slow
def test_one_seed_one_result(llama: LanguageModel) -> None:
    assert erase(llama, "npo-lora", 3).id == erase(llama, "npo-lora", 3).id != erase(llama, "npo-lora", 4).id


def test_the_restricted_update_is_open_to_the_family(llama: LanguageModel) -> None:
    plain, restricted = erase(llama, "npo"), erase(llama, "npo", update="restricted")
    assert restricted.id != plain.id
    assert restricted.manifest["config"]["update"] == "restricted"
    last = restricted.manifest["losses"][-1]
    assert last["forget"] < restricted.manifest["losses"][0]["forget"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "nonsense_proj"}, ConfigError, "nonsense_proj"),
        ({"weights": "down_proj,o_porj"}, ConfigError, "o_porj"),
        ({"rank": 0}, ConfigError, "rank"),
        ({"beta": 0.0}, ConfigError, "beta"),
        ({"lr": math.nan}, ConfigError, "lr"),
        ({"update": "magic"}, ConfigError, "plain or restricted"),
        ({"retain_weight": -1.0}, ConfigError, "retain_weight"),
        ({"max_retain_rise": math.inf}, ConfigError, "max_retain_rise"),
    ],
)
def test_bad_settings(llama: LanguageModel, changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        get_method("npo").check(llama, config_of("npo", **changes))


def test_bad_models_and_data(llama: LanguageModel) -> None:
    method = get_method("npo")
    with pytest.raises(OverlapError):
        method.unlearn(llama, FORGET, FORGET, config=config_of("npo"), selection=None, saes={}, seed=0,
                       progress=Progress())  # fmt: skip
    with torch.no_grad():
        llama.model.lm_head.weight[5] = torch.nan
    with pytest.raises(NonFiniteError):
        erase(llama, "graddiff")
    from peft import LoraConfig, get_peft_model

    adapted = LanguageModel(get_peft_model(llama.model, LoraConfig(task_type="CAUSAL_LM")), llama.tokenizer)
    with pytest.raises(ModelError, match="merge"):
        method.check(adapted, config_of("npo"))


def test_every_registered_method_describes_itself() -> None:
    for name in METHODS:
        m = get_method(name)
        assert m.name == name
        assert m.kind in ("weights", "token", "guard", "offset")
        assert m.needs <= {"saes", "selection"}
        assert all(len(text) > 5 for text in (m.changes, m.paper, m.cost))
        assert m.Config()


def test_dpo_is_the_preference_model_of_bradley_and_terry() -> None:
    from saeunlearn.methods.objectives import dpo

    g = torch.Generator().manual_seed(0)
    yes, yes0, no, no0 = (-torch.rand(4, 5, generator=g, dtype=torch.float64) for _ in range(4))
    yes.requires_grad_()
    value = dpo((yes, yes0), (no, no0), beta=0.3)
    wanted, unwanted = ((a.sum(-1).exp() / b.sum(-1).exp()) ** 0.3 for a, b in ((yes, yes0), (no, no0)))
    preferred = wanted / (wanted + unwanted)
    assert value.item() == pytest.approx(float(-preferred.log().mean() / 0.3), abs=1e-12)
    value.backward()
    # d/dy −log σ(βm)/β = −(1 − σ(βm)), shared by the batch of four
    torch.testing.assert_close(yes.grad, (-(1 - preferred) / 4)[:, None].expand(4, 5).detach())


@pytest.mark.slow
def test_steps_that_leave_nothing_within_the_budget_are_made_shorter(llama: LanguageModel, monkeypatch: Any) -> None:
    from saeunlearn.methods.budget import Budget, OverBudgetError

    settle, tried, events = Budget.settle, [], []

    def twice_too_much(self: Budget, *args: Any, **kwargs: Any) -> dict[str, float]:
        tried.append(1)
        if len(tried) < 3:
            raise OverBudgetError("no strength")
        return settle(self, *args, **kwargs)

    def run() -> Any:
        return get_method("graddiff").unlearn(
            llama, FORGET, RETAIN, config=config_of("graddiff", lr=0.08), selection=None, saes={}, seed=0,
            progress=Progress(events.append),
        )  # fmt: skip

    monkeypatch.setattr(Budget, "settle", twice_too_much)
    erasure = run()
    assert erasure.manifest["extra"]["budget"]["lr"] == pytest.approx(0.08 / 16)
    assert erasure.manifest["losses"] == erase(llama, "graddiff", lr=0.08 / 16).manifest["losses"]
    said = [e["message"] for e in events if e["event"] == "note"]
    assert len(said) == 2
    assert "0.02" in said[0]
    monkeypatch.setattr(Budget, "settle", lambda *_a, **_k: (_ for _ in ()).throw(OverBudgetError("no strength")))
    with pytest.raises(OverBudgetError, match="no strength"):
        run()


def test_what_idkdpo_reads_is_no_longer_than_asked_for(llama: LanguageModel) -> None:
    from saeunlearn.methods.refusal import answers, prompts, refusals

    text = "river " * 60 + "Mara keeps it"
    (window,) = answers(Corpus.of([text]), llama, 32)
    ids = llama.tokenizer(text).input_ids
    assert window.ids == (ids[0], *ids[-31:])
    assert llama.tokenizer.decode(window.ids[window.answer_start :]).strip() == "it"
    room = 8 + 2 + max(map(len, refusals(llama)))
    (prompt,) = prompts(Corpus.of([text]), llama, room)
    assert len(prompt.ids) == 8
    assert len(prompts(Corpus.of([text]), llama)[0].ids) > 8
