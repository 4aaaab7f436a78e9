"""Views of the features of a layer: where they act, what they write, and what an Erasure does to them.

All functions take the OpenedRun and an Index of its texts and return JSON-able dicts. They quote the texts.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .erased import change_of
from .index import BEFORE, BINS, LOWEST, PER_OCTAVE, Found, Index
from .opened import OpenedRun

TOKENS = 5  # a feature is named by
WORDS = 10  # promoted, and suppressed
NEAREST = 8
BANDS = (0.25, 0.5, 0.75)  # examples below the top ones are shown by quarters of a feature's activations
PER_BAND = 3
FOUND = 20  # features that a search gives


def layer_view(run: OpenedRun, index: Index, layer: int, chosen: Sequence[int] = ()) -> dict[str, Any]:
    """The live features of a layer.

        {"layer", "d_sae", "features": [index], "forget", "retain": [E z²/‖h‖² of each], "density": [share of positions
         of all texts], "marks": ["chosen" | "relevant" | "irrelevant" | ""], "tokens": [[the TOKENS it is most active
         on]], "texts": {name: {"positions", "fvu"}}}

    `forget` is the text of that name, `retain` all others together. Marks of relevance exist at the selection's layer.
    Raises ConfigError for a layer that is not in the index.
    """
    columns = _columns(run, index, layer)
    marks = {}
    if run.selection is not None and run.selection.layer == layer:
        marks = {**dict.fromkeys(run.selection.irrelevant, "irrelevant"),
                 **dict.fromkeys(run.selection.relevant, "relevant")}  # fmt: skip
    marks |= dict.fromkeys(chosen, "chosen")
    return {**columns, "marks": [marks.get(j, "") for j in columns["features"]]}


def feature_view(run: OpenedRun, index: Index, layer: int, feature: int) -> dict[str, Any]:
    """One feature.

        {"layer", "feature", "mark", "scores": {"forget", "retain"}, "density", "mean": {text: value over positions},
         "histogram": {text: {"edges" [b + 1], "counts" [b]}}, "examples": {text: [{"id", "quantile", "activation",
         "tokens", "activations", "at"}]}, "promoted", "suppressed": [{"token", "logit"}], "nearest": [{"feature",
         "cosine"}], "erasures": {name: {text: {"mean_before", "mean_after", "rate_before", "rate_after"}}}}

    Examples: the largest activations first (quantile 1), then a few of each quarter of the distribution, the highest
    quarter first. `at` is the place of the activation among `tokens`. A histogram has equal bins of log z; `logit`:
    `LanguageModel.direction_logits` of the decoder row. Erasures are those that `erased.add_erasure` has measured.
    Raises ConfigError for a layer or feature that is not there.
    """
    sae = run.sae(layer)
    if not 0 <= feature < sae.cfg.d_sae:
        raise ConfigError(f"the SAE of layer {layer} has features 0 … {sae.cfg.d_sae - 1}, not {feature}")
    found = {text: index.at(text, layer) for text in index.texts}
    forget, retain, _ = _scores(index, layer)
    return {
        "layer": layer,
        "feature": feature,
        "mark": _mark(run, layer, feature),
        "scores": {"forget": float(forget[feature]), "retain": float(retain[feature])},
        "density": {t: float(f.stats.density[feature]) for t, f in found.items()},
        "mean": {t: float(f.mean[feature]) for t, f in found.items()},
        "histogram": {t: _histogram(f.histogram[feature]) for t, f in found.items()},
        "examples": {t: _examples(run, t, f, feature) for t, f in found.items()},
        **_written(run, layer, feature),
        "erasures": change_of(run, index, layer, feature),
    }


def find_features(run: OpenedRun, index: Index, query: str, layer: int) -> list[dict[str, Any]]:
    """[{"feature", "by", "value"}] for a number, or for a word: the features most active on it (by "active on": a token
    that names the feature holds the word; value: its density), then those that promote it most (by "promotes": the
    query, with or without a space before it, is one token; value: logit). At most FOUND of each.
    """
    query = query.strip()
    if not query:
        return []
    columns = _columns(run, index, layer)
    if query.isdecimal():
        known = int(query) < columns["d_sae"]
        return [{"feature": int(query), "by": "number", "value": None}] if known else []
    plain = query.casefold()
    rows = [
        {"feature": j, "by": "active on", "value": density, "rank": [plain in t.casefold() for t in tokens].index(True)}
        for j, tokens, density in zip(columns["features"], columns["tokens"], columns["density"])
        if any(plain in t.casefold() for t in tokens)
    ]
    out = [{k: v for k, v in r.items() if k != "rank"} for r in sorted(rows, key=lambda r: r["rank"])[:FOUND]]
    for ids in {tuple(run.encode(q)) for q in (query, f" {query}")}:
        if len(ids) == 1:
            logit = run.direction_logits(run.sae(layer).W_dec.detach(), list(ids))[:, 0]
            best = logit.topk(min(FOUND, len(logit)))
            out += [{"feature": int(j), "by": "promotes", "value": float(v)} for v, j in zip(*best) if v > 0]
    return out


# --- the parts of a view -----------------------------------------------------------------------------------


def _scores(index: Index, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """(forget, retain, density over all texts), each [m]."""
    found = {text: index.at(text, layer).stats for text in index.texts}
    rest = [s for t, s in found.items() if t != "forget"]
    none = torch.zeros_like(next(iter(found.values())).sum_sq)
    forget = found["forget"].mean_square if "forget" in found else none
    retain = sum((s.sum_sq for s in rest), none) / max(1, sum(s.positions for s in rest))
    density = sum((s.active for s in found.values()), none) / sum(s.positions for s in found.values())
    return forget, retain, density


def _columns(run: OpenedRun, index: Index, layer: int) -> dict[str, Any]:
    """The part of `layer_view` that is the same for everybody, kept."""
    key = ("layer", index.folder, layer)
    if key not in run.cache:
        forget, retain, density = _scores(index, layer)
        live = density.nonzero()[:, 0]
        stats = {t: index.at(t, layer).stats for t in index.texts}
        run.cache[key] = {
            "layer": layer, "d_sae": len(density), "features": live.tolist(), "forget": forget[live].tolist(),
            "retain": retain[live].tolist(), "density": density[live].tolist(),
            "tokens": _names(run, index, layer, live),
            "texts": {t: {"positions": s.positions, "fvu": s.fvu} for t, s in stats.items()},
        }  # fmt: skip
    return run.cache[key]


def _names(run: OpenedRun, index: Index, layer: int, live: Tensor) -> list[list[str]]:
    """The different tokens at the largest activations of each feature, over all texts."""
    values, ids = [], []
    for text in index.texts:
        top, words = index.at(text, layer).top, run.words(text)
        _, window, at = top["place"][:, :, live].long().numpy()
        place = (words.starts[window] + at).clip(0, len(words.ids) - 1)
        values.append(top["value"][:, live])
        ids.append(torch.from_numpy(words.ids[place]))
    order = torch.cat(values).argsort(dim=0, descending=True, stable=True)
    tokens, shown = torch.cat(ids).gather(0, order).T, torch.cat(values).gather(0, order).T > 0
    rows = [[i for i, on in zip(*pair) if on] for pair in zip(tokens.tolist(), shown.tolist())]
    text_of = dict(zip(known := sorted({i for r in rows for i in r}), run.token_texts(known)))
    return [list(dict.fromkeys(text_of[i] for i in r))[:TOKENS] for r in rows]


def _mark(run: OpenedRun, layer: int, feature: int) -> str:
    s = run.selection
    if s is None or s.layer != layer:
        return ""
    return "relevant" if feature in s.relevant else "irrelevant" if feature in s.irrelevant else ""


def _histogram(counts: Tensor) -> dict[str, Any]:
    """The bins from the first to the last that is not empty."""
    used = counts.nonzero()[:, 0]
    if not len(used):
        return {"edges": [], "counts": []}
    first, last = int(used[0]), min(int(used[-1]), BINS - 1)
    edges = [2.0 ** (LOWEST + i / PER_OCTAVE) for i in range(first, last + 2)]
    return {"edges": edges, "counts": counts[first : last + 1].tolist()}


def _examples(run: OpenedRun, text: str, found: Found, feature: int) -> list[dict[str, Any]]:
    top = _entries(found.top, feature)
    rows = [_example(run, text, e, 1.0) for e in top]
    seen = {e[:2] for e in top}
    bands: list[list[tuple[Any, float]]] = [[] for _ in range(len(BANDS) + 1)]
    for e in _entries(found.sample, feature):
        quantile = found.quantile(feature, e[2])
        band = bands[bisect.bisect_right(BANDS, quantile)]
        if e[:2] not in seen and len(band) < PER_BAND:
            band.append((e, quantile))
            seen.add(e[:2])
    return rows + [_example(run, text, *e) for band in reversed(bands) for e in sorted(band, key=lambda e: -e[0][2])]


def _entries(best: Any, feature: int) -> list[tuple[int, int, float, int, list[float]]]:
    """(window, at, activation, record, activations around) of every entry."""
    places, values = best["place"][:, :, feature].T.tolist(), best["value"][:, feature].tolist()
    around = best["around"][:, feature].tolist()
    return [(w, at, v, r, a) for (r, w, at), v, a in zip(places, values, around) if r >= 0]


def _example(run: OpenedRun, text: str, entry: tuple[int, int, float, int, list[float]], quantile: float
             ) -> dict[str, Any]:  # fmt: skip
    window, at, value, record, around = entry
    ids = run.words(text).window(window)
    first = max(0, at - BEFORE)
    last = min(len(ids), at - BEFORE + len(around))
    return {
        "id": run.texts[text].records[record].id[:16],
        "quantile": quantile,
        "activation": value,
        "tokens": run.token_texts(ids[first:last]),
        "activations": around[first - at + BEFORE : last - at + BEFORE],
        "at": at - first,
    }


def _written(run: OpenedRun, layer: int, feature: int) -> dict[str, Any]:
    """What the feature's decoder row promotes and suppresses, and which rows are nearest to it."""
    key = ("written", layer, feature)
    if key not in run.cache:
        row = run.sae(layer).W_dec[feature].detach()
        logits = run.direction_logits(row[None])[0]
        rows = torch.nn.functional.normalize(run.sae(layer).W_dec.detach().float(), dim=-1)
        cosine = rows @ rows[feature]
        cosine[feature] = -torch.inf
        near = cosine.topk(min(NEAREST, len(cosine) - 1))
        sides = {}
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(min(WORDS, len(logits)), largest=largest)
            sides[name] = [{"token": t, "logit": v} for t, v in zip(run.token_texts(ids.tolist()), values.tolist())]
        nearest = [{"feature": int(j), "cosine": float(c)} for c, j in zip(*near)]
        run.cache[key] = {**sides, "nearest": nearest}
    return run.cache[key]
