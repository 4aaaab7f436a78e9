"""Build a sandbox once: the world's files, a tokenizer trained on it, and a small Llama that has learned it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import atomic_folder, write_json
from ..corpus import Corpus, Record, endless, windows, write_jsonl
from ..errors import ModelError, RunError
from ..evaluation.metrics import multiple_choice
from ..locks import locked
from ..models import LanguageModel
from ..progress import Progress
from ..training import TrainConfig, train
from .world import WorldConfig, make_world

SCHEMA = 2

# Every sentence of the sandbox's forget set is the topic, so nothing is gated, and the push goes into the relevant
# subspace, the only one that the hard form can write to.
DEMO_SETTINGS: dict[str, Any] = {
    "gated": False, "target": "relevant", "attention": True, "gamma": 16.0, "alpha": 200.0, "lr": 0.07, "steps": 400,
    "batch": 32, "swapped": 0.2, "max_retain_rise": 0.02,
}  # fmt: skip
DEMO_SELECT: dict[str, Any] = {"percentile": 90.0, "k": 32}
DEMO_SAE: dict[str, Any] = {"tokens": 400_000}


@dataclass(frozen=True)
class SandboxConfig:
    """What a sandbox is built from; everything that changes its content is in here."""

    world: WorldConfig = field(default_factory=WorldConfig)
    blocks: int = 4
    d_model: int = 128
    heads: int = 4
    d_mlp: int = 384
    vocabulary: int = 1536
    batch: int = 64  # sentences in a step
    training: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Sandbox:
    """Paths of a built sandbox: an ordinary Hugging Face folder and ordinary JSONL files."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def forget(self) -> Path:
        return self.root / "forget.jsonl"

    @property
    def retain(self) -> Path:
        return self.root / "retain.jsonl"

    @property
    def questions(self) -> Path:
        return self.root / "questions.jsonl"

    @property
    def oracle(self) -> Path:
        """Where `build_oracle` puts the model that never saw the forget records."""
        return self.root / "oracle"

    def describe(self) -> dict[str, Any]:
        return json.loads((self.root / "world.json").read_text())


def cache_dir() -> Path:
    """Where built things live: $SAEUNLEARN_HOME, else the user cache directory."""
    import platformdirs

    return Path(os.environ.get("SAEUNLEARN_HOME") or platformdirs.user_cache_dir("saeunlearn"))


def build(config: SandboxConfig, progress: Progress, root: Path | None = None) -> Sandbox:
    """The sandbox of `config`, built if it is not in the cache yet.

    Raises ModelError when the model did not learn its world: held-out phrasings below .98 multiple choice;
    RunError when `root` holds another sandbox.
    """
    key = hashlib.sha256(json.dumps([SCHEMA, asdict(config)], sort_keys=True).encode()).hexdigest()[:10]
    root = root or cache_dir() / "sandbox" / f"seed{config.world.seed}-{key}"
    with _alone(root, progress):
        return _build(config, progress, root)


def _alone(folder: Path, progress: Progress) -> contextlib.AbstractContextManager[None]:
    """Within it no other process builds this folder."""
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return locked(cache_dir() / "locks" / name, progress, f"it builds {folder.name}")


def _build(config: SandboxConfig, progress: Progress, root: Path) -> Sandbox:
    if (root / "world.json").exists():
        box = Sandbox(root)
        if box.describe().get("config") != asdict(config):
            raise RunError(f"{root} holds a sandbox of another seed or size: choose another folder")
        return box
    started = time.monotonic()
    with atomic_folder(root) as work:
        world = make_world(config.world)
        write_jsonl(work / "train.jsonl", (Record(text=t) for t in world.train))
        write_jsonl(work / "forget.jsonl", world.forget)
        write_jsonl(work / "retain.jsonl", world.retain)
        write_jsonl(work / "questions.jsonl", world.questions)
        tokenizer = train_tokenizer(world.train, config.vocabulary)
        model, losses = learn(config, tokenizer, world.train, progress, "sandbox: training the model")
        accuracy = {}
        for phrasing in ("seen", "held_out"):
            group = Corpus(tuple(q for q in world.questions if q.meta["phrasing"] == phrasing), phrasing)
            accuracy[phrasing] = multiple_choice(model, group).mean
        if accuracy["held_out"] < 0.98:
            raise ModelError(
                f"the sandbox model reached only {accuracy['held_out']:.3f} multiple choice on held-out phrasings "
                f"of world {config.world.seed} (needed: .98); use another --seed"
            )
        model.save(work / "model")
        info = {
            "schema": SCHEMA, "config": asdict(config), "world": world.describe(), "multiple_choice": accuracy,
            "final_loss": losses[-1], "seconds": round(time.monotonic() - started, 1),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        write_json(work / "world.json", info)
    return Sandbox(root)


def build_oracle(box: Sandbox, progress: Progress) -> Path:
    """The sandbox's model trained anew without the forget records: same start, steps and tokenizer. Cached.

    Raises ModelError where it did not learn the rest: near or far held-out phrasings below .98 multiple choice.
    """
    with _alone(box.oracle, progress):
        return _build_oracle(box, progress)


def _build_oracle(box: Sandbox, progress: Progress) -> Path:
    if (box.oracle / "oracle.json").exists():
        return box.oracle
    info = box.describe()["config"]
    config = SandboxConfig(
        **{**info, "world": WorldConfig(**info["world"]), "training": TrainConfig(**info["training"])}
    )
    world = make_world(config.world)
    left_out = {r.id for r in world.forget}
    texts = [t for t in world.train if Record(text=t).id not in left_out]
    started = time.monotonic()
    with atomic_folder(box.oracle) as work:
        tokenizer = LanguageModel.open(box.model, device="cpu").tokenizer
        model, losses = learn(config, tokenizer, texts, progress, "sandbox: training the oracle")
        kept = [q for q in world.questions if q.meta["set"] != "forget" and q.meta["phrasing"] == "held_out"]
        accuracy = multiple_choice(model, Corpus(tuple(kept), "kept")).mean
        if accuracy < 0.98:
            raise ModelError(
                f"the oracle of world {config.world.seed} reached only {accuracy:.3f} on what it should know"
            )
        model.save(work)
        write_json(work / "oracle.json", {
            "schema": SCHEMA, "steps": config.training.steps, "sentences": len(texts), "final_loss": losses[-1],
            "kept": accuracy, "seconds": round(time.monotonic() - started, 1),
        })  # fmt: skip
    return box.oracle


def learn(
    config: SandboxConfig, tokenizer: Any, texts: Sequence[str], progress: Progress, what: str
) -> tuple[LanguageModel, list[float]]:
    """A Llama trained from scratch on the sentences; (model, losses)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.world.seed)
    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.d_model, intermediate_size=config.d_mlp,
            num_hidden_layers=config.blocks, num_attention_heads=config.heads, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model = LanguageModel(net, tokenizer, name=f"sandbox-seed{config.world.seed}")
    corpus = Corpus.of([t + tokenizer.eos_token for t in texts], "train")
    rows = endless(windows(corpus, model), model.pad_id, config.batch, config.world.seed)
    return model, train(model, rows, config.training, progress, what)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with <s> prepended, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
