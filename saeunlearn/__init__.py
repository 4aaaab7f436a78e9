"""saeunlearn: take chosen knowledge out of a language model through its SAE features, and prove it.

What most work begins with is at the top, and imported when it is first asked for, so that `import saeunlearn` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_training import SAEConfig, load_saes, save_saes, train_saes

    from .attack_run import attack
    from .corpus import Corpus
    from .erasure import Erasure
    from .evaluation.evaluate import evaluate
    from .explore.opened import open_run
    from .models import LanguageModel
    from .pipeline import RunConfig, unlearn

__version__ = "0.1.0"
__all__ = ["Corpus", "Erasure", "LanguageModel", "RunConfig", "SAEConfig", "attack", "evaluate", "load_saes",
           "open_run", "save_saes", "train_saes", "unlearn"]  # fmt: skip
_HOME = {
    "Corpus": ".corpus", "Erasure": ".erasure", "LanguageModel": ".models", "RunConfig": ".pipeline",
    "unlearn": ".pipeline", "attack": ".attack_run", "evaluate": ".evaluation.evaluate", "open_run": ".explore.opened",
    **dict.fromkeys(("SAEConfig", "load_saes", "save_saes", "train_saes"), "sae_training"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
