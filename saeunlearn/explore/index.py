"""What every feature does on whole texts: statistics, histogram and examples, from one pass over each text.

Stored under the user cache directory: numbers of records and positions, and activations, but no text and no token ids.
The words are read from the data files when they are shown, so a copied index says nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints import PARTIAL, write_json
from ..corpus import Batch, Corpus, Window, batches, windows
from ..errors import ConfigError, CorpusError, RunError
from ..features.scores import FeatureStats, add, batch_stats, check_sae
from ..features.topk import Best, Hits, hits
from ..locks import locked
from ..models import LanguageModel
from ..offsets import fingerprint_vocabulary
from ..progress import Progress
from ..sandbox.build import cache_dir
from ..stored import fingerprint_tensors

if TYPE_CHECKING:
    from .opened import OpenedRun

SCHEMA = 1
MANIFEST = "index.json"
SAMPLE = 24  # active positions of each feature, drawn at random: examples of all quantiles
BEFORE, AFTER = 10, 5  # positions around an example whose activations are kept
LOWEST, PER_OCTAVE, BINS = -12, 4, 128  # bins of log₂ z: from 2^−12 to 2^20, what lies outside is in the end bins
MAX_ACTIVATIONS = 2**24  # of one batch and layer in memory
CHUNK = 4096  # records whose tokens are in memory at a time
KEPT = 64  # layers and texts that an open index keeps in memory
_SUMS = ("sum_sq", "active", "centred_sum")


@dataclass(frozen=True)
class Found:
    """One layer on one text. `total` [m]: Σz. `histogram` [m, BINS]: counts of log₂ z over active positions.

    `top`, `sample`: {"value" [n, m], "place" [3, n, m], "around" [n, m, BEFORE + 1 + AFTER]} as in
    `features.topk.Best`: the largest activations, one a record, and SAMPLE active positions drawn at random, in
    random order.
    """

    stats: FeatureStats
    total: Tensor
    histogram: Tensor
    top: Mapping[str, Tensor]
    sample: Mapping[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """Mean activation over all positions, [m]."""
        return self.total / self.stats.positions

    def quantile(self, feature: int, value: float) -> float:
        """About which share of the feature's activations lies below `value` (linear in log z within a bin)."""
        counts = self.histogram[feature].double()
        place = min(max((math.log2(value) - LOWEST) * PER_OCTAVE, 0.0), BINS - 1e-9)
        below = float(counts[: int(place)].sum()) + (place % 1) * float(counts[int(place)])
        return below / max(1.0, float(counts.sum()))


class _Running:
    """What is collected for one layer while a text is read."""

    def __init__(self, n: int, m: int, device: torch.device) -> None:
        self.stats: FeatureStats | None = None
        self.total = torch.zeros(m, dtype=torch.float64)
        self.histogram = torch.zeros(m * BINS, dtype=torch.long, device=device)
        self.top = Best(n, m, BEFORE, AFTER, distinct=True, device=device)
        self.sample = Best(SAMPLE, m, BEFORE, AFTER, distinct=False, device=device)

    def update(self, h: Hits, one: FeatureStats, random: torch.Generator) -> None:
        self.stats = add(self.stats, one) if self.stats else one
        self.total += h.z.sum(0, dtype=torch.float64).cpu()
        value = h.value
        bins = ((value.float().log2() - LOWEST) * PER_OCTAVE).floor().clamp(0, BINS - 1).long()
        self.histogram.index_add_(0, h.feature * BINS + bins, torch.ones_like(bins))
        self.top.update(h, value)
        self.sample.update(h, torch.rand(len(value), generator=random, dtype=torch.float64).to(value.device))

    def tensors(self) -> dict[str, Tensor]:
        assert self.stats is not None
        out = {name: getattr(self.stats, name) for name in _SUMS}
        out["sums"] = torch.tensor(
            [self.stats.positions, self.stats.norm_sum, self.stats.residual_sum], dtype=torch.float64
        )
        out |= {"total": self.total, "histogram": self.histogram.view(-1, BINS).int()}
        for name, best in (("top", self.top), ("sample", self.sample)):
            out |= {f"{name}.{k}": getattr(best, k) for k in ("value", "place", "around")}
        return {k: t.cpu().contiguous() for k, t in out.items()}


