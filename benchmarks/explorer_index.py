"""The index of features: its speed beside the bare forward pass, its memory, and its top-k beside brute force.

    python benchmarks/explorer_index.py [--tokens 200000] [--width 1024]

On the sandbox's model, its texts repeated until there are so many tokens, with random TopK SAEs on all layers. The bare
pass stops at the deepest layer as the index does; the two are compared in CPU seconds, which other work on the machine
does not change. Memory: the peak over what the process held before. Brute force: the
dense activations of a part of the text, sorted. Prints and writes explorer_index.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, batches, windows
from saeunlearn.explore.index import AFTER, BEFORE, BINS, SAMPLE, Index, batch_tokens, build_index
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import SandboxConfig, build

SCHEMA = 1
N = 8
PART = 400  # records for brute force


def random_sae(layer: int, d: int, width: int, k: int) -> Any:
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    where = SAEMetadata(model_name="sandbox", hook_name=f"blocks.{layer}.hook_resid_post")
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=width, k=k, metadata=where))
    rows = torch.randn(width, d, generator=torch.Generator().manual_seed(layer))
    sae.W_dec.data = rows / rows.norm(dim=-1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    return sae.requires_grad_(False).eval()


def of_size(texts: Corpus, model: LanguageModel, tokens: int) -> Corpus:
    """The texts again and again, until there are so many tokens."""
    each = sum(len(w.ids) for w in windows(texts, model))
    return Corpus((texts.records * (tokens // each + 1))[: round(len(texts) * tokens / each)], "text")


class Peak:
    """The most memory (bytes) that the process holds within the context, over what it held before."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *_exc: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def size(self) -> int:
        return self.most - self.before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
def bare(model: LanguageModel, saes: dict[int, Any], corpus: Corpus) -> float:
    """CPU seconds of the forward passes alone."""
    parts = list(batches(windows(corpus, model), model.pad_id, max_tokens=batch_tokens(saes)))
    started = time.process_time()
    for b in parts:
        model.capture(b.ids, list(saes), b.attention_mask)
    return time.process_time() - started


@torch.no_grad()
def brute_force(model: LanguageModel, sae: Any, layer: int, corpus: Corpus, index: Index) -> dict[str, Any]:
    """Seconds, and the largest difference of a top value from the sorted dense activations, one a record."""
    started = time.perf_counter()
    peaks = torch.zeros(len(corpus), int(sae.cfg.d_sae))
    for w in windows(corpus, model):
        z = sae.encode(model.capture(torch.tensor([w.ids]), [layer])[layer][0, 1:])
        peaks[w.record] = torch.maximum(peaks[w.record], z.max(0).values)
    best = peaks.sort(dim=0, descending=True).values[:N]
    seconds = time.perf_counter() - started
    off = (best - index.at("text", layer).top["value"]).abs().max()
    return {"records": len(corpus), "seconds": seconds, "largest_difference": float(off), "values": best.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/explorer_index.json"))
    args = parser.parse_args()
    box = build(SandboxConfig(), ConsoleProgress())
    model = LanguageModel.open(box.model, device="cpu")
    texts = Corpus.load(box.retain)
    saes = {i: random_sae(i, model.d_model, args.width, args.k) for i in range(args.layers)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = Corpus(texts.records[:PART], "part")
        index = build_index(model, saes, {"text": small}, Path(folder) / "part", Progress(), n=N)
        deepest = args.layers - 1
        found = brute_force(model, saes[deepest], deepest, small, index)
        for tokens in (args.tokens // 4, args.tokens):  # twice, to see that the memory does not grow with the text
            corpus = of_size(texts, model, tokens)
            items = windows(corpus, model)
            size = sum(len(w.ids) for w in items)
            forward = bare(model, saes, corpus)
            with Peak() as peak:
                started, cpu = time.perf_counter(), time.process_time()
                build_index(model, saes, {"text": corpus}, Path(folder) / str(tokens), ConsoleProgress(), n=N)
                seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            held = sum(f.stat().st_size for f in (Path(folder) / str(tokens)).glob("*.safetensors"))
            rows.append({
                "tokens": size, "records": len(corpus), "seconds": seconds, "tokens_per_second": size / seconds,
                "cpu_seconds": cpu, "forward_cpu_seconds": forward, "share_of_forward_speed": forward / cpu,
                "tokens_per_cpu_second": size / cpu, "forward_tokens_per_cpu_second": size / forward,
                "peak_bytes": peak.size, "index_bytes": held,
            })  # fmt: skip
    result = {
        "schema": SCHEMA, "settings": {"width": args.width, "k": args.k, "layers": args.layers, "n": N,
                                       "sample": SAMPLE, "around": BEFORE + 1 + AFTER, "bins": BINS},
        "threads": torch.get_num_threads(), "rows": rows, "brute_force": found,
        "versions": {n: importlib.metadata.version(n) for n in ("saeunlearn", "torch", "transformers", "sae_lens")},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
