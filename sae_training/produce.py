"""From a model and text to a folder of SAEs with their quality report: what `saeunlearn train-saes` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saeunlearn import figures
from saeunlearn.checkpoints import atomic_folder, write_json
from saeunlearn.corpus import Corpus, Window
from saeunlearn.errors import ConfigError, CorpusError, RunError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

from .activations import full_rows, text_windows
from .config import SAEConfig
from .processes import Processes
from .quality import quality
from .storage import write_saes
from .train import check, train_saes

HELD_OUT = 0.05  # share of the records, and at most
HELD_OUT_RECORDS = 300  # of them, that quality is measured on
SCHEMA = 1


def produce(
    model: LanguageModel,
    sources: Sequence[str | Path],
    layers: Sequence[int],
    configs: Sequence[SAEConfig],
    out: Path,
    *,
    seed: int,
    progress: Progress,
    resume: bool = False,
    cache: Path | None = None,
    cache_dtype: str = "bfloat16",
    tracker: str | None = None,
    processes: Processes | None = None,
) -> list[dict[str, Any]]:
    """Train SAEs and write `out`: layer_*/ (or a folder a configuration), saes.json, quality.json, quality.png.

    `sources`: what `Corpus.load` reads, or .safetensors files with a tensor `tokens` of token ids [n] or [rows, n]. A
    part of them is held out for the quality report, whose rows are returned. An unfinished run leaves its state beside
    `out`; with `resume` it goes on from there, exactly. Raises RunError where `out` or that state is in the way,
    CorpusError for data that cannot be read, and what `train_saes` raises.
    """
    processes = processes or Processes()
    if out.exists() and any(out.iterdir()) and not (out / "saes.json").exists():
        raise RunError(f"{out} is not empty and holds no SAEs: choose another --out")
    checkpoint = out.absolute().parent / f".{out.name}.unfinished.safetensors"
    if checkpoint.exists() and not resume:
        raise RunError(f"{checkpoint} is an unfinished run: go on with --resume, or remove it to begin anew")
    check(model, layers, configs)
    train, held = split(model, sources, configs[0], seed)
    track, end = start_tracker(tracker, out, processes)
    trained = train_saes(
        model, train, layers, configs, seed=seed, progress=progress, checkpoint=checkpoint, cache=cache,
        cache_dtype=cache_dtype, processes=processes, track=track,
    )  # fmt: skip
    end()
    rows: list[dict[str, Any]] = []
    if processes.first:
        for config, saes in zip(configs, trained):
            rows += [{"label": config.label, **asdict(q)} for q in quality(model, saes, held, progress)]
        with atomic_folder(out, replaces=lambda p: (p / "saes.json").exists()) as work:
            for config, saes in zip(configs, trained):
                write_saes(saes, work if len(configs) == 1 else work / config.label)
            if len(configs) > 1:
                write_json(work / "saes.json", {"schema": SCHEMA, "configurations": [c.label for c in configs]})
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            write_json(work / "quality.json", {"schema": SCHEMA, "created": created, "saes": rows})
            figures.save(figures.sae_quality(rows), work / "quality.png")
        checkpoint.unlink(missing_ok=True)
    return rows


def split(model: LanguageModel, sources: Sequence[str | Path], config: SAEConfig, seed: int
          ) -> tuple[list[Window], list[Window]]:  # fmt: skip
    """(windows to train on, held-out windows) of text and token sources together."""
    train: list[Window] = []
    held: list[Window] = []
    texts: list[Corpus] = []
    for source in sources:
        if str(source).endswith(".safetensors"):
            rows = token_windows(Path(source), model, config.context)
            n = min(max(1, round(HELD_OUT * len(rows))), HELD_OUT_RECORDS)
            if len(rows) < 2:
                raise CorpusError(f"{source} fills one window only: some must be held out to measure quality")
            train += rows[:-n]
            held += rows[-n:]
        else:
            texts.append(Corpus.load(source))
    if texts:
        both = Corpus(tuple(r for c in texts for r in c), "+".join(c.name for c in texts))
        rest, part = both.split(min(HELD_OUT, HELD_OUT_RECORDS / len(both)), seed)
        train += text_windows(rest, model, config)
        held += text_windows(part, model, config)
    return train, held


def token_windows(file: Path, model: LanguageModel, context: int | None = None) -> list[Window]:
    """Rows of the context's length from the tensor `tokens` [n] or [rows, n], BOS first where the model has one.

    Raises CorpusError for anything but whole-number ids of the model's vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tokens = load_file(file)["tokens"]
    except (SafetensorError, OSError, KeyError) as e:
        raise CorpusError(f"{file}: a token file is safetensors with a tensor `tokens`: {e}") from e
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dim() not in (1, 2) or not tokens.numel():
        shape = f"{tokens.dtype} {list(tokens.shape)}"
        raise CorpusError(f"{file}: tokens must be whole numbers [n] or [rows, n], not {shape}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.d_vocab:
        raise CorpusError(f"{file}: token ids run to {int(tokens.max())}, {model.name} has {model.d_vocab}")
    bos, out = model.bos_id, []
    number = list(range(model.d_vocab))  # one object for each id, or a large file would fill the memory with them
    for row in tokens.view(1, -1) if tokens.dim() == 1 else tokens:
        ids = [number[i] for i in row.tolist()]
        out += full_rows(ids[1:] if bos is not None and ids[0] == bos else ids, model, context)
    if not out:
        raise CorpusError(f"{file} holds no row of two tokens")
    return out


def start_tracker(name: str | None, out: Path, processes: Processes
                  ) -> tuple[Callable[[int, Mapping[str, float]], None] | None, Callable[[], None]]:  # fmt: skip
    """(what to call with each report, what to call at the end) for a tracker of accelerate (tensorboard, trackio …)."""
    if name is None or not processes.first:
        return None, lambda: None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"unknown tracker {name!r}; use one of {', '.join(LOGGER_TYPE_TO_CLASS)}")
    PartialState()
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(out.absolute().parent)} if kind.requires_logging_directory else {}
    try:
        tracker = kind(f"{out.name}-log", **place)
        if hasattr(tracker, "start"):
            tracker.start()
    except ImportError as e:
        raise ConfigError(f"the tracker {name} is not installed: pip install {name}") from e
    return lambda step, figures: tracker.log(dict(figures), step=step), tracker.finish
