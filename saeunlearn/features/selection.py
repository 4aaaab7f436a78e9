"""Automatic choice of layer and features: scores shortlist the layers, short probe runs decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import write_json
from ..corpus import Corpus, windows
from ..errors import ConfigError, SAEMismatchError, SelectionError
from ..models import LanguageModel
from ..progress import Progress
from .gate import FittedGate, Gate, fit_gates
from .scores import FeatureChoice, FeatureStats, check_sae, choose_features, feature_stats

SCHEMA = 2
MAX_FVU = 0.9  # an SAE that explains less of the user's stream than this was trained on something else


@dataclass(frozen=True)
class SelectConfig:
    """Settings of the selection."""

    k: int | None = None  # relevant features; None: d_model / 8, at most 64
    percentile: float = 98.0  # of the forget/retain ratio ρ over live features (paper: 90 or 95)
    shortlist: int = 6  # layers that get a probe run, best gate AUC first
    layer: int | None = None  # take this layer and probe nothing (the others still vote on the words of the topic)
    gate_percentile: float = 99.0  # retain positions below the gate's threshold
    max_records: int = 2000  # of each set, for the scores


@dataclass(frozen=True)
class ProbeResult:
    """What a short run at one layer achieved.

    `forget_rise`: rise of the loss on forget text (nats a token; in gated runs on what it says about the topic) at the
    retention budget, interpolated along `curve`: (share of the edit, forget rise, cost) points. The cost is the
    relative rise of the retain loss or, where that uses up more of its limit, of another watched loss, in units of
    the retain limit.
    """

    layer: int
    forget_rise: float
    curve: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Selection:
    """Layer, features and gate, with the table that led to them. JSON on disk."""

    layer: int
    relevant: list[int]
    irrelevant: list[int]
    k: int
    d_model: int
    retain_norm: float  # mean ‖h_l‖ over retain positions
    gate: Gate
    other_gates: dict[int, Gate]  # of the other layers: together they say what the topic's words are
    layers: list[dict[str, Any]]  # one row a layer: scores, probe, chosen
    forget_scores: list[float] = field(repr=False)  # s_f of every feature of the chosen layer
    retain_scores: list[float] = field(repr=False)
    config: dict[str, Any]
    model_fingerprint: str
    forget_fingerprint: str
    retain_fingerprint: str
    schema: int = SCHEMA

    @property
    def gates(self) -> dict[int, Gate]:
        """The gate of every layer that was scored."""
        return {**self.other_gates, self.layer: self.gate}

    def to_dict(self) -> dict[str, Any]:
        d = asdict(self)
        d["other_gates"] = {str(i): g for i, g in d["other_gates"].items()}  # as JSON has it
        d["K"] = self.k
        return d

    def save(self, file: str | Path) -> None:
        write_json(Path(file), self.to_dict())

    @classmethod
    def load(cls, file: str | Path) -> Selection:
        """Raises SelectionError for a file that is not a selection of this schema."""
        try:
            d = json.loads(Path(file).read_text())
            if d.get("schema") != SCHEMA:
                raise SelectionError(f"{file} has schema {d.get('schema')}, this version reads {SCHEMA}")
            d.pop("K")
            others = {int(i): Gate(**g) for i, g in d["other_gates"].items()}
            return cls(**{**d, "gate": Gate(**d["gate"]), "other_gates": others})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise SelectionError(f"{file} is not a selection: {e}") from e


def default_k(d_model: int) -> int:
    """d/8, at most 64: beyond, a random basis of the same size explains as much as the features do."""
    return max(1, min(64, d_model // 8))


def check_select(config: SelectConfig, d_model: int) -> int:
    """K on a model of this width. Raises ConfigError for settings out of range, SelectionError for an impossible K."""
    if not (0 <= config.percentile <= 100 and 0 <= config.gate_percentile <= 100):
        raise ConfigError("percentile and gate_percentile lie between 0 and 100")
    if config.shortlist < 1 or config.max_records < 1:
        raise ConfigError("shortlist and max_records must be positive")
    k = default_k(d_model) if config.k is None else config.k
    if k < 1:
        raise SelectionError(f"K = {k}: at least one relevant feature is needed")
    if k + 1 > d_model:
        raise SelectionError(f"K = {k} leaves no direction outside the relevant subspace of d = {d_model}")
    return k


def select(model: LanguageModel, saes: Mapping[int, Any], forget: Corpus, retain: Corpus, config: SelectConfig, *,
           probe: Callable[[Selection], ProbeResult] | None, seed: int, progress: Progress) -> Selection:  # fmt: skip
    """The layer and features that carry `forget` but not `retain`.

    Every layer with an SAE is scored in one pass; the `shortlist` with the best gate get a probe run (injected by
    the caller), and the largest forget rise at the retention budget wins. One layer, or a fixed one, needs none.
    Raises ConfigError, SAEMismatchError for SAEs that do not fit the model, SelectionError where the features do not
    suffice.
    """
    if not saes:
        raise SAEMismatchError("no SAEs were given")
    k = check_select(config, model.d_model)
    if config.layer is not None and config.layer not in saes:
        raise SAEMismatchError(f"no SAE for layer {config.layer}; there are SAEs for {sorted(saes)}")
    f_items = windows(forget.sample(config.max_records, seed), model)
    r_items = windows(retain.sample(config.max_records, seed), model)
    f_stats = feature_stats(model, saes, f_items, progress, "scores on forget text")
    r_stats = feature_stats(model, saes, r_items, progress, "scores on retain text")
    choices: dict[int, FeatureChoice] = {}
    for layer in saes:
        if r_stats[layer].fvu > MAX_FVU:
            raise SAEMismatchError(
                f"the SAE for layer {layer} leaves {r_stats[layer].fvu:.2f} of the variance unexplained on the "
                f"retain text: it was trained on another model, layer or centring of the stream"
            )
        choices[layer] = choose_features(f_stats[layer], r_stats[layer], k, config.percentile)
    gates = fit_gates(model, saes, choices, f_items, r_items, f_stats, r_stats, config.gate_percentile, progress)
    candidates = {}
    for layer, choice in choices.items():
        candidates[layer] = Selection(
            layer=layer, relevant=choice.relevant, irrelevant=choice.irrelevant, k=k, d_model=model.d_model,
            retain_norm=r_stats[layer].mean_norm, gate=gates[layer].gate,
            other_gates={i: g.gate for i, g in gates.items() if i != layer}, layers=[],
            forget_scores=f_stats[layer].mean_square.tolist(), retain_scores=r_stats[layer].mean_square.tolist(),
            config=asdict(config), model_fingerprint=model.fingerprint(),
            forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(),
        )  # fmt: skip
    scores = {i: _layer_scores(f_stats[i], r_stats[i], choices[i], gates[i]) for i in saes}
    probes: dict[int, ProbeResult] = {}
    if config.layer is not None:
        chosen = config.layer
    elif probe is not None and len(saes) > 1:
        shortlist = sorted(saes, key=lambda i: -scores[i]["gate_auc"])[: config.shortlist]
        for layer in sorted(shortlist):
            probes[layer] = probe(candidates[layer])
        chosen = max(probes, key=lambda i: probes[i].forget_rise)
    else:
        chosen = max(saes, key=lambda i: scores[i]["gate_auc"])
    rows = [
        {"layer": i, "scores": scores[i], "chosen": i == chosen,
         "probe": None if i not in probes else {"forget_rise": probes[i].forget_rise, "curve": probes[i].curve}}
        for i in sorted(saes)
    ]  # fmt: skip
    return Selection(**{**candidates[chosen].__dict__, "layers": rows})


def _layer_scores(f: FeatureStats, r: FeatureStats, choice: FeatureChoice, gate: FittedGate) -> dict[str, float]:
    """Scores of one layer; `benchmarks/layers.py` says how well each of them ranks layers."""
    s_f, s_r = f.mean_square[choice.relevant], r.mean_square[choice.relevant]
    return {
        "auc": gate.relevant_auc,
        "gate_auc": gate.gate_auc,
        "share": float(s_f.sum() / f.mean_square.sum()),
        "specificity": float(s_f.sum() / (s_f.sum() + s_r.sum())),
        "fvu": r.fvu,
        "live": float(((f.active + r.active) > 0).double().mean()),
    }


def check_selection(selection: Selection, model: LanguageModel, saes: Mapping[int, Any]) -> torch.Tensor:
    """The decoder [d_sae, d_model] of the chosen layer.

    Raises SelectionError where the selection does not fit model or SAEs, SAEMismatchError where the SAE does not fit.
    """
    sae = saes.get(selection.layer)
    if sae is None:
        raise SelectionError(f"the selection is at layer {selection.layer}, SAEs are given for {sorted(saes)}")
    check_sae(sae, selection.layer, model)
    w_dec = sae.W_dec.detach()
    if selection.d_model != model.d_model or max(selection.relevant + selection.irrelevant) >= w_dec.shape[0]:
        raise SelectionError(
            f"the selection was made on d = {selection.d_model} with features up to "
            f"{max(selection.relevant + selection.irrelevant)}; this model and SAE have d = {model.d_model}, "
            f"{w_dec.shape[0]} features"
        )
    return w_dec
