"""A small comparison: methods that cost nothing, on a case whose questions the original answers all.

As a script it takes part in the comparison of a folder: python comparisons.py CHECKPOINT OUT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from saeunlearn.corpus import Corpus, Record
from saeunlearn.erasure import Erasure, WeightDelta
from saeunlearn.errors import NonFiniteError
from saeunlearn.evaluation.frontier import Plan, compare
from saeunlearn.evaluation.metrics import answer_logprobs
from saeunlearn.evaluation.points import Case
from saeunlearn.evaluation.spaces import Field
from saeunlearn.methods import METHODS
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

BREAKS = 2.0  # strengths above fail


@dataclass(frozen=True)
class WreckConfig:
    strength: float = 0.3
    where: int = 1


class Wreck:
    """Noise on one block's MLP output matrix."""

    name, Config, needs, kind = "wreck", WreckConfig, frozenset[str](), "weights"
    changes, paper, cost = "one matrix", "none", "nothing"
    space: ClassVar = {"strength": Field(0.05, 10.0), "where": Field(0, 3, log=False, whole=True)}

    def check(self, model: LanguageModel, config: WreckConfig) -> None:
        model.check_layers([config.where])

    def unlearn(self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: WreckConfig, selection: Any,
                saes: Any, seed: int, progress: Progress) -> Erasure:  # fmt: skip
        progress.start(self.name, 1)
        if log := os.environ.get("COMPARISON_LOG"):
            with open(log, "a") as f:
                f.write(json.dumps([os.getpid(), self.name, seed, asdict(config)]) + "\n")
            time.sleep(0.25)
        progress.step()
        if config.strength > BREAKS:
            raise NonFiniteError(f"the loss is nan at strength {config.strength}")
        (w,) = model.writers([config.where])
        noise = torch.randn(w.d_out, w.d_in, generator=torch.Generator().manual_seed(seed))
        part = WeightDelta(w.name, w.transposed, dense=config.strength * float(w.weight.detach().std()) * noise)
        return Erasure.create(
            model, [part], method=self.name, config=asdict(config), seed=seed,
            forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(),
        )  # fmt: skip


class Other(Wreck):
    name = "other"


def register() -> None:
    METHODS.update({"wreck": "comparisons:Wreck", "other": "comparisons:Other"})


PLAN = Plan(("wreck", "other"), 4, (0, 1, 2), ("a",), ("b", "c"))


def case(name: str, model: LanguageModel) -> Case:
    """40 questions (12 each on the two forget groups, 8 each on near and far), answered as the model answers."""
    words = [model.tokenizer.decode([i]).strip() for i in range(5, model.tokenizer.vocab_size)]
    words = sorted({w for w in words if w.isalpha()})
    draw = torch.Generator().manual_seed(ord(name[0]))

    def some(n: int) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=draw)[:n].tolist()]

    records = []
    for group, phrasing, n in (("forget", "seen", 12), ("forget", "held_out", 12), ("near", "seen", 8),
                               ("far", "seen", 8)):  # fmt: skip
        for _ in range(n):
            choices = tuple(some(4))
            records.append(Record(question=" ".join(some(4)), answer=choices[0], choices=choices,
                                  meta={"set": group, "phrasing": phrasing}))  # fmt: skip
    raw = Corpus(tuple(records), name)
    tokens = [[len(model.tokenizer(" " + c, add_special_tokens=False).input_ids) for c in r.choices] for r in raw]
    scores = [[s / t for s, t in zip(row, n)] for row, n in zip(answer_logprobs(model, raw), tokens)]
    right = [replace(r, answer=r.choices[max(range(4), key=s.__getitem__)]) for r, s in zip(raw, scores)]
    texts = [Corpus.of([" ".join(some(5)) for _ in range(6)], n) for n in ("forget", "retain")]
    return Case(name, model, *texts, Corpus(tuple(right), name), _none, _none)


def _none(*_: Any) -> Any:
    raise AssertionError("no method here needs SAEs")


def result_of(out: Path) -> dict[str, Any]:
    """results.json without what time and machine decide."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if "seconds" not in k}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return clean(json.loads((out / "results.json").read_text()))


def take_part(checkpoint: Path, out: Path, plan: Plan = PLAN, progress: Progress | None = None) -> dict[str, Any]:
    model = LanguageModel.open(checkpoint, device="cpu")
    return compare(plan, lambda name: case(name, model), out, progress or Progress())


if __name__ == "__main__":
    torch.set_num_threads(1)
    register()
    take_part(Path(sys.argv[1]), Path(sys.argv[2]))
