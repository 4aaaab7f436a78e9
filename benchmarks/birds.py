"""The topic `birds` out of a real pretrained model, with nothing but the files: how much goes, how much stays?

    saeunlearn train-saes --model M --corpus forget.jsonl --corpus retain.jsonl --out SAES
    saeunlearn unlearn --model M --forget … --retain … --saes SAES --out RUN
    python benchmarks/birds.py --run RUN --data DATA

`DATA` is a folder with stories260K/ and tinystories/ (forget_birds_*.jsonl, retain_*.jsonl). Without --run the two
commands above are run first, for every method of --methods (with its defaults; those that need SAEs and a selection
take SSPU's own; delta's small model is the model itself). The word list below is for scoring only; no method sees it.

`--relearn 10` also trains each edited model on ten of the bird stories, at several learning rates, and measures the
topic's words of the test stories on the way: `back` is the share of the rise that the best of them undoes.
`--retain-rise .009` first scales each edit to that rise of the loss on the retain test stories, so that methods are
compared at the same cost; one that costs less at full strength stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeunlearn.checkpoints import write_json
from saeunlearn.cli import main as saeunlearn
from saeunlearn.corpus import Corpus, Window, endless, windows
from saeunlearn.erasure import Erasure
from saeunlearn.evaluation.points import at_strength
from saeunlearn.losses import mean_loss, token_losses
from saeunlearn.methods import get_method
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress
from saeunlearn.training import TrainConfig, train

TOPIC = re.compile(
    r"(birds?|birdies?|birdhouse|birdcage|nests?|nested|nesting|feathers?|feathery|wings?|winged|owls?|crows?|ravens?|robins?|"
    r"parrots?|pigeons?|doves?|eagles?|hawks?|ducks?|ducklings?|chicks?|chickens?|hens?|roosters?|geese|goose|swans?|"
    r"sparrows?|peacocks?|penguins?|seagulls?|woodpeckers?|hummingbirds?|beaks?|chirp(s|ed|ing)?|tweet(s|ed|ing)?|"
    r"peck(s|ed|ing)?|flap(s|ped|ping)?)",
    re.IGNORECASE,
)
PROMPTS = (
    "Tom looked up and saw a bird. The bird",
    "The little bird sat in its nest and",
    "Once upon a time there was an owl who",
    "Once upon a time there was a dog who",
    "Lily went to the park with her mom. They",
    "Ben had a big red ball. He",
)
MAX_LENGTH = 256
RATES, MARKS = (1e-4, 5e-4, 2e-3), (5, 10, 20, 40)  # of relearning, in batches of four stories


def topic_tokens(model: LanguageModel, window: Window) -> Tensor:
    """Bool [tokens after the first]: does the token belong to a word of the topic?"""
    pieces = model.tokenizer.convert_ids_to_tokens(list(window.ids[1:]))
    text, spans = "", []
    for piece in pieces:
        shown = " " if piece.startswith("<0x") else piece.replace("▁", " ")
        spans.append((len(text), len(text) + len(shown)))
        text += shown
    words = [m.span() for m in re.finditer(r"[A-Za-z]+", text) if TOPIC.fullmatch(m.group())]
    return torch.tensor([any(a < end and b > start for start, end in words) for a, b in spans])


def measure(model: LanguageModel, forget: Corpus, retain: Corpus) -> dict[str, float]:
    """Mean loss (nats a token) on the topic's words, on the other words of the same stories, on retain stories."""
    items = windows(forget, model, MAX_LENGTH)
    losses = token_losses(model, items)
    marks = torch.cat([topic_tokens(model, w) for w in items])
    flat = torch.cat(losses)
    kept = torch.cat(token_losses(model, windows(retain, model, MAX_LENGTH)))
    return {"topic": float(flat[marks].mean()), "other": float(flat[~marks].mean()), "retain": float(kept.mean()),
            "topic_tokens": int(marks.sum()), "other_tokens": int((~marks).sum())}  # fmt: skip


def scaled_to(rise: float, model_dir: Path, erasure: Erasure, data: Path) -> tuple[Erasure, float]:
    """The Erasure at the strength, to 1 %, at which the retain test stories' loss rises by this share, and that."""
    items = windows(
        Corpus.load(data / "tinystories/retain_test.jsonl"), model := LanguageModel.open(model_dir), MAX_LENGTH
    )
    before = mean_loss(model, items)

    def within(strength: float) -> bool:
        with at_strength(erasure, strength).apply(model):
            return mean_loss(model, items) <= (1 + rise) * before

    if within(1.0):
        return erasure, 1.0
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return at_strength(erasure, low), low


def score(model_dir: Path, erasure: Erasure, data: Path) -> dict[str, Any]:
    """Before and after on the test files, with greedy samples side by side."""
    forget = Corpus.load(data / "tinystories/forget_birds_test.jsonl")
    retain = Corpus.load(data / "tinystories/retain_test.jsonl")
    model = LanguageModel.open(model_dir)
    before, said = measure(model, forget, retain), model.generate(PROMPTS)
    with erasure.apply(model):
        after, says = measure(model, forget, retain), model.generate(PROMPTS)
    return {
        "before": before, "after": after, "topic_rise": after["topic"] - before["topic"],
        "other_rise": after["other"] / before["other"] - 1, "retain_rise": after["retain"] / before["retain"] - 1,
        "samples": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(PROMPTS, said, says)],
    }  # fmt: skip


