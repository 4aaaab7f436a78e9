"""One run, step by step, in a directory that says everything about it. The CLI and the explorer call this.

Run directory: run.json (config, status), events.jsonl, saes/ (saes-unfinished.safetensors while they train),
selection.json, unhealed/ (the edit before healing, if there is any), erasure/, evaluation.json, examples.json (only
with text), figures/, report.{html,md,json}, model_card.md. Every step leaves its result whole or not at all, so a
killed run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .checkpoints import write_json
from .corpus import Corpus, Record, refuse_overlap
from .errors import Cancelled, ConfigError, RunError, SAEMismatchError, SaeunlearnError, SelectionError
from .evaluation.evaluate import combine, evaluate, is_forget, without_labels
from .features.selection import ProbeResult, SelectConfig, Selection, check_select, check_selection, select
from .healing import HealConfig, heal
from .methods import Method, get_method
from .models import LanguageModel
from .options import settings_of
from .progress import Progress

if TYPE_CHECKING:
    from sae_training import SAEConfig

SCHEMA = 1
EVAL_RECORDS = 400  # of each text set, for the losses before and after
FULL = " (the disk is full; free some space and run the same command again)"
SAMPLE_WORDS = 8  # of a record's beginning that serve as a prompt


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on."""

    model: str | Path
    forget: str | Path
    retain: str | Path
    questions: str | Path | None = None  # multiple-choice questions to evaluate with
    eval_texts: Mapping[str, str | Path] = field(default_factory=dict)  # further texts to evaluate on, by name
    saes: str | None = None  # ready SAEs; None trains them if the method needs any
    selection: str | None = None  # a selection.json made on this model and data; None selects if the method needs it
    layers: str = "all"  # layers that get an SAE
    sae: Mapping[str, Any] = field(default_factory=dict)  # SAEConfig settings
    select: Mapping[str, Any] = field(default_factory=dict)  # SelectConfig settings
    method: str = "sspu"
    settings: Mapping[str, Any] = field(default_factory=dict)  # the method's settings
    heal: Mapping[str, Any] | None = None  # HealConfig settings; None: the edit is left as it is
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    include_text: bool = False  # keep samples and feature contexts in the run directory

    def __post_init__(self) -> None:
        for name in ("model", "forget", "retain", "questions", "saes", "selection"):  # paths are as welcome as strings
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(value))
        object.__setattr__(self, "eval_texts", {n: str(path) for n, path in self.eval_texts.items()})

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass
class Run:
    """A run directory and what has been opened for it."""

    root: Path
    config: RunConfig
    progress: Progress
    model: LanguageModel
    forget: Corpus
    retain: Corpus
    questions: Corpus | None
    texts: dict[str, Corpus]

    @property
    def selection_file(self) -> Path:
        return self.root / "selection.json"

    @property
    def erasure_dir(self) -> Path:
        return self.root / "erasure"

    @property
    def evaluation_file(self) -> Path:
        return self.root / "evaluation.json"


def unlearn(config: RunConfig, root: str | Path, progress: Progress | None = None, command: list[str] | None = None
            ) -> Run:  # fmt: skip
    """Carry the whole run out: SAEs, selection, method, evaluation, report. Finished steps are not repeated.

    Raises RunError when `root` belongs to a run with other settings or the disk is full, and the typed errors of
    every step; all inputs are checked before the first long step.
    """
    root, progress = Path(root), progress or Progress()
    method = get_method(config.method)
    settings = settings_of(method.Config, config.settings, config.method)
    select_config = settings_of(SelectConfig, config.select, "selection")
    earlier = claim(root, config)
    run = open_run(config, root, progress)
    check(run, earlier, method, settings, select_config)
    ready = ready_saes(run.model, config.saes, config.layers) if config.saes else None
    with recorded(run, earlier, command):
        saes = ready or (trained_saes(run) if "saes" in method.needs else {})
        selection = get_selection(run, saes, select_config, settings) if "selection" in method.needs else None
        if selection is not None and config.include_text:
            write_examples(run, selection, saes)
        erasure = get_erasure(run, method, settings, selection, saes)
        if not run.evaluation_file.exists():
            before = measure(run, "before")
            with erasure.apply(run.model):
                after = measure(run, "after")
            write_json(run.evaluation_file, combine(before, after, config.seed))
    write_report(run)
    return run


