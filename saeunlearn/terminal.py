"""What the command line prints: results as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from .errors import RunError


def show_result(run: Any) -> None:
    from .evaluation.evaluate import table
    from .features.selection import Selection

    result = json.loads(run.evaluation_file.read_text())
    if run.selection_file.exists():
        print("\n" + layer_lines(Selection.load(run.selection_file)))
    print("\n" + table(result["comparison"]))
    if run.config.include_text:
        show_samples(result["samples"])
    print(f"\nErasure  {run.erasure_dir}\nReport   {run.root / 'report.html'}")


def layer_lines(selection: Any) -> str:
    lines = ["layer   auc  share  specificity   fvu  probe: forget rise"]
    for row in selection.layers:
        s, probe = row["scores"], row["probe"]
        rise = "not run" if probe is None else f"{probe['forget_rise']:+.3f} nats"
        mark = "  ← chosen" if row["chosen"] else ""
        line = f"{row['layer']:5d}  {s['auc']:.2f}   {s['share']:.2f}         {s['specificity']:.2f}  {s['fvu']:.2f}"
        lines.append(f"{line}  {rise}{mark}")
    k, d = selection.k, selection.d_model
    lines.append(
        f"K = {k} relevant features of d = {d} (K/d = {k / d:.3f}) at layer {selection.layer}: {selection.relevant}"
    )
    return "\n".join(lines)


def feature_lines(view: Mapping[str, Any], features: Sequence[int] | None = None) -> str:
    """A table of features of a layer and the tokens that each is most active on; all of the view's without `features`.

    `view`: as `explore.feature.layer_view` returns it.
    """
    from .evaluation.evaluate import aligned

    at = {j: i for i, j in enumerate(view["features"])}
    rows = [("feature", "most active on", "forget score", "retain score", "active on")]
    for j in view["features"] if features is None else features:
        i = at.get(j)
        tokens = "never active" if i is None else " ".join(t.strip() or repr(t) for t in view["tokens"][i])
        numbers = ("–",) * 3 if i is None else (
            f"{view['forget'][i]:.2g}", f"{view['retain'][i]:.2g}", f"{view['density'][i]:.2%}")  # fmt: skip
        rows.append((str(j), tokens, *numbers))
    return aligned(rows)


def sae_lines(rows: Sequence[dict[str, Any]]) -> str:
    """The quality of SAEs as a table."""
    width = max(len(r["label"]) for r in rows)
    lines = [f"{'':{width}}  layer    FVU     L0   dead  CE recovered     KL"]
    for r in rows:
        lines.append(f"{r['label']:{width}}  {r['layer']:5d}  {r['fvu']:.3f}  {r['l0']:5.1f}  {r['dead']:5.1%}  "
                     f"{r['ce_recovered']:12.3f}  {r['kl']:.3f}")  # fmt: skip
    return "\n".join(lines)


def show_samples(samples: Sequence[dict[str, Any]]) -> None:
    for s in samples:
        before, after = (shorten(s[k], 100, placeholder=" …") for k in ("before", "after"))
        print(f"\n  {s['prompt']} …\n    before: {before}\n    after:  {after}")


def show_verdicts(rows: Sequence[dict[str, Any]]) -> None:
    """Against the oracle: one line a group and metric."""
    from .evaluation.verdict import judged

    width = max((len(r["group"]) for r in rows), default=0)
    print("\nagainst the oracle")
    for r in rows:
        scores = f"original {r['original']:.3f}  unlearned {r['unlearned']:.3f}  oracle {r['oracle']:.3f}"
        interval = f"{r['difference']:+.3f} ({r['low']:+.3f} … {r['high']:+.3f})"
        name = r["metric"].replace("_", " ")
        print(f"{r['group']:{width}}  {name:15}  {scores}  {interval}  {judged(r)}")


def show_erasure(erasure: Any) -> None:
    m = erasure.manifest
    print(f"Erasure {erasure.id[:16]}  method {m['method']}, seed {m['seed']}, made {m['created']}")
    print(f"  on {m['model']} ({m['parent_fingerprint'][:16]})")
    print(f"  forget {m['forget_fingerprint'][:16]}  retain {m['retain_fingerprint'][:16]}")
    if m.get("selection"):
        s = m["selection"]
        k, d = s["k"], s["d_model"]
        print(f"  layer {s['layer']}, K = {k} relevant features of d = {d} (K/d = {k / d:.3f})")
    changed = m["changed"]
    if changed["count"]:
        print(f"  changes {changed['count']} numbers, {changed['share']:.2%} of the model:")
    else:
        print("  changes no weights: it acts at inference")
    for c in changed["parameters"]:
        print(f"    {c['name']}  {'dense' if c['rank'] is None else 'rank ' + str(c['rank'])}")
    print("  settings " + ", ".join(f"{k}={v}" for k, v in m["config"].items()))
    for part, values in m["extra"].items():
        print(
            f"  {part} " + ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        )
    print(f"  {m['note']}")


def show_ledger(checkpoint: Path, entries: Sequence[dict[str, Any]]) -> None:
    if not entries:
        print(f"{checkpoint}: no request was carried out on this checkpoint")
    for e in entries:
        way_back = "originals kept" if e.get("originals") else "no way back"
        print(f"{e['order']}. {e['time']}  {e['method']} seed {e['seed']}  Erasure {e['erasure_id'][:12]}  {way_back}")
        print(f"   {e['parent_fingerprint'][:12]} → {e['resulting_fingerprint'][:12]}"
              f"  forget {e['forget_fingerprint'][:12]}")  # fmt: skip
        for what, values in (e.get("cost") or {}).items():
            print(f"   {what}: {values['before']:.3f} → {values['after']:.3f}")


def without_values(result: Any) -> Any:
    """The result without its per-example lists, for a terminal."""
    if isinstance(result, dict):
        return {k: without_values(v) for k, v in result.items() if k not in ("values", "ids", "records", "tokens")}
    return result


def json_or_empty(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as e:
        raise RunError(f"{file} is damaged: {e}") from e
    return content if isinstance(content, dict) else {}


SHOWN = 8  # named features of each text


def diff_lines(found: dict[str, Any]) -> str:
    """Features lost and gained by layer and text, the named ones that changed most, and where the weights changed."""
    named = found["selection"] or {"layer": None, "relevant": []}
    lines = ["layer  text            lost  gained  fire    fvu before → after"]
    for entry in found["layers"]:
        for name, t in entry["texts"].items():
            f, lost = t["features"], f"{t['lost']:5d}  {t['gained']:6d}  {len(t['features']['feature']):5d}"
            lines.append(f"{entry['layer']:5d}  {name:14}  {lost}  {t['fvu_before']:.3f} → {t['fvu_after']:.3f}")
            here = [f["feature"].index(i) for i in named["relevant"] if i in f["feature"]]
            largest = sorted(here, key=lambda at: -abs(f["d"][at] or 0.0))[:SHOWN]
            for at in largest if entry["layer"] == named["layer"] else ():
                row = {k: c[at] for k, c in f.items()}
                d = "–" if row["d"] is None else f"{row['d']:+.2f}"
                lines.append(
                    f"         feature {row['feature']}: {row['mean_before']:.4g} → {row['mean_after']:.4g}, "
                    f"change {row['low']:+.3g} … {row['high']:+.3g}, d {d}, q {row['q']:.2g}"
                )
    lines.append(f"{found['tests']} tests; lost and gained by Benjamini-Hochberg at 5 %")
    weights = found["weights"]
    for w in weights["writers"]:
        if w["share"] is not None:
            control = f", random features {sum(w['random']) / len(w['random']):.3f}" if w["random"] else ""
            lines.append(f"{w['name']}: {w['share']:.3f} of the change in the span of the named features "
                         f"(K/d = {weights['expected']:.3f}{control})")  # fmt: skip
    if weights["elsewhere"] is None:
        lines.append("no weights differ")
    else:
        lines.append(f"{weights['elsewhere']:.1%} of the squared change lies outside what writes to the stream")
    return "\n".join(lines)


def check_lines(checks: Sequence[dict[str, str]]) -> str:
    """The checks of `verify` as a table, and how many of each status there are."""
    width = max(len(c["what"]) for c in checks)
    lines = [f"{c['status']:13}  {c['what']:{width}}  {c['detail']}".rstrip() for c in checks]
    counts = Counter(c["status"] for c in checks)
    return "\n".join([*lines, ", ".join(f"{n} {status}" for status, n in counts.items())])


def method_lines(method: Any) -> str:
    """What a method says of itself: name, kind, what it needs and changes, cost, paper."""
    needs = f", needs {' and '.join(sorted(method.needs))}" if method.needs else ""
    return (
        f"{method.name} ({method.kind}{needs})\n  changes: {method.changes}\n  cost: {method.cost}\n"
        f"  paper: {method.paper}"
    )


def attack_lines(document: Any) -> str:
    """The table and the headline of attacks.json."""
    metric, chance = document["metric"], document["chance"]
    levels = ", ".join(f"{name} {level[metric]:.3f}" for name, level in document["levels"].items())
    lines = [f"{metric} on {document['questions']['n']} held-out records: {levels}"
             + ("" if chance is None else f", chance {chance:.3f}"),
             f"{'attack':16}{metric:>9}   oracle  recovered  95 %           best setting"]  # fmt: skip
    for a in document["attacks"]:
        if "skipped" in a:
            lines.append(f"{a['name']:16}left out: {a['skipped']}")
            continue
        b = a["best"]
        oracle = b.get(f"oracle_{metric}")
        share = "not measurable          " if b["recovered"] is None else (
            f"{b['recovered']:9.2f}  {b['recovered_low']:.2f} … {b['recovered_high']:.2f}  ")  # fmt: skip
        settings = " ".join(f"{k}={v}" for k, v in b["settings"].items())
        lines.append(f"{a['name']:16}{b[metric]:9.3f}  {'       ' if oracle is None else f'{oracle:7.3f}'}  {share}"
                     f"  {shorten(settings, 60, placeholder=' …')}")  # fmt: skip
        lines += [f"{'':16}{t['note']}" for t in a["tried"] if "note" in t]
    if document["damage"] and "models" in document["damage"]:
        lines.append("retain questions with a forget keyword in front (damage, no recovery):")
        for name, scores in document["damage"]["models"].items():
            lines.append(f"  {name:14}" + "  ".join(f"{asked} {s['accuracy']:.3f}" for asked, s in scores.items()))
    head = document["headline"]
    if head:
        other = head[f"oracle_{metric}"]
        beside = "; no oracle to compare with" if other is None else f", the oracle's is {other:.3f}"
        lines.append(
            f"The strongest attack, {head['attack']}, recovers {head['recovered']:.0%} ({head['low']:.0%} … "
            f"{head['high']:.0%}) of what was forgotten: {metric} {head[metric]:.3f} after it{beside}."
        )
    return "\n".join(lines)