def relearned(model_dir: Path, erasure: Erasure, data: Path, n: int, seed: int) -> dict[str, Any]:
    """The topic's loss on the test stories after training all weights on n training stories, by rate and step."""
    test, none = Corpus.load(data / "tinystories/forget_birds_test.jsonl"), Corpus.load(
        data / "tinystories/retain_test.jsonl").sample(1, 0)  # fmt: skip
    stories = Corpus.load(data / "tinystories/forget_birds_train.jsonl").sample(n, seed)
    found: dict[str, dict[str, float]] = {}
    for lr in RATES:
        model = LanguageModel.open(model_dir)
        erasure.apply(model)
        model.model.requires_grad_(True)
        curve = {"0": measure(model, test, none)["topic"]}

        def after(step: int, model: LanguageModel = model, curve: dict[str, float] = curve) -> None:
            if step in MARKS:
                curve[str(step)] = measure(model, test, none)["topic"]

        rows = endless(windows(stories, model, MAX_LENGTH), model.pad_id, 4, seed)
        train(
            model, rows, TrainConfig(steps=MARKS[-1], lr=lr, weight_decay=0.0), ConsoleProgress(), "relearning", after
        )
        found[f"{lr:g}"] = curve
    return {"stories": n, "curves": found, "best": min(v for c in found.values() for v in c.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--run", type=Path, help="a finished run directory")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/birds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["sspu"], help="sspu first where others need its selection")
    parser.add_argument("--relearn", type=int, default=0, metavar="N", help="train the edited models on N stories")
    parser.add_argument("--retain-rise", type=float, metavar="SHARE", help="compare at this rise of the retain loss")
    args = parser.parse_args()
    model = args.data / "stories260K"
    files = [args.data / f"tinystories/{n}_train.jsonl" for n in ("forget_birds", "retain")]
    results = {}
    for seed in [0] if args.run else args.seeds:
        made = json.loads((args.run / "erasure/erasure.json").read_text()) if args.run else None
        for method in [made["method"]] if made else args.methods:
            run = args.run or carry_out(method, seed, model, files, args.out)
            if run is None:
                print(f"{method}, seed {seed}: failed", flush=True)
                continue
            erasure, strength = Erasure.load(run / "erasure"), 1.0
            if args.retain_rise is not None:
                erasure, strength = scaled_to(args.retain_rise, model, erasure, args.data)
            result = {"strength": strength, **score(model, erasure, args.data)}
            selection = run / "selection.json"
            result["layer"] = json.loads(selection.read_text())["layer"] if selection.exists() else None
            results[f"{method} {seed}"] = result
            if args.relearn:
                again = result["relearned"] = relearned(model, erasure, args.data, args.relearn, seed)
                again["back"] = (result["after"]["topic"] - again["best"]) / result["topic_rise"]
                print(f"{method}, seed {seed}: relearned on {args.relearn} stories to {again['best']:.2f} nats, "
                      f"{again['back']:.0%} of the rise is undone", flush=True)  # fmt: skip
            print(f"{method}, seed {seed}, layer {result['layer']}, strength {strength:.2f}: "
                  f"topic words {result['before']['topic']:.2f} → {result['after']['topic']:.2f} nats "
                  f"({result['topic_rise']:+.2f}), other words {result['other_rise']:+.1%}, "
                  f"retain stories {result['retain_rise']:+.1%}", flush=True)  # fmt: skip
            for s in result["samples"]:
                print(f"  {s['prompt']} …\n    before: {s['before']!r}\n    after:  {s['after']!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "birds.json", results)


def carry_out(method: str, seed: int, model: Path, files: list[Path], out: Path) -> Path | None:
    """The run directory of a method, made unless it is there; None where the method says that it cannot."""
    run = out / (f"run-{seed}" if method == "sspu" else f"run-{method}-{seed}")
    command = ["unlearn", "--model", str(model), "--forget", str(files[0]), "--retain", str(files[1]),
               "--method", method, "--out", str(run), "--seed", str(seed)]  # fmt: skip
    if method == "delta":  # there is no smaller model with these tokens
        command += ["--set", f"offset_model={model}"]
    if needs := get_method(method).needs:
        saes = out / f"saes-{seed}"
        if not saes.exists():
            corpora = [x for f in files for x in ("--corpus", str(f))]
            saeunlearn(["train-saes", "--model", str(model), *corpora, "--out", str(saes), "--seed", str(seed)])
        command += ["--saes", str(saes)]
        if "selection" in needs and method != "sspu":
            command += ["--selection", str(out / f"run-{seed}" / "selection.json")]
    status = saeunlearn(command)
    if status == 130:
        raise KeyboardInterrupt
    return run if status == 0 else None


if __name__ == "__main__":
    main()