class Index:
    """An index on disk; `document` is its index.json. Reading from several threads is safe."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder, self.document = folder, document
        self.layers: list[int] = sorted(int(i) for i in document["saes"])
        self.texts: list[str] = [t["name"] for t in document["texts"]]
        self._lock = threading.Lock()
        self._read = lru_cache(maxsize=KEPT)(self._load)

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Raises RunError where there is no finished index of this schema."""
        folder = Path(folder)
        document = _document(folder)
        if document is None:
            raise RunError(f"{folder} is no index of features: it has no {MANIFEST}")
        index = cls(folder, document)
        if missing := [f for f in index.files() if not (folder / f).is_file()]:
            raise RunError(f"the index in {folder} is not finished, {missing[0]} is missing: build it again")
        return index

    def files(self) -> list[str]:
        return [_file(i, layer) for i in range(len(self.texts)) for layer in self.layers]

    def at(self, text: str, layer: int) -> Found:
        """Raises ConfigError for a text or layer that is not in the index, RunError for a damaged file."""
        if text not in self.texts or layer not in self.layers:
            raise ConfigError(f"the index holds the layers {self.layers} on {self.texts}, not {layer} on {text!r}")
        with self._lock:
            return self._read(text, layer)

    def _load(self, text: str, layer: int) -> Found:
        from safetensors import SafetensorError
        from safetensors import torch as st

        file = self.folder / _file(self.texts.index(text), layer)
        try:
            t = st.load_file(file)
            positions, norm, residual = t["sums"].tolist()
            stats = FeatureStats(t["sum_sq"], t["active"], int(positions), norm, residual, t["centred_sum"])
            top, sample = ({k: t[f"{name}.{k}"] for k in ("value", "place", "around")} for name in ("top", "sample"))
            return Found(stats, t["total"], t["histogram"], top, sample)
        except (OSError, KeyError, ValueError, SafetensorError) as e:
            raise RunError(f"{file} is damaged or gone: delete {self.folder} and build the index again ({e})") from e

    def check(self, model: LanguageModel, saes: Mapping[int, Any], texts: Mapping[str, Corpus]) -> None:
        """Raises RunError, naming what differs, unless the index was made with these."""
        _same(self.folder, self.document, describe(model, saes, texts))


def describe(model: LanguageModel, saes: Mapping[int, Any], texts: Mapping[str, Corpus]) -> dict[str, Any]:
    """What an index is made from: fingerprints and counts."""
    return {
        "model": {"name": model.name, "fingerprint": model.fingerprint(),
                  "vocabulary": fingerprint_vocabulary(model.vocabulary)},
        "saes": {str(i): {"d_sae": int(s.cfg.d_sae), "architecture": s.cfg.architecture(), "fingerprint":
                 fingerprint_tensors(s.state_dict().items())} for i, s in sorted(saes.items())},
        "texts": [{"name": n, "records": len(c), "fingerprint": c.fingerprint()} for n, c in texts.items()],
    }  # fmt: skip


def index_folder(model: LanguageModel, saes: Mapping[int, Any], texts: Mapping[str, Corpus]) -> Path:
    """Where the index of these lies: $SAEUNLEARN_HOME, else the user cache directory."""
    key = hashlib.sha256(json.dumps([SCHEMA, describe(model, saes, texts)], sort_keys=True).encode()).hexdigest()
    return cache_dir() / "explorer" / key[:16]


def run_index(run: OpenedRun, progress: Progress | None = None) -> Index:
    """The index of an open run's texts, built where it is not in the cache; the model is held for a batch at a time."""
    with run.lock:
        folder = index_folder(run.model, run.saes, run.texts)
    return build_index(run.model, run.saes, run.texts, folder, progress or Progress(), lock=run.lock)


def build_index(
    model: LanguageModel, saes: Mapping[int, Any], texts: Mapping[str, Corpus], out: Path, progress: Progress, *,
    n: int = 8, seed: int = 0, lock: AbstractContextManager[Any] | None = None,
) -> Index:  # fmt: skip
    """One pass over each text for all its layers that are not in `out` yet; a killed or cancelled build goes on there.

    `n`: top examples of a feature and text. `lock`: held while the model is used, for one batch at a time. Memory:
    about (n + SAMPLE)·(BEFORE + AFTER + 6) + BINS numbers a feature and layer, whatever the size of the text.
    Raises RunError where `out` belongs to another model, SAEs, texts or settings; ConfigError,
    SAEMismatchError, NonFiniteError, Cancelled.
    """
    if not saes or not texts or n < 1:
        raise ConfigError(f"an index needs SAEs, texts and n ≥ 1; given: {len(saes)}, {len(texts)} and n = {n}")
    for layer, sae in saes.items():
        check_sae(sae, layer, model)
    hold = lock or nullcontext()
    with hold:
        made_from = describe(model, saes, texts)
    settings = {"n": n, "sample": SAMPLE, "before": BEFORE, "after": AFTER, "bins": [LOWEST, PER_OCTAVE, BINS]}
    versions = {name: importlib.metadata.version(name) for name in ("saeunlearn", "torch", "transformers", "sae_lens")}
    document = {"schema": SCHEMA, "seed": seed, "settings": settings, "versions": versions, **made_from}
    with locked(Path(out) / "lock", progress, f"it builds the index in {out}"):
        if (earlier := _document(Path(out))) is None:
            write_json(Path(out) / MANIFEST, document)
        else:
            _same(Path(out), earlier, {"seed": seed, "settings": settings, **made_from})
        for number, (name, corpus) in enumerate(texts.items()):
            missing = {i: s for i, s in saes.items() if not (Path(out) / _file(number, i)).exists()}
            running = {i: _Running(n, int(s.cfg.d_sae), model.device) for i, s in missing.items()}
            if missing:
                what, size = f"index of {name}", batch_tokens(saes)
                _read_text(model, missing, corpus, running, size, seed, progress, what, hold)
            for layer, found in running.items():
                save_tensors(found.tensors(), Path(out) / _file(number, layer))
    return Index.open(out)