def claim(root: Path, config: RunConfig) -> dict[str, Any]:
    """run.json of an earlier start of the same run, or {}. Raises RunError when `root` holds anything else."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (root / "run.json").exists():
            earlier = json.loads((root / "run.json").read_text())
            if earlier.get("key") != config.key():
                raise RunError(f"{root} holds a run with other settings: choose another --out")
            return earlier
        if any(root.iterdir()):
            raise RunError(f"{root} is not empty and not a run directory: choose another --out")
    except (OSError, ValueError, AttributeError) as e:
        raise RunError(f"cannot use {root} as a run directory: {e}") from e
    return {}


def open_run(config: RunConfig, root: Path, progress: Progress) -> Run:
    """Open and check model and data."""
    forget, retain = Corpus.load(config.forget), Corpus.load(config.retain)
    refuse_overlap(forget, retain)
    questions = Corpus.load(config.questions) if config.questions else None
    texts = {name: Corpus.load(path) for name, path in config.eval_texts.items()}
    model = LanguageModel.open(config.model, device=config.device, dtype=config.dtype)
    return Run(root, config, progress, model, forget, retain, questions, texts)


def check(run: Run, earlier: Mapping[str, Any], method: Method, settings: Any, select_config: SelectConfig) -> None:
    """Refuse now what would otherwise fail only after the SAEs were trained. Raises the typed errors of the steps."""
    from sae_training import SAEConfig, parse_layers

    if earlier and any(earlier.get(name) != value for name, value in inputs(run).items()):
        raise RunError(f"the data or the model changed since the run in {run.root} began: choose another --out")
    if taken := sorted({"forget", *retain_groups(run.retain)} & run.texts.keys()):
        raise ConfigError(f"the names {taken} of evaluation texts are taken: choose others")
    method.check(run.model, settings)
    if run.config.heal is not None:
        settings_of(HealConfig, run.config.heal, "healing").check()
        if method.kind != "weights":
            raise ConfigError(f"{method.name} changes no weights, so there is nothing to heal")
    if run.config.selection:
        given = Selection.load(run.config.selection)
        made_on = {"model": given.model_fingerprint, "forget set": given.forget_fingerprint,
                   "retain set": given.retain_fingerprint}  # fmt: skip
        here = (run.model.fingerprint(), run.forget.fingerprint(), run.retain.fingerprint())
        if other := [what for (what, was), now in zip(made_on.items(), here) if was != now]:
            raise SelectionError(f"{run.config.selection} was made with another {' and '.join(other)}: select anew")
    run.retain.split(0.2, run.config.seed)  # refuses a retain set that nothing can be held out of
    settings_of(SAEConfig, run.config.sae, "SAE").check(run.model.d_model)
    layers = parse_layers(run.model, run.config.layers)
    if select_config.layer is not None and select_config.layer not in layers:
        raise ConfigError(f"layer {select_config.layer} is not among the layers {run.config.layers}")
    check_select(select_config, run.model.d_model)


def inputs(run: Run) -> dict[str, Any]:
    """What run.json says about model and data."""
    data = {"forget": run.forget, "retain": run.retain, **({"questions": run.questions} if run.questions else {})}
    data |= {f"evaluation text: {n}": c for n, c in run.texts.items()}
    return {
        "model": {"name": run.model.name, "fingerprint": run.model.fingerprint(), "d_model": run.model.d_model},
        "data": {n: {"n": len(c), "fingerprint": c.fingerprint()} for n, c in data.items()},
    }


@contextlib.contextmanager
def recorded(run: Run, earlier: Mapping[str, Any], command: list[str] | None = None) -> Iterator[None]:
    """Keep run.json's status true whatever happens, and append events to events.jsonl."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    info: dict[str, Any] = {
        "schema": SCHEMA, "key": run.config.key(), "config": asdict(run.config), "command": command,
        "saeunlearn": __version__, "status": "running", "started": earlier.get("started", now), **inputs(run),
    }  # fmt: skip
    started = time.monotonic()
    try:
        write_json(run.root / "run.json", info)
        with (run.root / "events.jsonl").open("a", encoding="utf-8") as events:
            listener = run.progress.on_event

            def write(event: dict[str, Any]) -> None:
                events.write(json.dumps(event) + "\n")
                events.flush()
                if listener:
                    listener(event)

            run.progress.on_event = write
            try:
                yield
            finally:
                run.progress.on_event = listener
        info["status"] = "done"
    except (Cancelled, KeyboardInterrupt):
        info["status"] = "cancelled"
        raise
    except OSError as e:
        info |= {"status": "failed", "error": str(e)}
        raise RunError(f"{run.root}: {e}{FULL if e.errno == errno.ENOSPC else ''}") from e
    except SaeunlearnError as e:
        info |= {"status": "failed", "error": str(e)}
        if "os error 28" in str(e) or getattr(e.__cause__, "errno", None) == errno.ENOSPC:  # safetensors says it so
            raise RunError(f"{e}{FULL}") from e
        raise
    finally:
        if info["status"] == "running":
            info["status"] = "failed"
        info["seconds"] = round(earlier.get("seconds", 0.0) + time.monotonic() - started, 1)
        with contextlib.suppress(OSError):  # on a full disk the first error is the one to show
            write_json(run.root / "run.json", info)


