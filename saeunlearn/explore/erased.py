"""What an Erasure does to every feature on whole texts: means and firing rates with it applied, kept by the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, RunError
from ..features.scores import batch_stats
from ..progress import Progress
from .index import Index, batch_tokens, save_tensors, text_batches
from .opened import OpenedRun


@torch.no_grad()
def add_erasure(run: OpenedRun, index: Index, name: str, progress: Progress) -> None:
    """Measure an Erasure of the run on every text of the index, unless that was done; a killed one goes on by text.

    The model is held for one batch at a time, so others can use it meanwhile. Raises ConfigError for an unknown name,
    NonFiniteError, Cancelled.
    """
    if name not in run.erasures:
        raise ConfigError(f"there is no Erasure {name!r}; there are {', '.join(run.erasures)}")
    for number, text in enumerate(index.texts):
        if (file := _file(run, index, name, number)).exists():
            continue
        sums = {i: [torch.zeros(int(s.cfg.d_sae), dtype=torch.float64) for _ in range(2)] for i, s in run.saes.items()}
        size, what = batch_tokens(run.saes), f"{name} on {text}"
        for batch, _, _ in text_batches(run.texts[text], run.reader, size, progress, what, run.reading):
            with run.edited(name) as model:
                for layer, z, one in batch_stats(model, run.saes, batch.to(model.device)):
                    total, active = sums[layer]
                    total += z.sum(0, dtype=torch.float64).cpu()
                    active += one.active
        save_tensors({f"{i}.{k}": t for i, s in sums.items() for k, t in zip(("total", "active"), s)}, file)


def change_of(run: OpenedRun, index: Index, layer: int, feature: int) -> dict[str, Any]:
    """{name: {text: {"mean_before", "mean_after", "rate_before", "rate_after"}}}, over positions, of what
    `add_erasure` has measured."""
    out: dict[str, Any] = {}
    for name in run.erasures:
        for number, text in enumerate(index.texts):
            if (sums := _sums(run, _file(run, index, name, number))) is not None:
                before = index.at(text, layer)
                n = before.stats.positions
                out.setdefault(name, {})[text] = {
                    "mean_before": float(before.mean[feature]),
                    "mean_after": float(sums[f"{layer}.total"][feature]) / n,
                    "rate_before": float(before.stats.density[feature]),
                    "rate_after": float(sums[f"{layer}.active"][feature]) / n,
                }
    return out


def _sums(run: OpenedRun, file: Path) -> dict[str, Tensor] | None:
    """The file's content, kept; None where there is none yet."""
    from safetensors import SafetensorError
    from safetensors import torch as st

    if file not in run.cache and file.exists():
        try:
            run.cache[file] = st.load_file(file)
        except (OSError, SafetensorError) as e:
            raise RunError(f"{file} is damaged: delete it") from e
    return run.cache.get(file)


def _file(run: OpenedRun, index: Index, name: str, text: int) -> Path:
    return index.folder / f"erasure-{run.erasures[name].id[:16]}-text-{text}.safetensors"
