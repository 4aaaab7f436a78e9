"""Can a record still be told to be training data? Membership inference, and the scores made from it.

Every attack gives a record a score that is higher the more it looks like a member. Log-probabilities are natural.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..corpus import Corpus, windows
from ..errors import ConfigError, CorpusError, OverlapError
from ..losses import over_windows
from ..models import LanguageModel
from ..progress import Progress
from .metrics import Values

SCHEMA = 1
ATTACKS = ("loss", "min_k", "min_k_plus_plus")
_LEAST_STD = 1e-6  # of the log-probabilities: a model that is quite sure has none


def membership_scores(
    model: LanguageModel, corpus: Corpus, k: float = 0.4, progress: Progress | None = None
) -> dict[str, Values]:
    """{"loss", "min_k", "min_k_plus_plus"}: the scores of every record, from one forward pass.

    - loss: mean log-probability of its tokens (Yeom et al. 2018)
    - min_k: that of the share `k` of least likely tokens (arXiv 2310.16789)
    - min_k_plus_plus: the same, each log-probability standardised by mean and standard deviation of
      log p(z) under z ~ p(· | prefix) (arXiv 2404.02936)

    The tokens are the targets: the answer's of a pair, else all but the first. k = .4 is MUSE's and OpenUnlearning's.
    Raises ConfigError for k outside (0, 1], CorpusError where a record has no token to predict.
    """
    if not 0 < k <= 1:
        raise ConfigError(f"k = {k}: the share of tokens must be above 0 and at most 1")
    items = windows(corpus, model)
    found: list[list[Tensor]] = [[] for _ in range(len(corpus))]
    for w, row in zip(items, over_windows(model, items, _log_probs, progress or Progress(), "membership")):
        found[w.record].append(row[w.answer_start - 1 :])
    values: dict[str, list[float]] = {name: [] for name in ATTACKS}
    counts = []
    for i, parts in enumerate(found):
        tokens = torch.cat(parts).double() if parts else torch.empty(0, 2)
        if not len(tokens):
            raise CorpusError(f"{corpus.name}, record {i + 1}: no token to predict")
        least = max(1, int(k * len(tokens)))
        plain, standardised = tokens.sort(0).values[:least].mean(0).tolist()
        for name, value in zip(ATTACKS, (float(tokens[:, 0].mean()), plain, standardised)):
            values[name].append(value)
        counts.append(len(tokens))
    return {name: Values(name, v, list(range(len(v))), counts) for name, v in values.items()}


def membership(
    model: LanguageModel, members: Corpus, holdout: Corpus, k: float = 0.4, progress: Progress | None = None
) -> dict[str, Any]:
    """Every attack on `members` against records that were never trained on, as a JSON-able document:

        {"schema": 1, "model", "k", "members": {"n", "fingerprint", "ids"}, "holdout": the same,
         "attacks": {name: {"auc", "low", "high", "members": [scores], "holdout": [scores]}}}

    Raises OverlapError where a record is in both.
    """
    if shared := {r.id for r in members} & {r.id for r in holdout}:
        raise OverlapError(
            f"{len(shared)} of {len(members)} records of {members.name} are also in {holdout.name}: what was trained "
            "on cannot stand for what was not"
        )
    inside, outside = (membership_scores(model, c, k, progress) for c in (members, holdout))
    attacks = {}
    for name in ATTACKS:
        a, b = inside[name].values, outside[name].values
        area = auc(a, b)
        low, high = auc_interval(area, len(a), len(b))
        attacks[name] = {"auc": area, "low": low, "high": high, "members": a, "holdout": b}
    return {
        "schema": SCHEMA, "model": model.name, "k": k, "attacks": attacks,
        **{
            what: {"n": len(c), "fingerprint": c.fingerprint(), "ids": [r.id[:16] for r in c]}
            for what, c in (("members", members), ("holdout", holdout))
        },
    }  # fmt: skip


def auc(members: Sequence[float], holdout: Sequence[float]) -> float:
    """P(a member's score > a holdout's) + P(equal) / 2: the area under the ROC curve, as a rank statistic.

    Raises CorpusError where one of the two is empty, ConfigError for a score that is not a number.
    """
    if not len(members) or not len(holdout):
        raise CorpusError("an AUC needs members and holdout records")
    a, b = np.asarray(members, float), np.sort(np.asarray(holdout, float))
    if np.isnan(a).any() or np.isnan(b).any():
        raise ConfigError("a membership score is not a number")
    below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")
    return float(below.mean() / (2 * len(b)))


def auc_interval(area: float, n_members: int, n_holdout: int) -> tuple[float, float]:
    """95 % score interval of an AUC (Newcombe 2006, method 5); wider than a point also at 0 and 1."""
    n = (n_members + n_holdout) / 2 - 1

    def z(true: float) -> float:
        variance = true * (1 - true) * (1 + n * ((1 - true) / (2 - true) + true / (1 + true)))
        return abs(area - true) / math.sqrt(variance / (n_members * n_holdout))

    def limit(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if z(middle) < 1.959963984540054 else (inside, middle)
        return (inside + outside) / 2

    return (limit(area, 0.0) if area > 0 else 0.0), (limit(area, 1.0) if area < 1 else 1.0)


def priv_leak(auc_unlearned: float, auc_oracle: float) -> float:
    """MUSE's PrivLeak in percent: 100 · [(1 − A) − (1 − A_oracle)] / (1 − A_oracle) (arXiv 2407.06460).

    A = `auc` of the forget records against the holdout. 0 is the oracle; negative: they still look like members
    (−100 at A = 1), positive: over-unlearned. Raises ConfigError where the oracle's AUC is 1.
    """
    if auc_oracle >= 1:
        raise ConfigError("the oracle tells every forget record from the holdout (AUC 1): the holdout does not match")
    return 100 * ((1 - auc_unlearned) - (1 - auc_oracle)) / (1 - auc_oracle)


def mia_score(area: float) -> float:
    """1 − 2 · |AUC − ½| of the loss attack: 1 at chance, 0 where it is always right, or wrong (SemEval-2025 task 4).

    Only as good as the holdout: where members and holdout differ by themselves even the oracle is not at ½ (forget01
    of TOFU against holdout10, for one). `priv_leak` takes the oracle's AUC into account.
    """
    return 1 - 2 * abs(area - 0.5)


def task_aggregate(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float:
    """The task aggregate of SemEval-2025 task 4 (arXiv 2504.02883): the harmonic mean of all scores.

    `scores`: {subtask: {"forget" | "retain": {"regurgitation": ROUGE-L, "knowledge": exact match rate}}}, three
    subtasks there, so twelve scores; those of forget count as 1 − value. 0 as soon as one of them is.
    Raises ConfigError where one is missing or outside 0 … 1.
    """
    flat = []
    for subtask, sides in scores.items():
        for side in ("forget", "retain"):
            for kind in ("regurgitation", "knowledge"):
                value = sides.get(side, {}).get(kind)
                if value is None or not 0 <= value <= 1:
                    raise ConfigError(f"{subtask}, {side}: {kind} must be between 0 and 1, got {value}")
                flat.append(1 - value if side == "forget" else value)
    if not flat:
        raise ConfigError("no subtask to aggregate")
    return statistics.harmonic_mean(flat)


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[b, t, 2]: the log-probability of each token, and the same standardised over the vocabulary."""
    out = torch.empty(*ids.shape, 2, device=logits.device)
    for row, (scores, tokens) in enumerate(zip(logits, ids)):  # one text at a time: a vocabulary is large
        log_p = scores.log_softmax(-1)
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        std = (p * (log_p - mean[:, None]).square()).sum(-1).sqrt().clamp_min(_LEAST_STD)
        plain = log_p.gather(-1, tokens[:, None])[:, 0]
        out[row] = torch.stack([plain, (plain - mean) / std], -1)
    return out