# --- steps -------------------------------------------------------------------------------------------------


def ready_saes(model: LanguageModel, source: str, layers: str) -> dict[int, Any]:
    """The user's SAEs for these layers (`all`, or 1,3,5-8). Raises SAEMismatchError where there are none."""
    from sae_training import load_saes, parse_layers

    wanted = parse_layers(model, layers)
    saes = load_saes(source, model)
    if not saes.keys() & set(wanted):
        raise SAEMismatchError(f"{source} holds SAEs for layers {sorted(saes)}, not {layers}")
    return {i: s for i, s in saes.items() if i in wanted}


def trained_saes(run: Run) -> dict[int, Any]:
    """Those of an earlier start, or newly trained ones on forget and retain text together."""
    from sae_training import load_saes

    own, config = run.root / "saes", run.config
    train_into(own, run.model, run.forget, run.retain, config.layers, config.sae, config.seed, run.progress)
    return load_saes(own, run.model)


def train_into(folder: Path, model: LanguageModel, forget: Corpus, retain: Corpus, layers: str,
               given: Mapping[str, Any], seed: int, progress: Progress) -> None:  # fmt: skip
    """Train SAEs on forget and retain text together, unless `folder` holds them; an earlier start is gone on with."""
    from sae_training import SAEConfig, parse_layers, save_saes, train_saes

    if not (folder / "saes.json").exists():
        settings: SAEConfig = settings_of(SAEConfig, given, "SAE")
        both = Corpus(forget.records + retain.records, "forget and retain")
        unfinished = folder.with_name(f"{folder.name}-unfinished.safetensors")
        wanted = parse_layers(model, layers)
        saes = train_saes(model, both, wanted, settings, seed=seed, progress=progress, checkpoint=unfinished)
        save_saes(saes, folder)
        unfinished.unlink()


def get_selection(run: Run, saes: Mapping[int, Any], select_config: SelectConfig, settings: Any) -> Selection:
    """The stored selection or a new one, its probe runs made with the method's own settings."""
    if run.selection_file.exists():
        return Selection.load(run.selection_file)
    if run.config.selection:
        selection = Selection.load(run.config.selection)
        check_selection(selection, run.model, saes)
        selection.save(run.selection_file)
        return selection
    selection = choose(run.model, saes, run.forget, run.retain, select_config, settings, run.config.seed, run.progress)
    selection.save(run.selection_file)
    return selection


