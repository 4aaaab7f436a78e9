"""How fast SAEs are trained, how good they get, and how that compares with sae_lens and sparsify in the same run.

    python benchmarks/train_saes.py speed capture layers memory

speed          one TopK SAE, 256 → 4096, k = 32, batch 4096: contenders take turns, a few steps each, and all end with
               the same number of steps; tokens/s (median over the turns) and held-out FVU
capture        activations alone against a bare Hugging Face forward of the same blocks
layers         four layers of a 6-block, 256-wide model, activations included, against sae_lens's multi-SAE runner
memory         peak memory of a run over 1 M and over 4 M tokens
gpu            2304 → 16384, k = 64 on CUDA: tokens/s and the share of the dense encoder's matmul alone

Peers: sae_lens is a dependency; sparsify is `pip install eai-sparsify` (the `bench` extra). One JSON file a part.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_training import SAEConfig, train_saes
from sae_training.activations import capturing, positions
from sae_training.processes import Processes
from sae_training.sparse import CPUOps, TorchOps
from sae_training.topk import SparseSAE
from sae_training.train import rate
from sae_training.workers import Workers
from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Window
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

D, WIDTH, K, BATCH = 256, 16, 32, 4096
LR = 3e-3
CPU = torch.device("cpu")


def activations(n: int, d: int, seed: int) -> Tensor:
    """[n, d] with mean norm √d: sums of some of 2·16·d directions, frequencies by a power law, and noise."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2 * WIDTH * d, d, generator=g), dim=-1)
    frequency = 1 / torch.arange(1, len(rows) + 1) ** 0.8
    g.manual_seed(seed)
    out = 0.2 * torch.randn(n, d, generator=g)
    chosen = torch.multinomial(frequency, n * 24, replacement=True, generator=g).view(n, 24)
    for i in range(24):
        out += rows[chosen[:, i]] * torch.rand(n, 1, generator=g).neg().log1p().neg()
    return out * math.sqrt(d) / out.norm(dim=-1).mean()


