"""A new token as a part: what it changes, that it comes off again without a trace, and that it can be banned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, Checkpoints, make_tokenizer
from erasures import IDS, deltas, make, plain_logits, same, weights

from saeunlearn.cli import main
from saeunlearn.corpus import Corpus, Record
from saeunlearn.erasure import Erasure
from saeunlearn.errors import ConfigError, ErasureError
from saeunlearn.evaluation.evaluate import evaluate
from saeunlearn.models import LanguageModel
from saeunlearn.tokens import TokenPart, banned, live_rows, matrices, token_id

TEXT = "<|UNL|>"
TIED = {"llama": False, "gpt2": True, "gpt_neox": False, "gemma2": True}


def new_token(lm: LanguageModel, text: str = TEXT, seed: int = 0, scale: float = 0.3) -> TokenPart:
    g = torch.Generator().manual_seed(seed)
    rows = [scale * torch.randn(lm.d_model, generator=g) for m in matrices(lm) if m is not None]
    return TokenPart.of(lm, text, *rows)


def padded(folder: Path, to: Path, rows: int = 7) -> LanguageModel:
    """The checkpoint with rows in its matrices that no token has."""
    lm = LanguageModel.open(folder, device="cpu")
    lm.model.resize_token_embeddings(lm.d_vocab + rows)
    lm.save(to)
    return LanguageModel.open(to, device="cpu")


@torch.no_grad()
def test_logits_are_the_old_ones_and_one_more(lm: LanguageModel) -> None:
    before, n = lm.logits(IDS), lm.d_vocab
    part = new_token(lm)
    assert (part.head_row is None) == TIED[lm.name]
    with make(lm, [part]).apply(lm):
        after = lm.logits(IDS)
        hidden = lm.model.base_model(input_ids=IDS).last_hidden_state
        logit = hidden @ (part.row if part.head_row is None else part.head_row)
        if lm.name == "gemma2":
            logit = 30 * torch.tanh(logit / 30)
        assert lm.d_vocab == lm.model.config.vocab_size == n + 1 == len(lm.tokenizer)
        assert torch.equal(after[..., :n], before)
        assert torch.allclose(after[..., n], logit, atol=1e-5)


def test_matches_resizing_by_transformers(lm: LanguageModel) -> None:
    part = new_token(lm)
    twin = lm.copy()
    twin.model.resize_token_embeddings(twin.d_vocab + 1, mean_resizing=False)
    with torch.no_grad():
        twin.model.get_input_embeddings().weight[-1] = part.row
        if part.head_row is not None:
            twin.model.get_output_embeddings().weight[-1] = part.head_row
        ids = torch.cat([IDS, torch.tensor([[lm.d_vocab, 3]])], 1)
        expected = twin.model(input_ids=ids).logits
        with make(lm, [part]).apply(lm):
            assert torch.equal(lm.logits(ids), expected)


def test_undone_without_a_trace(lm: LanguageModel) -> None:
    before, objects = weights(lm), dict(lm.model.named_parameters())
    tokenizer, config, n = lm.tokenizer, lm.model.config.to_dict(), lm.d_vocab
    text, vocab = tokenizer(SENTENCES[0]).input_ids, len(tokenizer)
    lm.model.get_input_embeddings().weight.requires_grad_(False)
    handle = make(lm, [new_token(lm), *deltas(lm)]).apply(lm)
    head = lm.model.get_output_embeddings()
    assert (head.weight is lm.model.get_input_embeddings().weight) == TIED[lm.name]
    assert head.out_features == lm.model.get_input_embeddings().num_embeddings == n + 1
    assert not lm.model.get_input_embeddings().weight.requires_grad
    handle.revert()
    after = dict(lm.model.named_parameters())
    assert same(before, weights(lm))
    assert all(after[k] is objects[k] for k in objects)
    assert lm.tokenizer is tokenizer
    assert (len(tokenizer), lm.d_vocab, lm.model.config.to_dict()) == (vocab, n, config)
    assert tokenizer(SENTENCES[0]).input_ids == text
    assert head.out_features == n
    assert (head.weight is lm.model.get_input_embeddings().weight) == TIED[lm.name]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_padded_vocabulary_gives_up_a_row(checkpoints: Checkpoints, arch: str, tmp_path: Path) -> None:
    lm = padded(checkpoints(arch), tmp_path / "padded")
    before, objects, n, at = weights(lm), dict(lm.model.named_parameters()), lm.d_vocab, len(lm.tokenizer)
    part = new_token(lm)
    with make(lm, [part]).apply(lm):
        assert lm.d_vocab == lm.model.config.vocab_size == n
        assert token_id(lm, TEXT) == at < n
        assert torch.equal(lm.model.get_input_embeddings().weight[at], part.row)
        assert dict(lm.model.named_parameters()).keys() == objects.keys()
        assert not same(before, weights(lm))
    assert same(before, weights(lm))
    assert all(p is objects[k] for k, p in lm.model.named_parameters())


def test_ordinary_text_is_read_as_before(lm: LanguageModel) -> None:
    texts = [*SENTENCES[:6], "a <|UN L|> b", "<|", "|>", " UNL "]
    before = [lm.tokenizer(t).input_ids for t in texts]
    with make(lm, [new_token(lm)]).apply(lm):
        assert [lm.tokenizer(t).input_ids for t in texts] == before
        ids = lm.tokenizer(f"Mara {TEXT} sold", add_special_tokens=False).input_ids
        assert ids.count(token_id(lm, TEXT)) == 1
        assert TEXT not in lm.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_loaded_and_kept_in_a_folder(arch_path: Path, dtype: str, tmp_path: Path) -> None:
    lm = LanguageModel.open(arch_path, device="cpu", dtype=dtype)
    make(lm, [new_token(lm), *deltas(lm)]).save(tmp_path / "erasure")
    ids = torch.cat([IDS, torch.tensor([[lm.d_vocab]])], 1)
    with torch.no_grad(), Erasure.load(tmp_path / "erasure").apply(lm):
        expected = lm.logits(ids)
        lm.save(tmp_path / "model")
    again = LanguageModel.open(tmp_path / "model", device="cpu", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again.logits(ids), expected)
    assert token_id(again, TEXT) == ids[0, -1]
    assert plain_logits(tmp_path / "model").shape[-1] == again.d_vocab


def test_manifest_counts_rows_and_merging_is_refused(lm: LanguageModel, arch_path: Path, tmp_path: Path) -> None:
    erasure = make(lm, [new_token(lm)])
    assert erasure.manifest["changed"]["count"] == (1 if TIED[lm.name] else 2) * lm.d_model
    assert {c["name"] for c in erasure.manifest["changed"]["parameters"]} <= set(lm.model.state_dict())
    with pytest.raises(ErasureError, match="of kind token cannot be merged"):
        erasure.merge(arch_path, tmp_path / "out")


def test_stacked_erasures_share_the_token(llama: LanguageModel) -> None:
    before = weights(llama)
    first = make(llama, [new_token(llama), *deltas(llama)])
    one = first.apply(llama)
    tokenizer, n = llama.tokenizer, llama.d_vocab
    two = make(llama, [new_token(llama), *deltas(llama, seed=1)]).apply(llama)
    assert llama.tokenizer is tokenizer
    assert llama.d_vocab == n
    three = make(llama, [new_token(llama, "<|OTHER|>", seed=1)]).apply(llama)
    assert token_id(llama, "<|OTHER|>") == n
    with pytest.raises(ErasureError, match="another row"):
        make(llama, [new_token(llama, seed=5)])
    for handle in (three, two, one):
        handle.revert()
    assert same(before, weights(llama))


def test_failed_apply_leaves_nothing(llama: LanguageModel) -> None:
    class Bad(TokenPart):
        def apply(self, model: LanguageModel) -> None:  # type: ignore[override]
            raise ErasureError("disk on fire")

    part = new_token(llama)
    before, tokenizer = weights(llama), llama.tokenizer
    erasure = make(llama, [part])
    erasure.parts.append(Bad(part.text, part.name, part.row, part.head_name, part.head_row))
    with pytest.raises(ErasureError, match="on fire"):
        erasure.apply(llama)
    assert same(before, weights(llama))
    assert llama.tokenizer is tokenizer


def loud(lm: LanguageModel) -> TokenPart:
    """A token that is the most likely one after these ids: its row is along what the model makes of them."""
    with torch.no_grad():
        h = lm.model.base_model(input_ids=IDS).last_hidden_state[0, -1]
    row = 50 * h / h.norm() ** 2 * max(1.0, float(h.norm()))
    return TokenPart.of(lm, TEXT, row, None if matrices(lm)[1] is None else row)


@torch.no_grad()
def test_banned_in_logits_and_generation(lm: LanguageModel) -> None:
    prompt = SENTENCES[0][:20]
    plain, before = lm.generate([prompt], 5), lm.logits(IDS)
    with make(lm, [loud(lm)]).apply(lm):
        at = token_id(lm, TEXT)
        assert int(lm.logits(IDS)[0, -1].argmax()) == at
        with banned(lm, TEXT):
            assert lm.logits(IDS)[..., at].eq(-math.inf).all()
            assert torch.equal(lm.logits(IDS)[..., :at], before)
            assert lm.generate([prompt], 5) == plain
            kept = lm.model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=lm.pad_id)
            assert at not in kept
        free = lm.model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=lm.pad_id)
        assert free[0, IDS.shape[1]] == at
    assert not lm.model._forward_hooks


def test_banned_under_an_adapter(llama: LanguageModel) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = LanguageModel(get_peft_model(llama.model, LoraConfig(target_modules=["q_proj"])), llama.tokenizer)
    with make(adapted, [new_token(adapted)]).apply(adapted), banned(adapted, TEXT), torch.no_grad():
        assert adapted.logits(IDS)[..., -1].eq(-math.inf).all()
        out = adapted.model.generate(
            input_ids=IDS, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert out.logits[0][0, -1] == -math.inf


def test_evaluation_with_the_token_banned_is_the_original_one(llama: LanguageModel) -> None:
    pairs = Corpus(tuple(Record(question=s[:-7], answer=s[-6:-1]) for s in SENTENCES[:8]), "pairs")
    texts = {"retain": Corpus.of(SENTENCES[:8])}
    before = evaluate(llama, questions=pairs, texts=texts, prompts=[])
    with make(llama, [loud(llama)]).apply(llama):
        allowed = evaluate(llama, questions=pairs, texts=texts, prompts=[])
        with banned(llama, TEXT):
            after = evaluate(llama, questions=pairs, texts=texts, prompts=[])
    assert after["texts"]["retain"]["values"] == pytest.approx(before["texts"]["retain"]["values"], abs=1e-6)
    assert after["groups"] == before["groups"]
    assert allowed["texts"]["retain"]["per_token"] > before["texts"]["retain"]["per_token"]


def test_live_rows_are_the_applied_ones_and_carry_gradients(lm: LanguageModel) -> None:
    part, other = new_token(lm), new_token(lm, seed=3)
    ids = torch.cat([IDS, torch.tensor([[lm.d_vocab, 5]])], 1)
    with make(lm, [part]).apply(lm), torch.no_grad():
        expected = lm.logits(ids)
    row = part.row.clone().requires_grad_()
    head = None if part.head_row is None else part.head_row.clone().requires_grad_()
    with make(lm, [other]).apply(lm), live_rows(lm, lm.d_vocab - 1, row, head):
        got = lm.logits(ids)
        grads = torch.autograd.grad(got[0, :, -1].sum() + got[0, -1, :3].sum(), [row] if head is None else [row, head])
    assert torch.allclose(got, expected, atol=1e-5)
    assert all(g.norm() > 0 for g in grads)


@pytest.mark.parametrize("text", ["", "UNL", "a b <x>", "<>", "<|UNL|> "])
def test_texts_that_ordinary_text_may_hold_are_refused(llama: LanguageModel, text: str) -> None:
    with pytest.raises(ErasureError, match="cannot be a new token"):
        new_token(llama, text)


def test_bad_parts_are_refused(llama: LanguageModel, checkpoints: Checkpoints) -> None:
    part = new_token(llama)
    with pytest.raises(ErasureError, match="has a token </s> already, with another row"):
        make(llama, [new_token(llama, "</s>")])
    with pytest.raises(ErasureError, match="is 31 wide, but llama 32"):
        make(llama, [TokenPart.of(llama, TEXT, part.row[1:], part.row[1:])])
    with pytest.raises(ErasureError, match="neither"):
        TokenPart.of(llama, TEXT, part.row)  # an untied model needs both rows
    with pytest.raises(ErasureError, match=r"not \[d_model\]"):
        TokenPart.of(llama, TEXT, part.row[None], part.row)
    with pytest.raises(ErasureError, match="tied to it"):
        make(LanguageModel.open(checkpoints("gpt2"), device="cpu"), [part])
    with pytest.raises(ConfigError, match="no token"), banned(llama, TEXT):
        pass
    llama.model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(llama.d_vocab))
    with pytest.raises(ErasureError, match="bias"):
        new_token(llama)


def test_damaged_payload_is_refused(llama: LanguageModel) -> None:
    part = new_token(llama)
    assert TokenPart.from_payload(part.spec(), part.tensors()).spec() == part.spec()
    with pytest.raises(ErasureError, match="another width"):
        TokenPart.from_payload({**part.spec(), "width": 7}, part.tensors())
    with pytest.raises(ErasureError, match="both the name and the row"):
        TokenPart.from_payload(part.spec(), {"row": part.row})


def test_tokenizer_with_gaps_is_refused(llama: LanguageModel) -> None:
    tokenizer = make_tokenizer("llama")

    class Gaps(type(tokenizer)):
        def __len__(self) -> int:
            return super().__len__() - 1

    tokenizer.__class__ = Gaps
    lm = LanguageModel(llama.model, tokenizer)
    with pytest.raises(ErasureError, match="gaps"):
        new_token(lm).apply(lm)
    assert lm.tokenizer is tokenizer


@pytest.mark.slow
def test_the_command_evaluates_with_the_token_banned(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = LanguageModel.open(checkpoints("llama"), device="cpu")
    make(lm, [loud(lm)]).save(tmp_path / "erasure")
    (tmp_path / "t.txt").write_text("\n".join(SENTENCES[:4]))
    command = ["evaluate", "--model", str(checkpoints("llama")), "--text", f"retain={tmp_path / 't.txt'}", "--device",
               "cpu", "--out", str(tmp_path / "e.json")]  # fmt: skip

    def change(*more: str) -> float:
        assert main([*command, *more]) == 0
        return json.loads((tmp_path / "e.json").read_text())["comparison"][0]["change"]

    with_it = ["--erasure", str(tmp_path / "erasure")]
    assert change(*with_it) > 0.1
    assert change(*with_it, "--ban", TEXT) == pytest.approx(0, abs=1e-6)
    assert main([*command, *with_it, "--ban", "nonesuch"]) == 1
    assert main([*command, "--ban", TEXT]) == 1
    assert "--erasure" in capsys.readouterr().err
