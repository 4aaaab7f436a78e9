"""The options of every verb of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __version__

DEMO_DIR = Path("runs/demo")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of every verb; `args.verb` names it."""
    parser = argparse.ArgumentParser(
        prog="saeunlearn",
        description="Take chosen knowledge out of a language model through its SAE features, and prove it.",
        epilog="Start with `saeunlearn demo`.",
    )
    parser.add_argument("--version", action="version", version=f"saeunlearn {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=text, description=text)
        p.set_defaults(verb=name)
        return p

    p = verb("demo", "forget one topic of the sandbox world, with the evidence")
    p.add_argument("--out", type=Path, default=DEMO_DIR, help=f"run directory (default {DEMO_DIR})")
    add_common(p)

    p = verb("sandbox", "build the fictional world and the small model that learns it")
    p.add_argument("action", choices=["build"])
    p.add_argument("--out", type=Path, help="folder to build in (default: the user cache)")
    p.add_argument("--oracle", action="store_true", help="also train the model that never saw the forget set")
    add_common(p)

    p = verb("train-saes", "train SAEs on the residual stream of many layers from one forward pass")
    p.add_argument("--model", required=True, help="model folder or hub id")
    p.add_argument("--corpus", required=True, action="append",
                   help="text, or .safetensors with a tensor `tokens`; may be given several times")  # fmt: skip
    p.add_argument("--out", type=Path, required=True, help="folder for the SAEs (SAELens format)")
    p.add_argument("--layers", default="all", help="`all`, or numbers and ranges: 1,3,5-8")
    p.add_argument("--arch", default="topk", help="topk, batchtopk, matryoshka, relu, jumprelu, gated; or several: a,b")
    p.add_argument("--expansion", default="8", help="d_sae / d_model (default 8); or several: 4,8")
    p.add_argument("--k", default="16", help="active features at a position (default 16); or several: 16,32")
    p.add_argument("--tokens", type=int, help="positions to train on, epochs counted (default 1000000)")
    p.add_argument("--cache", type=Path, help="keep activations in this folder, for later runs to reuse")
    p.add_argument("--cache-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--resume", action="store_true", help="go on where a run with the same settings was stopped")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting: lr, batch …")
    p.add_argument("--tracker", help="tensorboard, trackio, wandb … (default: none)")
    add_common(p)

    p = verb("select", "choose the layer and the features that carry the forget set")
    add_data(p)
    add_selection(p)
    p.add_argument("--saes", required=True, help="SAEs: folder, or release:sae_id of sae_lens")
    p.add_argument("--out", type=Path, required=True, help="folder for selection.json and its figures")
    add_method(p)
    add_common(p)

    p = verb("unlearn", "the whole run: SAEs, selection, projected unlearning, evaluation, report")
    add_data(p)
    add_selection(p)
    p.add_argument("--saes", help="ready SAEs (folder, or release:sae_id); default: train them on the data")
    p.add_argument("--selection", help="selection.json of an earlier run with the same model, data and SAEs")
    p.add_argument("--questions", help="multiple-choice questions to evaluate with")
    p.add_argument("--eval", action="append", default=[], metavar="NAME=FILE", help="further texts to evaluate on")
    p.add_argument("--out", type=Path, required=True, help="run directory; the same command resumes it")
    p.add_argument("--include-text", action="store_true", help="keep samples in the run directory and the report")
    p.add_argument("--heal", nargs="*", metavar="NAME=VALUE",
                   help="then train towards the original on what is to be kept: steps, lr, samples …")  # fmt: skip
    add_method(p)
    add_common(p)

    p = verb("diversify", "turn forget records into matched retain records: the same templates without the concept")
    p.add_argument("--forget", required=True, help="what to forget: JSONL, JSON, text file or data set")
    p.add_argument("--concept", required=True, action="append", help="word or name that the records are about; several")
    p.add_argument(
        "--swap", action="append", default=[], help="what takes a concept's place (default: nothing); several"
    )
    p.add_argument("--copies", type=int, default=1, help="records to make of each forget record (default 1)")
    p.add_argument("--retain", help="retain records to put in front of them")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True, help="JSONL file for the retain records")

    verb("methods", "what there is to choose from with --method")

    p = verb("compare", "methods × seeds at an equal tuning budget, with intervals and paired tests")
    p.add_argument("--methods", required=True, nargs="+", help="see `saeunlearn methods`")
    p.add_argument("--trials", type=int, default=8, help="of each method; the first is its defaults (default 8)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one scoring run each (default 0 … 4)")
    p.add_argument("--out", type=Path, required=True, help="the same command, several times at once too, goes on here")
    add_data(p, required=False)
    p.add_argument("--questions", help="multiple-choice questions with a field `set`: tuning sees one half of them, "
                                       "scoring the other")  # fmt: skip
    p.add_argument(
        "--saes", help="ready SAEs (folder, or release:sae_id); default: train them where a method needs any"
    )
    p.add_argument("--selection", help="selection.json made with these SAEs (default: one for each seed)")
    p.add_argument("--oracle", help="the model retrained without the forget set: the floor of forgetting, not chance")
    p.add_argument("--sandbox", action="store_true", help="compare on sandbox worlds instead of a model of your own")
    p.add_argument("--tune-worlds", type=int, nargs="+", help="--sandbox: every trial runs on all (default 0)")
    p.add_argument(
        "--worlds", type=int, nargs="+", help="--sandbox: scoring runs take these in turn (default 31 32 33)"
    )
    add_machine(p)

    p = verb("evaluate", "measure a model: multiple choice, cloze, loss, samples")
    p.add_argument("--model", required=True, help="model folder or hub id")
    p.add_argument("--erasure", type=Path, help="apply this Erasure for the measurement, and compare with before")
    p.add_argument("--oracle", help="with --erasure: the model retrained without the forget set, for the verdict")
    p.add_argument("--metrics", default="default", metavar="all|NAME,…",
                   help="all, or names; default: multiple choice, cloze and loss")  # fmt: skip
    p.add_argument("--ban", metavar="TOKEN", help="with --erasure: never decode this token (that of unierase, say)")
    p.add_argument("--questions", help="multiple-choice questions")
    p.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="texts to measure the loss on")
    p.add_argument("--prompt", action="append", default=[], help="prompt to continue greedily")
    p.add_argument("--harness", metavar="TASK[,TASK…]", help="measure tasks of the lm-evaluation-harness instead")
    p.add_argument("--harness-path", type=Path, metavar="DIR", help="folder with own task files of the harness")
    p.add_argument("--limit", type=int, metavar="N", help="with --harness: the first N documents of each task")
    p.add_argument("--out", type=Path, help="JSON file for the result")
    p.add_argument("--include-text", action="store_true", help="keep texts: labels of subgroups, harness documents")
    add_common(p)

    p = verb("apply", "Erasure + checkpoint folder → checkpoint folder, shard by shard")
    p.add_argument("erasure", type=Path)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--no-originals", action="store_true", help="keep no way back in the folder")
    p.add_argument("--force", action="store_true", help="apply to a checkpoint that the Erasure was not made on")

    p = verb("revert", "undo the last Erasure of a merged folder, bit for bit")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("out", type=Path)

    p = verb("export", "low-rank Erasure → PEFT adapter; guard → a folder that attaches without saeunlearn")
    p.add_argument("erasure", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--base", help="name or path of the base model that a PEFT adapter will name (required for one)")

    p = verb("inspect", "what an Erasure is and what it changes")
    p.add_argument("erasure", type=Path)

    p = verb("ledger", "which requests were carried out on a checkpoint folder, and what each cost")
    p.add_argument("checkpoint", type=Path)

    p = verb(
        "attack", "try to get back what a finished run has unlearned: relearning, quantisation, probing, prompting"
    )
    p.add_argument("run", type=Path, help="run directory; the same command resumes it")
    p.add_argument("--oracle", help="the model retrained without the forget set (default: compare with chance)")
    p.add_argument("--attacks", help="some of them, a,b,… (default: all)")
    p.add_argument("--budget", default="quick", choices=["quick", "full"])
    add_common(p)
    p.set_defaults(device=None, dtype=None)

    p = verb("report", "write the removal report of a run directory again: page, Markdown, JSON, model card")
    p.add_argument("run", type=Path)
    p.add_argument("--include-text", action="store_true", help="show samples of what was forgotten")

    p = verb("diff", "two checkpoints through the same SAEs: features lost and gained, and where the weights changed")
    p.add_argument("before", help="model folder or hub id")
    p.add_argument("after", nargs="?", help="model folder or hub id of the same architecture; or give --erasure")
    p.add_argument("--erasure", type=Path, help="compare with this Erasure applied to the first model")
    p.add_argument("--saes", required=True, help="SAEs: folder, or release:sae_id of sae_lens")
    p.add_argument("--layers", default="all", help="layers to look at: `all`, or 1,3,5-8")
    p.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="texts to look at")
    p.add_argument("--selection", help="selection.json that names features (for the span of the weight change)")
    p.add_argument("--out", type=Path, required=True, help="folder for diff.json and its figures")
    add_common(p)

    p = verb("explore", "look at a run in the browser: layers, features, prompts before and after, steering, erasing")
    p.add_argument("run", type=Path, nargs="?", default=DEMO_DIR, help=f"run directory (default {DEMO_DIR})")
    p.add_argument("--port", type=int, help="port on this machine (default: the first free one from 7860)")
    p.add_argument("--share", action="store_true", help="also a public link through gradio's servers (default: none)")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")

    p = verb("verify", "check a run against its report: hashes, numbers, and a sample of the scores measured anew")
    p.add_argument("run", type=Path)
    for name in ("model", "forget", "retain", "questions"):
        p.add_argument(f"--{name}", help="where it lies now (default: where the run found it)")
    p.add_argument("--eval", action="append", default=[], metavar="NAME=FILE", help="where an evaluation text lies now")
    p.add_argument("--sample", type=int, default=64, help="questions, and texts, to score anew (default 64; 0: none)")
    p.add_argument("--out", type=Path, help="JSON file for the checks")
    add_common(p)
    return parser


def add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--seed", type=int, default=0)
    add_machine(p)


def add_machine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")


def add_data(p: argparse.ArgumentParser, required: bool = True) -> None:
    p.add_argument("--model", required=required, help="model folder or hub id")
    p.add_argument("--forget", required=required, help="what to forget: JSONL, JSON, text file or data set")
    p.add_argument("--retain", required=required, help="what to keep: neighbouring topics and general text")


def add_selection(p: argparse.ArgumentParser) -> None:
    p.add_argument("--layers", default="all", help="candidate layers: `all`, or 1,3,5-8")
    p.add_argument("--k", type=int, help="relevant features (default: d_model / 8, at most 64)")
    p.add_argument("--layer", type=int, help="take this layer instead of choosing one")


def add_method(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--method", default="sspu", help="see `saeunlearn methods` (default sspu; overwrite withstands relearning best)"
    )
    p.add_argument("--form", choices=["hard", "soft"], help="SSPU: exact projection (default) or penalty")
    p.add_argument("--update", choices=["plain", "restricted"], help="restricted: gradients that spare the other loss")
    p.add_argument("--max-retain-rise", type=float, help="rise of the loss on held-out retain text that is allowed")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of the method")