def fvu(x: Tensor, reconstructed: Tensor) -> float:
    return float((reconstructed - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


# --- contenders: step() trains on the next batch, evaluate(x) reconstructs -----------------------------------------


class Ours:
    def __init__(
        self, data: Iterator[Tensor], steps: int, ops: Any, k: int = K, width: int = WIDTH, d: int = D
    ) -> None:
        self.data, self.steps, self.done = data, steps, 0
        config = SAEConfig(expansion=width, k=k, batch=BATCH, tokens=steps * BATCH)
        self.sae = SparseSAE(config, d, getattr(ops, "device", CPU), ops, Processes(), seed=0)

    def step(self) -> None:
        x = next(self.data)
        self.sae.step(x, len(x), LR * rate(self.done, self.steps))
        self.done += 1

    def evaluate(self, x: Tensor) -> Tensor:
        done = self.sae.finished(1.0, {})
        return done.decode(done.encode(x))


def trainer(data: Iterator[Tensor], sae: Any, steps: int, lr: float, batch: int) -> Any:
    """sae_lens's SAETrainer with our schedule; its step is what its `fit` does with each batch."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=lr, lr_end=lr / 100,
        lr_warm_up_steps=max(1, steps // 20), lr_decay_steps=steps // 5, dead_feature_window=max(1, 100_000 // batch),
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return SAETrainer(cfg=config, sae=sae, data_provider=data)


class SAELens:
    def __init__(self, data: Iterator[Tensor], steps: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        torch.manual_seed(0)
        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=WIDTH * D, k=K, apply_b_dec_to_input=True))
        self.trainer = trainer(data, self.sae, steps, LR, BATCH)
        self.data = data

    def step(self) -> None:
        self.trainer.step(next(self.data))

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))


class Sparsify:
    """The inner loop of its trainer with its default optimiser."""

    def __init__(self, data: Iterator[Tensor], _steps: int) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.config import SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from sparsify.sparse_coder import SparseCoder

        torch.manual_seed(0)
        self.data = data
        self.sae = SparseCoder(D, SparseCoderConfig(num_latents=WIDTH * D, k=K))
        lr = 5e-3 / (WIDTH * D / 2**14) ** 0.5
        self.optimiser = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=lr), momentum=0.95)
        self.optimiser.train()

    def step(self) -> None:
        x = next(self.data)
        self.sae.set_decoder_norm_to_unit_norm()
        self.sae(x).fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        self.optimiser.eval()
        out = self.sae(x).sae_out
        self.optimiser.train()
        return out


class Encoder:
    """The floor: the dense encoder's forward pass, nothing else."""

    def __init__(self, data: Iterator[Tensor], dtype: torch.dtype) -> None:
        self.data, self.w = data, torch.randn(D, WIDTH * D).to(dtype)
        self.out = torch.empty(BATCH, WIDTH * D, dtype=dtype)

    def step(self) -> None:
        torch.mm(next(self.data).to(self.w.dtype), self.w, out=self.out)


def endless(pool: Tensor) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(pool), generator=g).split(BATCH):
            if len(rows) == BATCH:
                yield pool[rows]


def speed(args: argparse.Namespace) -> dict[str, Any]:
    pool, held = activations(40 * BATCH, D, 1), activations(8192, D, 2)
    steps = args.turns * args.steps
    with Workers() as workers:
        contenders: dict[str, Any] = {
            "sae_lens": SAELens(endless(pool), steps),
            "sparsify": Sparsify(endless(pool), steps),
            "ours, float32": Ours(endless(pool), steps, CPUOps(workers)),
            "ours, bfloat16 encoder": Ours(endless(pool), steps, CPUOps(workers, torch.bfloat16)),
            "encoder alone, float32": Encoder(endless(pool), torch.float32),
            "encoder alone, bfloat16": Encoder(endless(pool), torch.bfloat16),
        }
        took: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(args.turns):
            for name, contender in contenders.items():
                if turn == 0 and "ours" in name:  # compile once, elsewhere than in the clock
                    Ours(endless(pool), 1, contender.sae.ops).step()
                started = time.perf_counter()
                for _ in range(args.steps):
                    contender.step()
                took[name].append(args.steps * BATCH / (time.perf_counter() - started))
            print(f"turn {turn + 1}: " + ", ".join(f"{n} {v[-1]:,.0f}" for n, v in took.items()), flush=True)
        result: dict[str, Any] = {"turns": args.turns, "steps": steps, "threads": torch.get_num_threads()}
        for name, contender in contenders.items():
            result[name] = {"tokens_per_s": statistics.median(took[name]), "turns": took[name]}
            if hasattr(contender, "evaluate"):
                result[name]["fvu"] = fvu(held, contender.evaluate(held))
    for name in ("ours, float32", "ours, bfloat16 encoder"):
        floor = result["encoder alone, " + ("bfloat16" if "bfloat16" in name else "float32")]["turns"]
        for peer, rates in (("sae_lens", took["sae_lens"]), ("sparsify", took["sparsify"]), ("floor", floor)):
            ratios = [a / b for a, b in zip(took[name], rates)]
            result[name][f"against {peer}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return result


# --- models and text ------------------------------------------------------------------------------------------------


def model_and_windows(
    blocks: int, d: int, rows: int, folder: str, context: int = 128
) -> tuple[LanguageModel, list[Window]]:
    """A random Llama with a word tokenizer, and rows of random tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4997))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=5000, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=blocks,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=context, bos_token_id=0,
                         eos_token_id=1, initializer_range=0.1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    ids = np.random.default_rng(0).zipf(1.3, (rows, context - 1)) % 4997 + 3
    table = list(range(5000))
    return LanguageModel.open(folder, device="cpu"), [
        Window((0, *(table[t] for t in row)), 1, i) for i, row in enumerate(ids.tolist())
    ]


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def capture(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model, items = model_and_windows(6, D, 512, folder)
        layers = [1, 2, 3, 4]
        out = torch.empty(len(layers), sum(map(positions, items)), D)
        ids = torch.tensor([w.ids for w in items])
        inner = model.model.model
        kept, inner.layers = inner.layers, inner.layers[:5]

        @torch.no_grad()
        def bare() -> None:
            for part in ids.split(64):
                inner(input_ids=part, use_cache=False)

        def ours() -> None:
            capturing(model, items, layers)(range(len(items)), out)

        ratios = []
        for _ in range(args.turns):
            inner.layers = inner.layers[:5]
            plain = timed(bare)
            inner.layers = kept
            ratios.append(plain / timed(ours))
    return {"share of the bare forward's speed": [statistics.median(ratios), min(ratios), max(ratios)]}


def layers(args: argparse.Namespace) -> dict[str, Any]:
    """Four layers, activations included: our train_saes against MultiSAETrainingRunner, taking turns."""
    import datasets
    from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig

    datasets.disable_progress_bars()
    chosen, tokens = [1, 2, 3, 4], 8 * BATCH
    with tempfile.TemporaryDirectory() as folder:
        model, items = model_and_windows(6, D, 1200, folder)
        bridge = model.transformer_lens()
        table = datasets.Dataset.from_dict({"tokens": [list(w.ids) for w in items]})
        config = SAEConfig(expansion=WIDTH, k=K, tokens=tokens, batch=BATCH, buffer=tokens)

        def ours() -> None:
            train_saes(model, items[: tokens // 127 + 1], chosen, config, seed=0, progress=Progress())

        def theirs() -> None:
            one = TopKTrainingSAEConfig(d_in=D, d_sae=WIDTH * D, k=K)
            run = MultiSAETrainingRunner(
                MultiSAETrainingRunnerConfig(
                    saes={str(i): one for i in chosen}, hook_names={str(i): f"blocks.{i}.hook_out" for i in chosen},
                    training_tokens=tokens, train_batch_size_tokens=BATCH, context_size=128, lr=LR, lr_end=LR / 10,
                    n_batches_in_buffer=64, store_batch_size_prompts=32, streaming=False, n_checkpoints=0,
                    checkpoint_path=None, output_path=None, logger=LoggingConfig(log_to_wandb=False), device="cpu",
                ),
                override_dataset=table, override_model=bridge,
            )  # fmt: skip
            run.run()

        ours()  # compile
        seconds: dict[str, list[float]] = {"ours": [], "sae_lens": []}
        for turn in range(3):
            seconds["sae_lens"].append(timed(theirs))
            seconds["ours"].append(timed(ours))
            print(
                f"turn {turn + 1}: " + ", ".join(f"{n} {tokens / v[-1]:,.0f}" for n, v in seconds.items()), flush=True
            )
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["sae_lens"])]
    return {"tokens_per_s": {n: tokens / statistics.median(v) for n, v in seconds.items()},
            "against sae_lens": [statistics.median(ratios), min(ratios), max(ratios)]}  # fmt: skip


def memory_run(millions: int) -> None:
    """One run in a process of its own; prints its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        model, items = model_and_windows(2, 64, millions * 1_000_000 // 127, folder)
        config = SAEConfig(expansion=8, k=16, tokens=millions * 1_000_000, batch=BATCH, buffer=200_000)
        train_saes(model, items, [0, 1], config, seed=0, progress=Progress())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(_args: argparse.Namespace) -> dict[str, Any]:
    peaks = {}
    for millions in (1, 4):
        done = subprocess.run([sys.executable, __file__, "--memory-run", str(millions)], capture_output=True, text=True,
                              check=True)  # fmt: skip
        peaks[f"{millions} M tokens, MB"] = float(done.stdout.split()[-1])
    first, second = peaks.values()
    return {**peaks, "growth": second / first - 1}


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise SystemExit("gpu: there is no CUDA device here")
    d, width, k, steps = 2304, 16384 / 2304, 64, 50
    m, device = 16384, torch.device("cuda")
    ops = TorchOps(torch.bfloat16)
    x = torch.randn(BATCH, d, device=device)
    config = SAEConfig(expansion=1, k=k, batch=BATCH, tokens=steps * BATCH)
    sae = SparseSAE(config, d, device, ops, Processes(), seed=0)
    rows = torch.nn.functional.normalize(torch.randn(m, d, device=device), dim=-1) * 0.1
    sae.bounds = [m]
    sae.state |= {"w_enc": rows, "w_dec": rows.clone(), "b_enc": torch.zeros(m, device=device),
                  "silent": torch.zeros(m, device=device)}  # fmt: skip
    for name in ("w_enc", "w_dec", "b_enc"):
        sae.state |= {f"{name}.{i}": torch.zeros_like(sae.state[name]) for i in "mv"}
    w = rows.bfloat16()

    def clock(work: Callable[[], Any]) -> float:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
        return steps * BATCH / (time.perf_counter() - started)

    step = clock(lambda: sae.step(x, BATCH, LR))
    encoder = clock(lambda: x.bfloat16() @ w.T)
    return {"shape": [d, m, k], "expansion": width, "tokens_per_s": step, "encoder alone": encoder,
            "share": step / encoder, "device": torch.cuda.get_device_name()}  # fmt: skip


def main() -> None:
    parts = {"speed": speed, "capture": capture, "layers": layers, "memory": memory,
             "gpu": gpu}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each contender in each turn")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sae_training"))
    parser.add_argument("--memory-run", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_run:
        memory_run(args.memory_run)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts or ["speed", "capture", "layers", "memory"]:
        result = parts[name](args)
        write_json(args.out / f"{name}.json", result)
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
