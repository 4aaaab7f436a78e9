"""Unlearning methods behind one interface; one file a method, listed in `METHODS`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from ..corpus import Corpus
from ..erasure import Erasure
from ..errors import ConfigError
from ..features.selection import Selection
from ..models import LanguageModel
from ..progress import Progress


class Method(Protocol):
    """What every method offers. `needs` is checked before work starts ("saes", "selection", …)."""

    name: str
    Config: type
    needs: frozenset[str]

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: Any, selection: Selection | None,
        saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure: ...  # fmt: skip


METHODS = {"sspu": "saeunlearn.methods.sspu:SSPU"}


def get_method(name: str) -> Method:
    """The method of that name. Raises ConfigError for an unknown one."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
