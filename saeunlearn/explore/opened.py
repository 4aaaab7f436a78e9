"""An open run directory: the model, SAEs, selection, texts and Erasures of a finished run, for many visitors at once.

There is one model. Who edits it, hooks into it or generates with it holds `lock`, through `edited`; everything else
(words, documents, an index) can be read without.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..corpus import Corpus
from ..erasure import Erasure, WeightDelta
from ..errors import ConfigError, SelectionError
from ..features.selection import Selection, check_selection
from ..features.subspace import subspaces
from ..models import LanguageModel
from ..pipeline import RunConfig, ready_saes, retain_groups
from ..progress import Progress
from ..reopen import read_object, reopen
from .index import tokenised

ORIGINAL = "original"  # the name of the unedited model among the Erasures' names
DOCUMENTS = ("evaluation", "attacks", "report", "examples")  # JSON files of a run directory


@dataclass(frozen=True)
class Words:
    """The token ids of a text's windows, one after the other: window i is ids[starts[i] : starts[i + 1]]."""

    ids: np.ndarray
    starts: np.ndarray

    def window(self, i: int) -> list[int]:
        return self.ids[self.starts[i] : self.starts[i + 1]].tolist()


@dataclass(eq=False)
class OpenedRun:
    """What `open_run` gives. `texts` by name: forget, and the retain set by its field `set` (near, far, …).

    `documents`: run, and evaluation, attacks, report, examples where the run has them. `info`: run.json.
    """

    root: Path
    config: RunConfig
    model: LanguageModel
    saes: Mapping[int, Any]
    selection: Selection | None
    forget: Corpus
    retain: Corpus
    questions: Corpus | None
    texts: Mapping[str, Corpus]
    erasures: dict[str, Erasure]
    documents: Mapping[str, dict[str, Any]]
    lock: threading.RLock = field(default_factory=threading.RLock)
    cache: dict[Any, Any] = field(default_factory=dict)  # of the views; bounded by layers, texts and features

    def __post_init__(self) -> None:
        # A tokenizer is not safe to use from two threads, and an Erasure of a token replaces the model's.
        self.reader = copy.copy(self.model)
        self.reader.tokenizer = copy.deepcopy(self.model.tokenizer)
        self.reading = threading.RLock()
        self._texts: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        """The original and every Erasure."""
        return [ORIGINAL, *self.erasures]

    def check_name(self, name: str) -> None:
        """Raises ConfigError for a name that is none of `names`."""
        if name not in self.names:
            raise ConfigError(f"there is no Erasure {name!r}; there are {', '.join(self.names)}")

    @contextlib.contextmanager
    def edited(self, name: str) -> Iterator[LanguageModel]:
        """Within the context the model has this Erasure applied (none for ORIGINAL) and no one else uses it.

        Raises ConfigError for an unknown name.
        """
        self.check_name(name)
        with self.lock:
            if name == ORIGINAL:
                yield self.model
            else:
                with self.erasures[name].apply(self.model):
                    yield self.model

    def sae(self, layer: int) -> Any:
        """Raises SelectionError where the run has no SAE for this layer."""
        if layer not in self.saes:
            raise SelectionError(f"the run has SAEs for layers {sorted(self.saes)}, not {layer}")
        return self.saes[layer]

    def direction_logits(self, rows: Tensor, tokens: list[int] | None = None) -> Tensor:
        """`LanguageModel.direction_logits` of the original, of the tokens that the tokenizer knows."""
        # Most Erasures leave the output matrix alone, so that nobody has to wait for the model.
        edits = any(isinstance(p, WeightDelta) and _is_output(p.name) for e in self.erasures.values() for p in e.parts)
        with self.lock if edits else contextlib.nullcontext():
            return self.model.direction_logits(rows, tokens)[:, : len(self.reader.tokenizer)]

    def bases(self) -> tuple[Tensor, Tensor] | None:
        """(U_rel, U_irr) of the selection as in `features.subspace.subspaces`; None without a selection."""
        if self.selection is None:
            return None
        if "bases" not in self.cache:
            w_dec = self.sae(self.selection.layer).W_dec.detach()
            self.cache["bases"] = subspaces(w_dec, self.selection.relevant, self.selection.irrelevant)
        return self.cache["bases"]

    def words(self, text: str) -> Words:
        """The tokens of one of `texts`, read and tokenised the first time. Raises ConfigError for an unknown one."""
        if text not in self.texts:
            raise ConfigError(f"the run has no text {text!r}; it has {', '.join(self.texts)}")
        with self.reading:
            if ("words", text) not in self.cache:
                rows = [np.array(w.ids, np.int32) for items, _ in tokenised(self.texts[text], self.reader)
                        for w in items]  # fmt: skip
                starts, ids = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
                self.cache["words", text] = Words(ids, starts)
        return self.cache["words", text]

    def token_texts(self, ids: list[int], edited: LanguageModel | None = None) -> list[str]:
        """Each token as text, with its leading space; "�" where it is only a part of a character.

        `edited`: the model with an Erasure applied, for the ids of tokens that the Erasure added.
        """
        with self.reading:
            known = len(self.reader.tokenizer)
            return [self._token_text(i) if i < known or edited is None
                    else edited.tokenizer.convert_ids_to_tokens(i) or "" for i in ids]  # fmt: skip

    def _token_text(self, i: int) -> str:
        if i not in self._texts:
            # Behind another token, because some tokenizers drop the space that a text begins with.
            anchor = self.reader.tokenizer("a", add_special_tokens=False).input_ids[-1:]
            before, both = (self.reader.tokenizer.decode(x, clean_up_tokenization_spaces=False)
                            for x in (anchor, [*anchor, i]))  # fmt: skip
            self._texts[i] = both[len(before) :]
        return self._texts[i]

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS."""
        with self.reading:
            return self.reader.tokenizer(text, add_special_tokens=False).input_ids


def _is_output(parameter: str) -> bool:
    """Whether a change of this parameter can change what the output matrix and the norm before it do."""
    return not any(f".{n}." in parameter for n in ("layers", "h"))


def open_run(
    root: str | Path, *, erasures: Mapping[str, str | Path] | None = None, device: str | None = None,
    progress: Progress | None = None,
) -> OpenedRun:  # fmt: skip
    """Open a finished run directory: its own Erasure is named after its method, `erasures` are further ones by name.

    Raises RunError for what is no finished run or whose model or data changed; ModelError, CorpusError,
    SAEMismatchError, SelectionError, ErasureError for a piece that is gone, damaged or of another model.
    """
    run, info = reopen(root, progress or Progress(), device=device)
    own = run.root / "saes"
    if run.config.saes:
        saes = ready_saes(run.model, run.config.saes, run.config.layers)
    else:
        saes = ready_saes(run.model, str(own), run.config.layers) if own.is_dir() else {}
    selection = Selection.load(run.selection_file) if run.selection_file.exists() else None
    if selection is not None and saes:
        check_selection(selection, run.model, saes)
    loaded = {run.config.method: Erasure.load(run.erasure_dir)}
    for name, folder in (erasures or {}).items():
        if name in loaded or name == ORIGINAL:
            raise ConfigError(f"the name {name!r} of an Erasure is taken: choose another")
        loaded[name] = Erasure.load(folder)
    for erasure in loaded.values():  # refuses a foreign one now
        erasure.apply(run.model).revert()
    groups = {n: Corpus(tuple(records), n) for n, records in retain_groups(run.retain).items()}
    documents = {n: read_object(file, "damaged") for n in DOCUMENTS if (file := run.root / f"{n}.json").exists()}
    return OpenedRun(
        root=run.root, config=run.config, model=run.model, saes=saes, selection=selection, forget=run.forget,
        retain=run.retain, questions=run.questions, texts={"forget": run.forget, **groups, **run.texts},
        erasures=loaded, documents={"run": info, **documents},
    )  # fmt: skip