def choose(model: LanguageModel, saes: Mapping[int, Any], forget: Corpus, retain: Corpus, select_config: SelectConfig,
           settings: Any, seed: int, progress: Progress) -> Selection:  # fmt: skip
    """`features.selection.select` with SSPU's probe injected; methods with other settings get its default ones."""
    from .methods.sspu import SSPUConfig, probe_layer

    probing = settings if isinstance(settings, SSPUConfig) else SSPUConfig()

    def probe(candidate: Selection) -> ProbeResult:
        return probe_layer(model, forget, retain, probing, candidate, saes, seed, progress)

    return select(model, saes, forget, retain, select_config, probe=probe, seed=seed, progress=progress)


def get_erasure(run: Run, method: Method, settings: Any, selection: Selection | None, saes: Mapping[int, Any]) -> Any:
    """The stored Erasure or a new one, healed where that is asked for."""
    from .erasure import Erasure

    if (run.erasure_dir / "erasure.json").exists():
        return Erasure.load(run.erasure_dir)
    first = run.erasure_dir if run.config.heal is None else run.root / "unhealed"
    if (first / "erasure.json").exists():
        erasure = Erasure.load(first)
    else:
        erasure = method.unlearn(
            run.model, run.forget, run.retain, config=settings, selection=selection, saes=saes, seed=run.config.seed,
            progress=run.progress,
        )  # fmt: skip
        erasure.save(first)
    if run.config.heal is not None:
        settings = settings_of(HealConfig, run.config.heal, "healing")
        erasure = heal(run.model, erasure, run.forget, run.retain, settings, run.config.seed, run.progress)
        erasure.save(run.erasure_dir)
    return erasure


def write_examples(run: Run, selection: Selection, saes: Mapping[int, Any]) -> None:
    """examples.json: where the relevant features are most active in the forget text. Only where text is kept."""
    from .features.examples import top_examples

    if not (file := run.root / "examples.json").exists():
        sae, part = saes[selection.layer], run.forget.sample(EVAL_RECORDS, run.config.seed)
        found = top_examples(run.model, sae, selection.layer, selection.relevant, part, run.progress)
        write_json(file, found)


def measure(run: Run, when: str) -> dict[str, Any]:
    """Evaluate the model as it is now, on the questions, on samples of the texts, and on prompts if text is kept."""
    run.progress.note(f"evaluating {when}")
    result = evaluate(
        run.model,
        questions=run.questions,
        texts=evaluation_texts(run),
        prompts=prompts(run) if run.config.include_text else (),
        progress=run.progress,
    )
    return result if run.config.include_text else without_labels(result)


def evaluation_texts(run: Run) -> dict[str, Corpus]:
    """Forget text, retain text (near and far apart where the records say so), and what the user named."""
    return text_sets(run.forget, run.retain, run.texts, run.config.seed)


def text_sets(
    forget: Corpus | None, retain: Corpus | None, texts: Mapping[str, Corpus], seed: int
) -> dict[str, Corpus]:
    """The texts of an evaluation by name; without those of a set that is not at hand."""
    out = {"forget": forget.sample(EVAL_RECORDS, seed)} if forget else {}
    for name, records in retain_groups(retain).items() if retain else ():
        out[name] = Corpus(tuple(records), name).sample(EVAL_RECORDS, seed)
    return out | {n: Corpus(c.records, n) for n, c in texts.items()}


def retain_groups(retain: Corpus) -> dict[str, list[Record]]:
    """The retain records by their field `set`; "retain" without one, or where it says "forget"."""
    groups: dict[str, list[Record]] = {}
    for r in retain:
        name = str(r.meta.get("set", "retain"))
        groups.setdefault("retain" if is_forget(name) else name, []).append(r)
    return groups


def prompts(run: Run, n: int = 4) -> list[str]:
    """Beginnings of a few forget and retain records: questions as they are, texts cut after some words."""
    out = []
    for corpus in evaluation_texts(run).values():
        for r in corpus.sample(n, run.config.seed):
            words = (r.question or r.text).split()
            out.append(" ".join(words if r.question else words[: max(1, min(SAMPLE_WORDS, len(words) - 1))]))
    return out


def write_report(run: Run) -> Path:
    """The removal report (page, Markdown, JSON, model card) and figures/ from the JSON in the run directory."""
    from .evaluation.report import write_report as render

    return render(run.root, include_text=run.config.include_text, progress=run.progress)
