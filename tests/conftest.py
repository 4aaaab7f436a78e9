"""Tiny random checkpoints of every supported layout, built once a session and opened like real ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may reach a hub

import pytest
import torch

torch.set_num_threads(1)

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma2")
N_LAYERS, D_MODEL, MAX_LENGTH = 4, 32, 64

_NAMES = ("Mara", "Tobin", "Elsa", "Quill", "Rufus", "Odette", "Pim", "Selma")
_PLACES = ("harbour", "mill", "orchard", "tower", "market", "library")
_THINGS = ("lantern", "violin", "map", "kettle", "ladder")
SENTENCES = tuple(
    f"{name} keeps the old {thing} in the {place} near the river."
    for name in _NAMES
    for place, thing in zip(_PLACES, _THINGS * 2)
)

Checkpoints = Callable[[str], Path]


def make_tokenizer(arch: str) -> Any:
    """A byte-level BPE of at most 200 tokens; Llama and Gemma-2 prepend BOS, GPT-2 and GPT-NeoX do not."""
    # The 256 bytes are not all in the alphabet: the training sentences' characters and ASCII are enough.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "gemma2": {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "gpt_neox": {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|padding|>",
        },
    }[arch]
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_letters = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=ascii_letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if arch in ("llama", "gemma2"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special)


def make_model(arch: str, tokenizer: Any) -> Any:
    """A random model whose logits are far from uniform, in eval mode and float32."""
    import transformers as hf

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.2, **ids}
    rope = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
    }
    torch.manual_seed(ARCHITECTURES.index(arch))
    if arch == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, head_dim=8, **rope, **common))
    elif arch == "gpt2":
        shape = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": MAX_LENGTH}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **common))
    elif arch == "gpt_neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**rope, **common))
    else:
        gemma = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**gemma, **rope, **common))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # biases and gains start at 0 or 1: a mistake in them would not show
                p.add_(0.3 * torch.randn_like(p) if "norm" in name or "ln_" in name else 0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Callable: architecture → folder of its tiny checkpoint, built on first use. Treat it as read-only."""
    built: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in built:
            folder = tmp_path_factory.mktemp("checkpoints") / arch
            tokenizer = make_tokenizer(arch)
            make_model(arch, tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            built[arch] = folder
        return built[arch]

    return get


# `make check` sees two of the four: a layout of linear layers, and one of Conv1D with joint queries, keys and values.
@pytest.fixture(params=[*ARCHITECTURES[:2], *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[2:])])
def arch_path(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    """The checkpoint folder of each architecture in turn; its name is the architecture's."""
    return checkpoints(request.param)


@pytest.fixture
def lm(arch_path: Path) -> Any:
    """A fresh LanguageModel of each architecture in turn."""
    from saeunlearn.models import LanguageModel

    return LanguageModel.open(arch_path, device="cpu")


@pytest.fixture
def llama(checkpoints: Checkpoints) -> Any:
    """A fresh Llama LanguageModel."""
    from saeunlearn.models import LanguageModel

    return LanguageModel.open(checkpoints("llama"), device="cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever builds the tiny sandbox is slow."""
    for item in items:
        if "micro" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny sandbox, built once. Treat it as read-only."""
    from micro import build_micro

    return build_micro(tmp_path_factory.mktemp("micro") / "sandbox")


@pytest.fixture(scope="session")
def micro_data(micro: Any) -> Path:
    """Folder with the sandbox's forget, retain and question files, and secrets in the first and the last."""
    from micro import write_data

    folder = micro.root.parent / "data"
    write_data(micro, folder)
    return folder


@pytest.fixture(scope="session")
def finished(micro: Any, micro_data: Path) -> Any:
    """A whole run on the tiny sandbox. Treat it as read-only."""
    from micro import finish

    return finish(micro, micro_data, micro.root.parent)


@pytest.fixture
def config(micro: Any, micro_data: Path) -> Any:
    """The RunConfig of `finished`."""
    from micro import run_config

    return run_config(micro, micro_data)


@pytest.fixture
def done(finished: Any, tmp_path: Path) -> Path:
    """A copy of the finished run's directory, to be spoilt."""
    return Path(shutil.copytree(finished.root, tmp_path / "run"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a run this small."""
    monkeypatch.setattr("saeunlearn.pipeline.write_report", lambda _run: None)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with the tokenizer of the Llama."""
    folder = tmp_path_factory.mktemp("small") / "small"
    tokenizer = make_tokenizer("llama")
    make_model("gpt2", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project, which is not part of it."""
    shared = Path(__file__).resolve().parents[1].parent / "shared"
    data = shared / "data"
    if data.is_dir() and any(data.iterdir()):
        return data
    if os.environ.get("CI") == "true" and shared.is_dir():
        pytest.fail("../shared exists but ../shared/data is empty or missing: the real-data tests must run in CI")
    pytest.skip("no ../shared/data beside the project: tests on real data were left out")
