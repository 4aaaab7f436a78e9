"""Unlearning methods behind one interface; one file a method. Others come in through the entry point
`saeunlearn.methods` of any installed package: NAME = "package.module:Class"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol

from ..corpus import Corpus
from ..erasure import Erasure
from ..errors import ConfigError
from ..features.selection import Selection
from ..models import LanguageModel
from ..progress import Progress

GROUP = "saeunlearn.methods"


class Method(Protocol):
    """What every method offers; an instance is made without arguments.

    `needs` ("saes", "selection") is provided before `unlearn` is called. `kind`, `changes`, `paper` and `cost` are what
    `saeunlearn methods` says about it.
    """

    name: str
    Config: type  # a frozen dataclass; every field documented, with the paper's value
    needs: frozenset[str]
    kind: Literal["weights", "token", "guard", "offset"]
    changes: str
    paper: str
    cost: str

    def check(self, model: LanguageModel, config: Any) -> None:
        """Raises ConfigError (or another typed error) for settings that cannot work, before any long step."""

    def unlearn(
        self,
        model: LanguageModel,
        forget: Corpus,
        retain: Corpus,
        *,
        config: Any,
        selection: Selection | None,
        saes: Mapping[int, Any],
        seed: int,
        progress: Progress,
    ) -> Erasure:
        """Make the Erasure; the model is unchanged afterwards."""  # fmt: skip


METHODS = {
    "sspu": "saeunlearn.methods.sspu:SSPU",
    "rmu": "saeunlearn.methods.rmu:RMU",
    "ga": "saeunlearn.methods.ga:GA",
    "graddiff": "saeunlearn.methods.graddiff:GradDiff",
    "kl": "saeunlearn.methods.kl:KL",
    "npo": "saeunlearn.methods.npo:NPO",
    "npo-lora": "saeunlearn.methods.npo:LowRankNPO",
    "simnpo": "saeunlearn.methods.simnpo:SimNPO",
    "idkdpo": "saeunlearn.methods.idkdpo:IdkDPO",
    "crisp": "saeunlearn.methods.crisp:CRISP",
    "reglu": "saeunlearn.methods.reglu:ReGLU",
    "unierase": "saeunlearn.methods.unierase:UniErase",
    "key-erasure": "saeunlearn.methods.keyerasure:KeyErasure",
    "key-erasure-sae": "saeunlearn.methods.keyerasure:GuidedKeyErasure",
    "overwrite": "saeunlearn.methods.overwrite:Overwrite",
    "clamp": "saeunlearn.methods.clamp:Clamp",
    "conditional": "saeunlearn.methods.conditional:Conditional",
    "dsg": "saeunlearn.methods.dsg:DSG",
    "delta": "saeunlearn.methods.delta:Delta",
}
RECOMMENDED = "overwrite"  # where facts have to stay away under relearning


def known_methods() -> dict[str, str]:
    """{name: "module:Class"} of the methods here and of those that installed packages bring."""
    return {e.name: e.value for e in entry_points(group=GROUP)} | METHODS


def get_method(name: str) -> Method:
    """The method of that name. Raises ConfigError for an unknown one, or one whose package cannot be imported."""
    known = known_methods()
    if name not in known:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(sorted(known))}")
    if name in METHODS:
        module, _, attribute = known[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    try:
        return EntryPoint(name, known[name], GROUP).load()()
    except Exception as e:  # a stranger's package
        raise ConfigError(f"the method {name} ({known[name]}) cannot be loaded: {e!r}") from e
