"""Train many SAEs at once, on one stream of activations, as sae_lens objects."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn import __version__
from saeunlearn.corpus import Corpus, Window
from saeunlearn.errors import Cancelled, ConfigError, NonFiniteError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

from .activations import Shuffle, capturing, text_windows
from .cache import cached
from .checkpoint import load_checkpoint, save_checkpoint
from .config import SPARSE, SAEConfig
from .dense import DenseSAE
from .processes import Processes
from .sparse import CPUOps, TorchOps
from .topk import SparseSAE
from .workers import Workers

MEMORY_BYTES = 2**30  # of activations held for shuffling where `buffer` does not say it
CHECKPOINT_SECONDS = 60.0
OUTLIER = 10.0  # times the median norm
SHARED = ("tokens", "batch", "buffer", "context", "pack", "drop_outliers")  # settings of the stream that all SAEs read


@dataclass
class Stream:
    """What all SAEs of a layer read: its scale and its outliers."""

    scale: float  # brings the mean norm to √d
    limit: float  # norm above which a position is an outlier
    variance: float  # Σ Var of the scaled activations: what an SAE that explains nothing leaves
    outliers: float = 0.0  # share of positions so far


def train_saes(
    model: LanguageModel,
    corpus: Corpus | Sequence[Window],
    layers: Sequence[int],
    configs: SAEConfig | Sequence[SAEConfig],
    *,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
    cache: Path | None = None,
    cache_dtype: str = "bfloat16",
    processes: Processes | None = None,
    track: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Any:
    """{layer: sae_lens SAE} trained on the residual stream after each of `layers`, from one forward pass.

    With a list of configurations a list of such dicts, all trained on the same stream. `corpus` is text, or windows of
    token ids. Inputs are scaled to norm √d while training; the scale is folded into the weights at the end.

    `checkpoint` is a file that is kept up to date, and removed by whoever saves the result: where it exists the
    training goes on from there, bit for bit as if it had never stopped. `cache` is a folder for the activations,
    which later runs reuse. `track` gets the figures of every report.

    Raises ConfigError for settings out of range, ModelError for a layer that is not there, NonFiniteError for NaN or
    infinite activations or losses, RunError for a checkpoint of another run, Cancelled.
    """
    many = [configs] if isinstance(configs, SAEConfig) else list(configs)
    check(model, layers, many)
    processes = processes or Processes()
    items = text_windows(corpus, model, many[0]) if isinstance(corpus, Corpus) else list(corpus)
    data = corpus.fingerprint() if isinstance(corpus, Corpus) else _fingerprint(items)
    made = {"saeunlearn": __version__, "seed": seed, "layers": list(layers), "torch": torch.__version__,
            "model_fingerprint": model.fingerprint(), "corpus_fingerprint": data,
            "cache_dtype": None if cache is None else cache_dtype}  # fmt: skip
    key = hashlib.sha256(json.dumps([made, [asdict(c) for c in many]], sort_keys=True).encode()).hexdigest()
    capture = capturing(model, items, layers)
    if cache is not None:
        capture = cached(capture, cache, items, layers, model, data, cache_dtype, progress, processes)
    buffer = many[0].buffer or max(1, MEMORY_BYTES // (4 * len(layers) * model.d_model))
    shuffle = Shuffle(
        items, capture, (len(layers), model.d_model), many[0].batch, buffer, seed, model.device, processes
    )
    with Workers() as workers:
        run = _Run(shuffle, layers, many, model.device, workers, seed)
        if checkpoint is not None and checkpoint.exists():
            run.resume(*load_checkpoint(checkpoint, key, model.device))
            progress.note(f"going on from step {run.done} of {run.steps} ({checkpoint})")
        _loop(run, progress, checkpoint, key, track)
        out = [{i: run.finished(n, c, made, model.name) for n, i in enumerate(layers)} for c in range(len(many))]
    return out[0] if isinstance(configs, SAEConfig) else out


def check(model: LanguageModel, layers: Sequence[int], configs: Sequence[SAEConfig]) -> None:
    """Raises ConfigError or ModelError for what cannot be trained."""
    model.check_layers(layers)
    if len(set(layers)) < len(layers):
        raise ConfigError(f"layers {list(layers)} name a layer twice")
    if not configs:
        raise ConfigError("no SAE configuration was given")
    for c in configs:
        c.check(model.d_model)
        if any(getattr(c, name) != getattr(configs[0], name) for name in SHARED):
            raise ConfigError(f"SAEs that are trained together share {', '.join(SHARED)}")
    if len({c.label for c in configs}) < len(configs):
        raise ConfigError("two of the SAE configurations have the same architecture, width and k")


class _Run:
    """All SAEs of a run, [layer][configuration], and how far they are."""

    def __init__(self, shuffle: Shuffle, layers: Sequence[int], configs: Sequence[SAEConfig], device: torch.device,
                 workers: Workers, seed: int) -> None:  # fmt: skip
        self.shuffle, self.layers, self.configs = shuffle, list(layers), list(configs)
        self.seed, self.device = seed, device
        self.steps = math.ceil(configs[0].tokens / shuffle.batch)
        self.done = 0
        self.streams: list[Stream] = []
        self.saes: list[list[SparseSAE | DenseSAE]] = []
        self.fvu = [[1.0] * len(configs) for _ in layers]
        self.active = [[0.0] * len(configs) for _ in layers]
        self.ops = {
            dtype: CPUOps(workers, dtype) if device.type == "cpu" else TorchOps(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }

    def begin(self, first: Tensor) -> None:
        """Measure the streams on the first batch and make the SAEs."""
        together = self.shuffle.processes
        d = first.shape[-1]
        for h in first:
            norms = together.gather(h.norm(dim=-1))
            limit = OUTLIER * float(norms.median())
            kept = h[h.norm(dim=-1) <= limit] if self.configs[0].drop_outliers else h
            totals = torch.cat([kept.sum(0), kept.pow(2).sum(0), kept.norm(dim=-1).sum()[None],
                                torch.tensor([float(len(kept))], device=h.device)])  # fmt: skip
            together.sum([totals])
            n = float(totals[-1])
            mean, square = totals[:d] / n, totals[d : 2 * d] / n
            scale = math.sqrt(d) / max(float(totals[-2]) / n, 1e-12)
            variance = float((square - mean**2).sum().clamp_min(1e-12)) * scale**2
            self.streams.append(Stream(scale, limit, variance))
        self.saes = self._make()

    def _make(self) -> list[list[SparseSAE | DenseSAE]]:
        def one(config: SAEConfig) -> SparseSAE | DenseSAE:
            common = (self.shuffle.processes, self.seed)
            if config.architecture in SPARSE:
                return SparseSAE(config, d, self.device, self.ops[getattr(torch, config.encoder_dtype)], *common)
            return DenseSAE(config, d, self.device, *common)

        d = self.shuffle.shape[1]
        return [[one(c) for c in self.configs] for _ in self.layers]

    def step(self, h: Tensor) -> None:
        """One batch [layers, n, d] for every SAE."""
        for n, stream in enumerate(self.streams):
            norms = h[n].norm(dim=-1)
            far = norms > stream.limit
            counts = torch.stack([far.sum(), torch.tensor(len(far), device=far.device)]).float()
            self.shuffle.processes.sum([counts])
            outliers, total = map(int, counts.tolist())
            stream.outliers += (outliers / total - stream.outliers) / (self.done + 1)
            x = h[n] * stream.scale
            if self.configs[0].drop_outliers and outliers:
                x, total = x[~far], total - outliers
            for c, sae in enumerate(self.saes[n]):
                config = self.configs[c]
                mse, active = sae.step(x, total, config.lr * rate(self.done, self.steps))
                if not math.isfinite(mse):
                    raise NonFiniteError(
                        f"the loss of the {config.label} SAE at layer {self.layers[n]} is {mse} at step {self.done}: "
                        "lower lr"
                    )
                new = max(0.05, 1 / (self.done + 1))
                self.fvu[n][c] += new * (mse / stream.variance - self.fvu[n][c])
                self.active[n][c] += new * (active - self.active[n][c])
        self.done += 1

    def figures(self) -> dict[str, float]:
        """Running means: the share of variance left unexplained (FVU) of each SAE."""
        one = len(self.configs) == 1
        return {
            f"fvu{layer}" if one else f"fvu{layer}/{c.label}": self.fvu[n][i]
            for n, layer in enumerate(self.layers)
            for i, c in enumerate(self.configs)
        }

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: (tensors, JSON)."""
        tensors = {
            f"{n}.{c}.{name}": t
            for n, row in enumerate(self.saes)
            for c, sae in enumerate(row)
            for name, t in sae.state.items()
        }
        return tensors, {"done": self.done, "streams": [asdict(s) for s in self.streams], "fvu": self.fvu,
                         "active": self.active}  # fmt: skip

    def resume(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from what `stored` returned."""
        self.done, self.fvu, self.active = info["done"], info["fvu"], info["active"]
        self.streams = [Stream(**s) for s in info["streams"]]
        self.saes = self._make()
        for n, row in enumerate(self.saes):
            for c, sae in enumerate(row):
                for name in sae.state:
                    sae.state[name] = tensors[f"{n}.{c}.{name}"].to(sae.state[name].device)

    def finished(self, n: int, c: int, made: Mapping[str, Any], model_name: str) -> Any:
        """The inference SAE of layer number n, configuration c, with its provenance."""
        from sae_lens.saes.sae import SAEMetadata

        layer, config = self.layers[n], self.configs[c]
        metadata = SAEMetadata(model_name=model_name, hook_name=f"blocks.{layer}.hook_resid_post", hook_head_index=None)
        sae = self.saes[n][c].finished(self.streams[n].scale, metadata)
        sae.cfg.metadata["saeunlearn"] = {
            **made, "config": asdict(config), "outliers": self.streams[n].outliers, "train_fvu": self.fvu[n][c],
            "train_l0": self.active[n][c],
        }  # fmt: skip
        return sae.requires_grad_(False).eval()


def _loop(run: _Run, progress: Progress, checkpoint: Path | None, key: str,
          track: Callable[[int, Mapping[str, float]], None] | None) -> None:  # fmt: skip
    size, processes = run.shuffle.batch, run.shuffle.processes
    progress.start(f"SAEs on layers {','.join(map(str, run.layers))}", run.steps * size)
    if run.done:
        progress.step(run.done * size)
    began, first, saved = time.monotonic(), run.done, time.monotonic()

    def keep() -> None:
        if checkpoint is not None and processes.first and run.saes:
            save_checkpoint(checkpoint, key, *run.stored())

    stream = run.shuffle.from_step(run.done)
    try:
        while run.done < run.steps:
            h = next(stream)
            if not run.saes:
                run.begin(h)
            run.step(h)
            figures = run.figures()
            speed = (run.done - first) * size / (time.monotonic() - began)
            progress.step(size, **figures, tokens_per_s=speed)
            if track is not None:
                track(run.done, {**figures, "tokens_per_s": speed})
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                keep()
                saved = time.monotonic()
    except (Cancelled, KeyboardInterrupt):
        keep()
        raise
    keep()
    for layer, s in zip(run.layers, run.streams):
        if s.outliers:
            left = "left out" if run.configs[0].drop_outliers else "kept: drop_outliers leaves them out"
            progress.note(f"layer {layer}: {s.outliers:.2%} of the positions have a norm above {OUTLIER:.0f} × the "
                          f"median ({left})")  # fmt: skip
    progress.finish(**run.figures())


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a rise over 5 % of the steps, and a linear fall over the last 20 %."""
    return min(1.0, (step + 1) / max(1.0, 0.05 * steps), (steps - step) / (0.2 * steps))


def _fingerprint(items: Sequence[Window]) -> str:
    return hashlib.sha256(json.dumps([w.ids for w in items]).encode()).hexdigest()
