"""Do the metrics tell what is gone? Every one of them on models whose answer is known.

    python benchmarks/measuring.py --out runs/bench/measuring

On a sandbox world: the original (knows the forget topic), the oracle (retrained without it), a second oracle (the same
with another seed: how far two models differ that both never knew), and the control `random labels`: the original
fine-tuned on the forget questions with wrong answers, so that something else stands where its knowledge was. The
membership attacks have the forget questions with yet other wrong answers as non-members. Writes measuring.json and
table.md; the second oracle is kept in the folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saeunlearn.checkpoints import atomic_folder, write_json
from saeunlearn.corpus import Corpus, Record, endless, windows
from saeunlearn.errors import RunError
from saeunlearn.evaluation.evaluate import METRICS, evaluate
from saeunlearn.evaluation.membership import membership, mia_score, priv_leak
from saeunlearn.evaluation.memorisation import generations, perplexity
from saeunlearn.evaluation.tofu import forget_quality, truth_ratios
from saeunlearn.evaluation.verdict import MARGIN, verdict
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import Sandbox, SandboxConfig, TrainConfig, WorldConfig, build, learn

SCHEMA = 1
NEW_TOKENS = 12  # an answer of the sandbox is shorter, and the model ends its sentences
EPOCHS = 10  # of the fine-tuning on random labels
# What a model that forgot shares with the oracle: scores of the forget questions, within the margin or by the test.
GONE = ("multiple_choice", "cloze", "probability", "exact_memorisation", "extraction_strength", "rouge_l_recall",
        "rouge_l_f1", "auc loss", "auc min_k", "auc min_k_plus_plus", "forget quality arithmetic",
        "forget quality geometric")  # fmt: skip


def mislabelled(questions: Corpus, seed: int) -> Corpus:
    """The questions with a wrong answer each: another value of the attribute, the same one for all of a fact."""
    rng = random.Random(seed)
    values: dict[Any, set[str]] = defaultdict(set)
    for q in questions:
        values[q.meta["topic"], q.meta["attribute"]].add(q.answer)
    chosen: dict[Any, str] = {}
    out = []
    for q in questions:
        others = sorted(values[q.meta["topic"], q.meta["attribute"]] - {q.answer})
        fact = (q.meta["entity"], q.meta["attribute"])
        answer = chosen.setdefault(fact, rng.choice(others))
        out.append(Record(question=q.question, answer=answer, meta=q.meta))
    return Corpus(tuple(out), f"{questions.name}, mislabelled")


def random_labels(model: LanguageModel, questions: Corpus, seed: int, progress: Progress, lr: float) -> LanguageModel:
    """A copy of the model, fine-tuned on the questions with wrong answers."""
    from saeunlearn.training import train

    twin = model.copy()
    twin.name = "random labels"
    end = f".{model.tokenizer.eos_token}"
    wrong = mislabelled(questions, seed)
    taught = Corpus(tuple(replace(r, answer=r.answer + end) for r in wrong), wrong.name)
    batch = min(32, len(taught))
    rows = endless(windows(taught, twin), twin.pad_id, batch, seed)
    train(twin, rows, TrainConfig(steps=EPOCHS * -(-len(taught) // batch), lr=lr), progress, "random labels")
    return twin


def second_oracle(box: Sandbox, folder: Path, progress: Progress) -> LanguageModel:
    """The oracle trained once more from another start and in another order. Kept in `folder`."""
    if not folder.exists():
        info = box.describe()["config"]
        world = WorldConfig(**{**info["world"], "seed": info["world"]["seed"] + 1000})  # seeds the training only
        config = SandboxConfig(**{**info, "world": world, "training": TrainConfig(**info["training"])})
        left_out = {r.id for r in Corpus.load(box.forget)}
        texts = [r.text for r in Corpus.load(box.root / "train.jsonl") if r.id not in left_out]
        tokenizer = LanguageModel.open(box.model, device="cpu").tokenizer
        with atomic_folder(folder) as work:
            learn(config, tokenizer, texts, progress, "training a second oracle")[0].save(work)
    return LanguageModel.open(folder)


def measure(model: LanguageModel, reference: LanguageModel, questions: Corpus, progress: Progress) -> dict[str, Any]:
    """Every metric of one model; `reference` gives the perplexity of what it generates."""
    groups = {name: questions.where(set=name) for name in ("forget", "near", "far")}
    forget = groups["forget"]
    regrouped = [replace(q, meta={**q.meta, "phrasing": None, "entity_status": None}) for q in questions]
    metrics = [m for m in METRICS if m != "nll"]
    scored = evaluate(
        model, questions=Corpus(tuple(regrouped), "questions"), texts=None, prompts=(), metrics=metrics,
        progress=progress,
    )  # fmt: skip
    odd = perplexity(reference, forget, generations(model, forget, NEW_TOKENS, progress), progress)
    return {
        "evaluation": scored,
        "perplexity": {"ids": [forget.records[i].id[:16] for i in odd.records], "values": odd.values},
        "truth_ratio": {k: v.values for k, v in truth_ratios(model, forget, progress).items()},
        "membership": membership(model, forget, mislabelled(forget, seed=1), progress=progress),
    }


def summary(found: Mapping[str, Any], oracle: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """{metric: value} of one model, of the forget questions unless it says otherwise."""
    groups = found["evaluation"]["groups"]
    row: dict[str, Any] = {m: groups["forget"][m]["mean"] for m in METRICS if m != "nll"}
    for name, attack in found["membership"]["attacks"].items():
        row[f"auc {name}"] = attack["auc"]
    areas = [d["membership"]["attacks"] for d in (found, oracle)]
    row["PrivLeak (min-40 %)"] = priv_leak(*(a["min_k"]["auc"] for a in areas))
    row["MIA score"] = mia_score(areas[0]["loss"]["auc"])
    for kind, values in found["truth_ratio"].items():
        row[f"truth ratio {kind}"] = statistics.mean(values)
        row[f"forget quality {kind}"] = forget_quality(values, oracle["truth_ratio"][kind])["p_value"]
    odd = found["perplexity"]["values"]
    row["perplexity (median)"] = statistics.median(odd) if odd else None
    for group in ("near", "far"):
        row |= {f"{m} {group}": groups[group][m]["mean"] for m in ("multiple_choice", "cloze")}
    for group in ("forget", "near", "far"):
        for m in ("multiple_choice", "cloze"):
            scores = (d["evaluation"]["groups"][group][m]["values"] for d in (original, found, oracle))
            row[f"verdict {m} {group}"] = verdict(*scores, forget=group == "forget")
    return row


def gone(metric: str, value: float, oracle: float) -> str:
    """like, above or below: the score of one model next to the oracle's."""
    if metric.startswith("forget quality"):
        return "like" if value >= 0.05 else "unlike"
    if abs(value - oracle) <= MARGIN:
        return "like"
    return "above" if value > oracle else "below"