@torch.no_grad()
def _read_text(model: LanguageModel, saes: Mapping[int, Any], corpus: Corpus, running: Mapping[int, _Running],
               max_tokens: int, seed: int, progress: Progress, what: str, hold: AbstractContextManager[Any]
               ) -> None:  # fmt: skip
    random = {i: torch.Generator().manual_seed(seed * 1000 + i) for i in saes}  # the same whichever layers are missing
    for batch, records, first in text_batches(corpus, model, max_tokens, progress, what, hold):
        b = batch.to(model.device)
        with hold:
            for layer, z, one in batch_stats(model, saes, b):
                running[layer].update(hits(z, b, records, first), one, random[layer])


def text_batches(corpus: Corpus, model: LanguageModel, max_tokens: int, progress: Progress, what: str,
                 hold: AbstractContextManager[Any]) -> Iterator[tuple[Batch, Tensor, int]]:  # fmt: skip
    """(batch, records, number) over a whole text as one stage, counted in records; `batch.records` holds indices of
    windows, `records` the record of each, and window 0 has the given number in the text. `hold` is held to tokenise.
    """
    progress.start(what, len(corpus))
    number = 0
    for items, n in tokenised(corpus, model, hold):
        records = torch.tensor([w.record for w in items])
        begins = torch.cat([torch.tensor([True]), records[1:] != records[:-1]])
        for batch in batches([replace(w, record=i) for i, w in enumerate(items)], model.pad_id, max_tokens=max_tokens):
            yield batch, records, number
            progress.step(int(begins[list(batch.records)].sum()))
        progress.step(n - int(begins.sum()))  # records without a window
        number += len(items)
    progress.finish()


def tokenised(corpus: Corpus, model: LanguageModel, hold: AbstractContextManager[Any] | None = None
              ) -> Iterator[tuple[list[Window], int]]:  # fmt: skip
    """(the windows of CHUNK records at a time, their number of records), together those of `corpus.windows`: the tokens
    of a whole text take many times the room of what is kept of it. Raises CorpusError where there is no window at all.
    """
    found = False
    for first in range(0, len(corpus), CHUNK):
        part = Corpus(corpus.records[first : first + CHUNK], corpus.name)
        items: list[Window] = []
        # One part without a window is no error; `hold`: an Erasure of a token replaces the tokenizer.
        with hold or nullcontext(), suppress(CorpusError):
            items = [replace(w, record=first + w.record) for w in windows(part, model)]
        found |= bool(items)
        if items:
            yield items, len(part)
    if not found:
        raise CorpusError(f"{corpus.name}: no record is longer than one token")


def batch_tokens(saes: Mapping[int, Any]) -> int:
    """Tokens in a batch, so that the activations of one SAE stay within MAX_ACTIVATIONS."""
    return max(64, min(4096, MAX_ACTIVATIONS // max(int(s.cfg.d_sae) for s in saes.values())))


def _file(text: int, layer: int) -> str:
    return f"text-{text}-layer-{layer}.safetensors"


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Whole or not at all."""
    from safetensors import torch as st

    temp = file.with_name(f".{file.name}{PARTIAL}")
    try:
        st.save_file(tensors, temp)
        os.replace(temp, file)
    finally:
        temp.unlink(missing_ok=True)


def _document(folder: Path) -> dict[str, Any] | None:
    """index.json, or None where there is none. Raises RunError for a damaged one or another schema."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise RunError(f"{file} has schema {document['schema']}, this version reads {SCHEMA}: delete {folder}")
        return document
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{file} is damaged: delete {folder} and build the index again ({e!r})") from e


def _same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # A model's name is that of its folder, which may be moved.
    plain = [{k: {**v, "name": ""} if k == "model" else v for k, v in d.items()} for d in (was, now)]
    if other := [k for k in now if plain[0].get(k) != plain[1][k]]:
        raise RunError(
            f"the index in {folder} was made with another {' and '.join(other)}: build one in a folder of its own"
        )
