"""The command line: one function a verb, no logic of its own. Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from . import options
from .errors import ConfigError, SaeunlearnError, VerificationError
from .parser import build_parser
from .terminal import (
    attack_lines,
    check_lines,
    diff_lines,
    json_or_empty,
    layer_lines,
    method_lines,
    sae_lines,
    show_erasure,
    show_ledger,
    show_result,
    show_samples,
    show_verdicts,
    without_values,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 1 an error that is said in a line, 130 cancelled."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "verb"):
        parser.print_help()
        return 2
    args.command = ["saeunlearn", *(sys.argv[1:] if argv is None else argv)]
    try:
        if (threads := getattr(args, "threads", None)) is not None:
            import torch

            if threads < 1:
                raise ConfigError(f"--threads {threads}: use at least one")
            torch.set_num_threads(threads)
        VERBS[args.verb](args)
    except (SaeunlearnError, OSError) as e:
        print(f"saeunlearn: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsaeunlearn: cancelled; the same command goes on from the last finished step", file=sys.stderr)
        return 130
    return 0


# --- verbs -------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> None:
    from . import demo as the
    from .pipeline import unlearn
    from .progress import ConsoleProgress

    progress = ConsoleProgress()
    box = the.world(args.seed, progress=progress)
    config = the.config(box, seed=args.seed, device=args.device, dtype=args.dtype, include_text=True)
    run = unlearn(config, args.out, progress, args.command)
    show_result(run)
    print(f"\nNext: try to get it back, beside a model that never knew; check the run; merge it into a checkpoint:\n"
          f"  saeunlearn sandbox build --seed {args.seed} --oracle\n"
          f"  saeunlearn attack {args.out} --oracle {box.oracle}\n"
          f"  saeunlearn verify {args.out}\n"
          f"  saeunlearn apply {run.erasure_dir} {box.model} {args.out / 'model'}")  # fmt: skip


def sandbox(args: argparse.Namespace) -> None:
    from .progress import ConsoleProgress
    from .sandbox.build import SandboxConfig, WorldConfig, build, build_oracle

    box = build(SandboxConfig(world=WorldConfig(seed=args.seed)), ConsoleProgress(), args.out)
    if args.oracle:
        build_oracle(box, ConsoleProgress())
    scores = box.describe()["multiple_choice"]
    print(f"{box.root}\n  model/  forget.jsonl  retain.jsonl  questions.jsonl  train.jsonl\n"
          f"  multiple choice: seen phrasings {scores['seen']:.3f}, held-out {scores['held_out']:.3f}")  # fmt: skip


def train_saes(args: argparse.Namespace) -> None:
    from itertools import product

    from sae_training import SAEConfig, parse_layers
    from sae_training.processes import Processes
    from sae_training.produce import produce

    from .models import LanguageModel, resolve_device
    from .progress import ConsoleProgress, Progress

    given = options.further_settings(args.set) | ({"tokens": args.tokens} if args.tokens is not None else {})
    configs = [
        options.settings_of(SAEConfig, {**given, "architecture": arch, "expansion": width, "k": k}, "SAE")
        for arch, width, k in product(
            args.arch.split(","),
            options.whole_numbers(args.expansion, "--expansion"),
            options.whole_numbers(args.k, "--k"),
        )
    ]
    processes = Processes.launched(resolve_device(args.device))
    model = LanguageModel.open(args.model, device=args.device, dtype=args.dtype)
    rows = produce(
        model, args.corpus, parse_layers(model, args.layers), configs, args.out, seed=args.seed,
        progress=ConsoleProgress() if processes.first else Progress(), resume=args.resume, cache=args.cache,
        cache_dtype=args.cache_dtype, tracker=args.tracker, processes=processes,
    )  # fmt: skip
    if rows:
        print(sae_lines(rows))
        print(f"{args.out}: SAEs, quality.json, quality.png")


def select(args: argparse.Namespace) -> None:
    from . import figures
    from .corpus import Corpus, refuse_overlap
    from .features.selection import SelectConfig
    from .methods import get_method
    from .models import LanguageModel
    from .pipeline import choose, ready_saes
    from .progress import ConsoleProgress

    settings = options.settings_of(get_method(args.method).Config, options.method_settings(args), args.method)
    config = options.settings_of(SelectConfig, options.selection_settings(args), "selection")
    forget, retain = Corpus.load(args.forget), Corpus.load(args.retain)
    refuse_overlap(forget, retain)
    model = LanguageModel.open(args.model, device=args.device, dtype=args.dtype)
    saes = ready_saes(model, args.saes, args.layers)
    chosen = choose(model, saes, forget, retain, config, settings, args.seed, ConsoleProgress())
    args.out.mkdir(parents=True, exist_ok=True)
    chosen.save(args.out / "selection.json")
    figures.save(figures.layer_table(chosen.layers), args.out / "layers.png")
    scores = (chosen.forget_scores, chosen.retain_scores, chosen.relevant, chosen.irrelevant)
    figures.save(figures.feature_scores(*scores), args.out / "features.png")
    print(layer_lines(chosen))
    print(f"{args.out}: selection.json, layers.png, features.png")


def unlearn(args: argparse.Namespace) -> None:
    from .methods import get_method
    from .pipeline import RunConfig
    from .pipeline import unlearn as carry_out
    from .progress import ConsoleProgress

    config = RunConfig(
        model=args.model, forget=args.forget, retain=args.retain, questions=args.questions, saes=args.saes,
        eval_texts=options.named_files(args.eval, "--eval"), selection=args.selection, layers=args.layers,
        select=options.selection_settings(args), method=args.method, settings=options.method_settings(args),
        seed=args.seed, device=args.device, dtype=args.dtype, include_text=args.include_text,
        heal=None if args.heal is None else options.further_settings(args.heal),
    )  # fmt: skip
    run = carry_out(config, args.out, ConsoleProgress(), args.command)
    show_result(run)
    hooks = get_method(args.method).kind in ("guard", "offset")
    after = f"export {run.erasure_dir}" if hooks else f"apply {run.erasure_dir} {args.model}"
    print(f"\nNext: saeunlearn {after} {args.out / 'model'}")


def methods(args: argparse.Namespace) -> None:
    from .methods import RECOMMENDED, get_method, known_methods

    for name in known_methods():
        try:
            print(method_lines(get_method(name)))
        except ConfigError as e:  # a package that does not load must not hide the others
            print(f"{name}: {e}")
    print(f"\nRecommended where facts have to stay away when somebody trains the model again: {RECOMMENDED}")


def diversify(args: argparse.Namespace) -> None:
    from .corpus import Corpus, refuse_overlap, write_jsonl
    from .diversify import diversify as make

    if args.copies < 1:
        raise ConfigError(f"--copies {args.copies}: use at least one")
    forget = Corpus.load(args.forget)
    made = make(forget, args.concept, args.swap, args.seed, args.copies)
    if args.retain:
        retain = Corpus.load(args.retain)
        refuse_overlap(forget, retain)
        there = {r.id for r in retain}
        made = Corpus((*retain, *(r for r in made if r.id not in there)), made.name)
    write_jsonl(args.out, made)
    print(f"{args.out}: {len(made)} retain records")


def evaluate(args: argparse.Namespace) -> None:
    from .checkpoints import write_json
    from .corpus import Corpus
    from .erasure import Erasure
    from .evaluation.evaluate import combine, named_metrics, table, without_labels
    from .evaluation.evaluate import evaluate as measure
    from .evaluation.verdict import JUDGED, verdicts
    from .models import LanguageModel
    from .progress import ConsoleProgress
    from .tokens import banned

    if args.ban and not args.erasure:
        raise ConfigError("--ban keeps the token of an Erasure from being decoded: give --erasure")
    if args.harness is not None:
        return evaluate_harness(args)
    if args.harness_path or args.limit is not None:
        raise ConfigError("--harness-path and --limit belong to --harness")
    metrics = named_metrics(args.metrics)
    if args.oracle and not (args.erasure and args.questions and set(metrics) & set(JUDGED)):
        raise ConfigError(f"--oracle judges an Erasure by {' or '.join(JUDGED)}: give --erasure and --questions")
    texts = {n: Corpus.load(f) for n, f in options.named_files(args.text, "--text").items()}
    questions = Corpus.load(args.questions) if args.questions else None
    if not texts and questions is None and not args.prompt:
        raise ConfigError("nothing to measure: give --questions, --text NAME=FILE or --prompt")
    erasure = Erasure.load(args.erasure) if args.erasure else None
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    model = LanguageModel.open(args.model, device=args.device, dtype=args.dtype)
    oracle = LanguageModel.open(args.oracle, device=args.device, dtype=args.dtype) if args.oracle else None
    progress = ConsoleProgress()
    given: dict[str, Any] = {"questions": questions, "texts": texts, "metrics": metrics, "progress": progress}
    shown = (lambda result: result) if args.include_text else without_labels
    before = shown(measure(model, prompts=args.prompt, **given))
    result: dict[str, Any] = before
    if erasure is not None:
        with erasure.apply(model), banned(model, args.ban) if args.ban else nullcontext():
            after = shown(measure(model, prompts=args.prompt, **given))
        result = combine(before, after, args.seed)
        if result["comparison"]:
            print(table(result["comparison"]))
        if oracle is not None:
            result["oracle"] = shown(measure(oracle, prompts=(), **given))
            result["verdicts"] = verdicts(before, after, result["oracle"])
            show_verdicts(result["verdicts"])
        show_samples(result["samples"])
    else:
        print(json.dumps(without_values(result), indent=1, ensure_ascii=False))
    if args.out:
        write_json(args.out, result)


def evaluate_harness(args: argparse.Namespace) -> None:
    from .checkpoints import write_json
    from .erasure import Erasure
    from .evaluation.harness import before_and_after, load_tasks, table
    from .models import LanguageModel
    from .progress import ConsoleProgress

    if args.questions or args.text or args.prompt:
        raise ConfigError("--harness measures its tasks alone: leave out --questions, --text and --prompt")
    progress = ConsoleProgress()
    erasure = Erasure.load(args.erasure) if args.erasure else None
    tasks = load_tasks([args.harness], args.harness_path, progress)
    model = LanguageModel.open(args.model, device=args.device, dtype=args.dtype)
    result = before_and_after(model, tasks, erasure, ban=args.ban, limit=args.limit, seed=args.seed,
                              include_text=args.include_text, progress=progress)  # fmt: skip
    print(table(result["comparison"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)


def compare(args: argparse.Namespace) -> None:
    from .cases import own_plan, sandbox_plan
    from .evaluation.frontier import compare as carry_out
    from .progress import ConsoleProgress

    own = options.given(args, "model", "forget", "retain", "questions", "saes", "selection", "oracle")
    boxed = options.given(args, "tune_worlds", "worlds")
    if wrong := own if args.sandbox else boxed:
        raise ConfigError(f"{', '.join(wrong)}: {'not with' if args.sandbox else 'only with'} --sandbox")
    make, progress = sandbox_plan if args.sandbox else own_plan, ConsoleProgress()
    machine = {"device": args.device, "dtype": args.dtype}
    plan, open_case = make(args.methods, args.trials, args.seeds, args.out, progress, **own, **boxed, **machine)
    carry_out(plan, open_case, args.out, progress)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{args.out}: results.json, points.csv, table.md, table.tex, frontier.png, constraints.png")


def apply(args: argparse.Namespace) -> None:
    from .erasure import Erasure

    erasure, run = Erasure.load(args.erasure), args.erasure.resolve().parent
    rows = json_or_empty(run / "evaluation.json").get("comparison", [])
    erasure.merge(
        args.checkpoint, args.out, keep_originals=not args.no_originals, force=args.force, card=run / "model_card.md",
        cost={f"{r['group']} {r['metric']}": {"before": r["before"], "after": r["after"]} for r in rows},
    )  # fmt: skip
    print(f"{args.out}: an ordinary Hugging Face folder with the Erasure {erasure.id[:12]} merged in")
    if not args.no_originals:
        print("It keeps what `saeunlearn revert` needs, which is as sensitive as the original: "
              "use --no-originals for a folder to give away.")  # fmt: skip


def revert(args: argparse.Namespace) -> None:
    from .erasure import unmerge

    unmerge(args.checkpoint, args.out)
    print(f"{args.out}: as before the last Erasure, bit for bit")


def export(args: argparse.Namespace) -> None:
    from .erasure import Erasure
    from .export import export as carry_out

    print(carry_out(Erasure.load(args.erasure), args.out, args.base))


def inspect(args: argparse.Namespace) -> None:
    from .erasure import Erasure

    show_erasure(Erasure.load(args.erasure))


def ledger(args: argparse.Namespace) -> None:
    from .erasure import read_ledger

    show_ledger(args.checkpoint, read_ledger(args.checkpoint))


def attack(args: argparse.Namespace) -> None:
    from .attack_run import attack as carry_out
    from .progress import ConsoleProgress

    document = carry_out(
        args.run, ConsoleProgress(), oracle=args.oracle, names=args.attacks.split(",") if args.attacks else None,
        budget=args.budget, seed=args.seed, device=args.device, dtype=args.dtype,
    )  # fmt: skip
    print(attack_lines(document))
    print(f"{args.run}: attacks.json, figures/attacks.png, figures/relearning.png, and the report with them")


def report(args: argparse.Namespace) -> None:
    from .checkpoints import sha256_file
    from .evaluation.report import write_report
    from .progress import ConsoleProgress

    print(write_report(args.run, include_text=args.include_text, progress=ConsoleProgress()))
    print(f"{args.run / 'report.json'}  sha256 {sha256_file(args.run / 'report.json')}")


def verify(args: argparse.Namespace) -> None:
    from .checkpoints import write_json
    from .progress import ConsoleProgress
    from .verify import verify as check

    paths = {n: p for n in ("model", "forget", "retain", "questions") if (p := getattr(args, n)) is not None}
    checks = check(args.run, paths, options.named_files(args.eval, "--eval"), sample=args.sample, seed=args.seed,
                   device=args.device, progress=ConsoleProgress())  # fmt: skip
    print(check_lines(checks))
    if args.out:
        write_json(args.out, {"schema": 1, "seed": args.seed, "sample": args.sample, "checks": checks})
    if failed := sum(c["status"] == "fail" for c in checks):
        raise VerificationError(f"{args.run}: {failed} of {len(checks)} checks failed")


def diff(args: argparse.Namespace) -> None:
    from . import figures, figures_diff
    from .checkpoints import write_json
    from .corpus import Corpus
    from .features.diff import FDR, feature_diff, open_pair
    from .features.selection import Selection
    from .pipeline import ready_saes
    from .progress import ConsoleProgress

    texts = {n: Corpus.load(f) for n, f in options.named_files(args.text, "--text").items()}
    selection = Selection.load(args.selection) if args.selection else None
    before, after = open_pair(args.before, args.after, args.erasure, args.device, args.dtype)
    found = feature_diff(before, after, ready_saes(before, args.saes, args.layers), texts, selection=selection,
                         seed=args.seed, progress=ConsoleProgress())  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "diff.json", found)
    for entry in found["layers"]:
        named = selection.relevant if selection and selection.layer == entry["layer"] else []
        figures.save(figures_diff.activity(entry, named, FDR), args.out / f"features-{entry['layer']}.png")
    figures.save(figures_diff.weight_shares(found["weights"]), args.out / "weights.png")
    print(diff_lines(found))


def explore(args: argparse.Namespace) -> None:
    from saeunlearn_explorer import page

    page.explore(args.run, args.port, args.share)


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": demo, "sandbox": sandbox, "train-saes": train_saes, "select": select, "unlearn": unlearn,
    "methods": methods, "diversify": diversify, "evaluate": evaluate, "compare": compare, "apply": apply,
    "revert": revert, "export": export, "inspect": inspect, "ledger": ledger, "attack": attack, "report": report,
    "verify": verify, "diff": diff, "explore": explore,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