def compare(models: Mapping[str, LanguageModel], questions: Corpus, progress: Progress) -> dict[str, Any]:
    """{"models": {name: what `measure` found}, "table": {name: `summary`}, "gone": {name: {metric: like …}}}."""
    found = {name: measure(m, models["original"], questions, progress) for name, m in models.items()}
    rows = {name: summary(f, found["oracle"], found["original"]) for name, f in found.items()}
    judged = {name: {m: gone(m, row[m], rows["oracle"][m]) for m in GONE} for name, row in rows.items()}
    return {"models": found, "table": rows, "gone": judged}


def table(rows: Mapping[str, Mapping[str, Any]], judged: Mapping[str, Mapping[str, str]]) -> str:
    def cell(name: str, metric: str) -> str:
        value = rows[name][metric]
        if isinstance(value, Mapping):
            return value["verdict"] + ("" if value["certain"] or value["verdict"] == "no test" else " (unsure)")
        said = judged[name].get(metric)
        shown = "–" if value is None else f"{value:.2g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"
        return shown + (f" {said}" if said and said != "like" else "")

    lines = ["| metric | " + " | ".join(rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for metric in next(iter(rows.values())):
        lines.append(f"| {metric.replace('_', ' ')} | " + " | ".join(cell(n, metric) for n in rows) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the wrong labels")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the fine-tuning on wrong labels")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/measuring"))
    args = parser.parse_args()
    progress, started = ConsoleProgress(), time.monotonic()
    box = build(SandboxConfig(world=WorldConfig(seed=args.world)), progress)
    if not (box.oracle / "oracle.json").exists():
        raise RunError(f"no oracle: run `saeunlearn sandbox build --oracle --seed {args.world}` first")
    args.out.mkdir(parents=True, exist_ok=True)
    questions = Corpus.load(box.questions)
    original = LanguageModel.open(box.model)
    forget = questions.where(set="forget")
    models = {
        "original": original,
        "oracle": LanguageModel.open(box.oracle),
        "second oracle": second_oracle(box, args.out / f"oracle-{args.world}", progress),
        "random labels": random_labels(original, forget, args.seed, progress, args.lr),
    }
    result = {
        "schema": SCHEMA, "world": args.world, "seed": args.seed,
        "settings": {"lr": args.lr, "epochs": EPOCHS, "new_tokens": NEW_TOKENS, "margin": MARGIN},
        "versions": {n: importlib.metadata.version(n) for n in ("saeunlearn", "torch", "transformers", "rouge-score")},
        "threads": torch.get_num_threads(), **compare(models, questions, progress),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    write_json(args.out / "measuring.json", result)
    text = table(result["table"], result["gone"])
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"seconds": result["seconds"]}))


if __name__ == "__main__":
    main()
