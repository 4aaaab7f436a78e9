"""TOFU's scores (Maini et al., COLM 2024, arXiv 2401.06121): truth ratio, forget quality, model utility."""

from __future__ import annotations

import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..corpus import Corpus, Record
from ..errors import ConfigError, CorpusError
from ..models import LanguageModel
from ..progress import Progress
from .evaluate import bootstrap
from .memorisation import generations, new_tokens, rouge_l
from .metrics import Values, answer_losses, probability

SCHEMA = 1
SETS = ("forget", "retain", "real_authors", "world_facts")
MEANS = ("arithmetic", "geometric")  # over the perturbed answers: the paper's, and OpenUnlearning's
_LARGEST = 700.0  # logarithm of a ratio that a float still holds
_LIBRARIES = ("saeunlearn", "torch", "transformers", "rouge-score", "scipy")


def load_tofu(folder: str | Path, forget: str = "forget01") -> dict[str, Corpus]:
    """The four corpora of `tofu_scores` from a folder with TOFU's `*_perturbed.json`. Raises CorpusError."""
    names = (forget, *SETS[1:])
    return {s: Corpus.load(Path(folder) / f"{name}_perturbed.json") for s, name in zip(SETS, names)}


def tofu_scores(
    model: LanguageModel,
    oracle: LanguageModel,
    corpora: Mapping[str, Corpus],
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that TOFU measures, with the value of every record, as a JSON-able document.

    `corpora`: "forget", "retain", "real_authors", "world_facts", each with perturbed answers (`load_tofu`); the oracle
    was trained without the forget set. Returns

        {"schema": 1, "model", "oracle", "settings", "versions",
         "sets": {set: {"n", "fingerprint", "ids", metric: {"mean", "low", "high", "values"}}},
         "forget_quality": {mean: {"p_value", "statistic", "n"}}, "oracle_truth_ratio": {mean: [values]},
         "model_utility": {mean: value}, "utility_parts": {mean: {"set metric": value}}}

    where mean is "arithmetic" or "geometric" (`truth_ratios`) and the metrics are probability, rouge_l_recall (of
    greedy answers), truth_ratio_arithmetic, truth_ratio_geometric, and probability_normalised (over the choices) for
    authors and facts. `low` and `high` bound 95 % (bootstrap over records).
    Raises ConfigError for a missing set, CorpusError for a record without perturbed answers.
    """
    if missing := [s for s in SETS if s not in corpora]:
        raise ConfigError(f"TOFU's scores need the sets {', '.join(SETS)}; {', '.join(missing)} not given")
    for name in SETS:
        for i, r in enumerate(corpora[name]):
            _perturbed(r, f"{corpora[name].name}, record {i + 1}")
    sets = {name: _score_set(model, name, corpora[name], max_new_tokens, progress) for name in SETS}
    reference = truth_ratios(oracle, corpora["forget"], progress)
    quality, utility, parts = {}, {}, {}
    for kind in MEANS:
        now = sets["forget"][f"truth_ratio_{kind}"]["values"]
        quality[kind] = forget_quality(now, reference[kind].values)
        parts[kind] = _utility_parts(sets, kind)
        utility[kind] = statistics.harmonic_mean(list(parts[kind].values()))
    return {
        "schema": SCHEMA, "model": model.name, "oracle": oracle.name,
        "settings": {"max_new_tokens": new_tokens(model, max_new_tokens), "rouge": "rougeL recall, stemmed"},
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "sets": sets, "forget_quality": quality,
        "oracle_truth_ratio": {kind: v.values for kind, v in reference.items()},
        "model_utility": utility, "utility_parts": parts,
    }  # fmt: skip


def truth_ratios(model: LanguageModel, corpus: Corpus, progress: Progress | None = None) -> dict[str, Values]:
    """{"arithmetic", "geometric"}: R = mean over perturbed answers of P(perturbed | question)^(1/length)
    / P(paraphrased | question)^(1/length), by the mean that is named (arXiv 2401.06121: arithmetic).

    Near 0: the truth is preferred; 1 and more: it is not. Records without a paraphrased answer (authors, facts) are
    compared with the gold answer. Raises CorpusError for a record without perturbed answers.
    """
    rows: dict[str, list[float]] = {kind: [] for kind in MEANS}
    true, tokens, false = _log_probabilities(model, corpus, progress)
    for gold, wrong in zip(true, false):
        mean = max(wrong) + math.log(statistics.mean(math.exp(v - max(wrong)) for v in wrong))
        for kind, over in (("arithmetic", mean), ("geometric", statistics.mean(wrong))):
            rows[kind].append(math.exp(min(over - gold, _LARGEST)))
    return {k: Values(f"truth_ratio_{k}", v, list(range(len(v))), tokens) for k, v in rows.items()}


def forget_quality(ratios: Sequence[float], oracle_ratios: Sequence[float]) -> dict[str, Any]:
    """p-value of the two-sample Kolmogorov–Smirnov test of truth ratios against the oracle's (exact for few records).

    High: not told apart from the oracle. Few records cannot tell much apart: read it with `n`.
    Returns {"p_value", "statistic", "n"}.
    """
    from scipy.stats import ks_2samp

    result = ks_2samp(ratios, oracle_ratios)
    return {"p_value": float(result.pvalue), "statistic": float(result.statistic), "n": len(ratios)}


def probability_normalised(model: LanguageModel, corpus: Corpus, progress: Progress | None = None) -> Values:
    """P(answer) / sum over all choices of P(choice), each P(· | question)^(1/length), as TOFU's code does.

    Raises CorpusError for a record without perturbed answers.
    """
    gold = Corpus(tuple(replace(r, meta={}) for r in corpus), corpus.name)  # not the paraphrased answers
    true, tokens, false = _log_probabilities(model, gold, progress)
    values = [1 / (1 + sum(math.exp(min(v - p, _LARGEST)) for v in wrong)) for p, wrong in zip(true, false)]
    return Values("probability_normalised", values, list(range(len(values))), tokens)


def _log_probabilities(
    model: LanguageModel, corpus: Corpus, progress: Progress | None
) -> tuple[list[float], list[int], list[list[float]]]:
    """Mean log-probability a token of each paraphrased (else gold) answer, its tokens, and those of the perturbed."""
    wrong = [_perturbed(r, f"{corpus.name}, record {i + 1}") for i, r in enumerate(corpus)]
    asked = [
        Record(question=r.question, answer=answer)
        for r, others in zip(corpus, wrong)
        for answer in (str(r.meta.get("paraphrased_answer") or r.answer), *others)
    ]
    rows = answer_losses(model, Corpus(tuple(asked), corpus.name), progress)
    scored = iter([(-float(row.mean(dtype=torch.float64)), len(row)) for row in rows])
    true, tokens, false = [], [], []
    for others in wrong:
        value, n = next(scored)
        true.append(value)
        tokens.append(n)
        false.append([next(scored)[0] for _ in others])
    return true, tokens, false


def _perturbed(record: Record, where: str) -> tuple[str, ...]:
    others = tuple(c for c in record.choices if c != record.answer)
    if not others:
        raise CorpusError(f"{where}: no perturbed answers; TOFU's *_perturbed files (perturbed_answer) are needed")
    return others


def _score_set(
    model: LanguageModel, name: str, corpus: Corpus, max_new_tokens: int | None, progress: Progress | None
) -> dict[str, Any]:
    said = generations(model, corpus, max_new_tokens, progress)
    found = [probability(model, corpus, progress), rouge_l(corpus, said)[0]]
    found += truth_ratios(model, corpus, progress).values()
    if name in ("real_authors", "world_facts"):
        found.append(probability_normalised(model, corpus, progress))
    out: dict[str, Any] = {
        "n": len(corpus), "fingerprint": corpus.fingerprint(), "ids": [r.id[:16] for r in corpus],
    }  # fmt: skip
    for v in found:
        low, high = bootstrap(v.values, [1.0] * v.n)
        out[v.name] = {"mean": v.mean, "low": low, "high": high, "values": v.values}
    return out


def _utility_parts(sets: Mapping[str, Any], kind: str) -> dict[str, float]:
    """The nine numbers whose harmonic mean is the model utility."""
    parts = {}
    for name in SETS[1:]:
        p = "probability" if name == "retain" else "probability_normalised"
        ratios = sets[name][f"truth_ratio_{kind}"]["values"]
        parts[f"{name} {p}"] = sets[name][p]["mean"]
        parts[f"{name} rouge_l_recall"] = sets[name]["rouge_l_recall"]["mean"]
        parts[f"{name} truth_ratio"] = statistics.mean(max(0.0, 1 - r) for r in ratios)
    return parts
