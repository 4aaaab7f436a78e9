"""Check a run directory against what it claims: hashes, numbers that follow from others, and scores measured anew.

Three sorts of tampering are caught: of a file (its sha256 is not the one in report.json), of a number together with
the report (it does not follow from the values it is made of), and of those values too (the model does not give them;
a seeded sample is measured). Who can rewrite everything is caught by the sha256 of report.json that was given away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import sha256_file
from .corpus import Corpus
from .documents import read_json
from .erasure import Erasure
from .errors import ConfigError, RunError, SaeunlearnError
from .evaluation.again import (
    BROKEN,
    FAIL,
    OPEN,
    PASS,
    Check,
    check,
    differences,
    evaluation_checks,
    outcome,
    score_again,
)
from .evaluation.removal import DERIVED, as_object, gather, own_files
from .evaluation.report import markdown, model_card
from .models import LanguageModel
from .pipeline import text_sets
from .progress import Progress


def verify(
    root: str | Path,
    paths: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    *,
    sample: int = 64,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Check]:
    """Every check of a run directory, as {"what", "status": "pass" | "fail" | "not checkable", "detail"}.

    `paths` ("model", "forget", "retain", "questions") and `texts` (evaluation texts by name) say where inputs lie now.
    `sample` questions and as many texts are scored again, before and after the Erasure. Raises RunError for what is
    no run directory, and the typed errors of an input in `paths` or `texts` that cannot be opened.
    """
    root, progress = Path(root), progress or Progress()
    if not (root / "run.json").is_file():
        raise RunError(f"{root} is not a run directory: it has no run.json")
    if sample < 0:
        raise ConfigError(f"sample = {sample}: 0 scores nothing anew, a negative number means nothing")
    run, evaluation = read_json(root / "run.json"), read_json(root / "evaluation.json")
    config = as_object(run.get("config"))
    checks = report_checks(root, progress)
    checks += _run_checks(root, run, config)
    erasure, found = _erasure(root, run)
    checks += found
    inputs, found = _inputs(run, config, paths or {}, texts or {}, device)
    checks += found
    corpora = {n: c for n, c in inputs.items() if isinstance(c, Corpus)}
    named = {n.partition(": ")[2]: c for n, c in corpora.items() if n.startswith("evaluation text: ")}
    seed_of_run = s if isinstance(s := config.get("seed"), int) else 0
    sets = text_sets(corpora.get("forget"), corpora.get("retain"), named, seed_of_run)
    labels = bool(config.get("include_text"))
    checks += evaluation_checks(evaluation, corpora.get("questions"), sets, seed_of_run, labels)
    model = inputs.get("model")
    if isinstance(model, LanguageModel) and erasure is not None and sample:
        checks += score_again(model, erasure, evaluation, corpora.get("questions"), sets, sample, seed, progress)
    else:
        why = "none was asked for" if not sample else "the model or the Erasure is not at hand"
        checks.append(check("scores measured anew", OPEN, why))
    return checks


# --- the report, the run, the Erasure ----------------------------------------------------------------------


def report_checks(root: Path, progress: Progress) -> list[Check]:
    """The sha256 of every file, and report.json against the files it was made from."""
    doc = read_json(root / "report.json")
    files, pages = doc.pop("files", None), doc.pop("pages", None)
    if not isinstance(files, dict) or not isinstance(pages, dict):
        return [check("report.json", FAIL, "not there or damaged: `saeunlearn report` writes it")]
    wrong = changed_files(root, files, pages, progress)
    out = [outcome("files: sha256", wrong, f"{len(files) + len(pages)} files")]
    try:
        made = gather(root, include_text=doc.get("include_text") is True)
        made.pop("files")
        stale = differences(doc, json.loads(json.dumps(made)))
        texts = {"report.md": markdown, "model_card.md": model_card}
        made["files"] = files
        other = [f"{n} does not say what report.json says" for n, render in texts.items()
                 if (root / n).read_text(encoding="utf-8") != render(made)]  # fmt: skip
    except BROKEN as e:
        return [*out, check("report.json: numbers", FAIL, f"cannot be derived from the files ({type(e).__name__})")]
    made_by = (
        ""
        if doc.get("saeunlearn") == made["saeunlearn"]
        else f" (written by version {doc.get('saeunlearn')}: use that one)"
    )
    out.append(outcome("report.json: numbers", [f"{p} differs{made_by}" for p in stale], "as in the files of the run"))
    return [*out, outcome("report.md, model_card.md", other, "as report.json says")]


def changed_files(root: Path, files: Mapping[str, Any], pages: Mapping[str, Any], progress: Progress) -> list[str]:
    """What is not as report.json has it: `files` are the run's, `pages` the other forms of the report."""
    there = progress.over([*files.items(), *pages.items()], "hashing files")
    wrong = [f"{n} is {'changed' if (root / n).is_file() else 'gone'}" for n, sha in there
             if not (root / n).is_file() or sha256_file(root / n) != sha]  # fmt: skip
    wrong += [f"{n} is not in the report" for n in own_files(root) if n not in files]
    return wrong + [f"{n} has no sha256" for n in DERIVED if n != "report.json" and n not in pages]


def _run_checks(root: Path, run: Mapping[str, Any], config: Mapping[str, Any]) -> list[Check]:
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    out = [outcome("run.json: settings", [] if run.get("key") == key else ["their hash is not `key`"], "hash `key`")]
    selection = read_json(root / "selection.json")
    if selection:
        claimed = [("model", selection.get("model_fingerprint")), ("forget", selection.get("forget_fingerprint")),
                   ("retain", selection.get("retain_fingerprint"))]  # fmt: skip
        out.append(outcome("selection.json: inputs", _foreign(run, claimed), "those of run.json"))
    return out


def _erasure(root: Path, run: Mapping[str, Any]) -> tuple[Erasure | None, list[Check]]:
    try:
        erasure = Erasure.load(root / "erasure")
        m = erasure.manifest
        claimed = [("model", m["parent_fingerprint"]), ("forget", m["forget_fingerprint"]),
                   ("retain", m["retain_fingerprint"])]  # fmt: skip
    except BROKEN as e:
        return None, [check("erasure: payloads and id", FAIL, " ".join(str(e).split()))]
    out = [check("erasure: payloads and id", PASS, f"{len(erasure.parts)} parts, id {erasure.id[:12]}"),
           outcome("erasure: inputs", _foreign(run, claimed), "those of run.json")]  # fmt: skip
    if (root / "attacks.json").exists():
        same = read_json(root / "attacks.json").get("erasure_id") == erasure.id
        out.append(outcome("attacks.json: Erasure", [] if same else ["another Erasure, or damaged"], "this one"))
    return erasure, out


def _foreign(run: Mapping[str, Any], claimed: list[tuple[str, Any]]) -> list[str]:
    return [f"{name}: another fingerprint than in run.json" for name, said in claimed if said != _said(run, name)]


def _said(run: Mapping[str, Any], name: str) -> Any:
    """The fingerprint that run.json gives."""
    try:
        return (run["model"] if name == "model" else run["data"][name])["fingerprint"]
    except (KeyError, TypeError):
        return None


# --- inputs ------------------------------------------------------------------------------------------------


def _inputs(
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    paths: Mapping[str, str],
    texts: Mapping[str, str],
    device: str,
) -> tuple[dict[str, LanguageModel | Corpus], list[Check]]:
    """Model and corpora that are at hand and are the ones of the run, and a check of each."""
    run_texts = as_object(config.get("eval_texts"))
    if unknown := sorted(set(texts) - set(run_texts)):
        raise ConfigError(f"the run has no evaluation texts {unknown}; it has {sorted(run_texts)}")
    wanted = {n: (config.get(n), paths.get(n)) for n in ("model", "forget", "retain", "questions")}
    wanted |= {f"evaluation text: {n}": (path, texts.get(n)) for n, path in run_texts.items()}
    inputs: dict[str, LanguageModel | Corpus] = {}
    checks = []
    for name, (recorded, given) in wanted.items():
        what, path = f"{name}: fingerprint", given or (str(recorded) if recorded else None)
        if not path:
            if name != "questions":
                checks.append(check(what, FAIL, "run.json does not say where it lies"))
            elif _said(run, name):
                checks.append(check(what, OPEN, "run.json does not say where it lies"))
            continue
        try:
            if name == "model":
                dtype = config.get("dtype", "auto")
                opened: LanguageModel | Corpus = LanguageModel.open(path, device=device, dtype=str(dtype))
            else:
                opened = Corpus.load(path)
        except SaeunlearnError as e:
            if given:
                raise
            checks.append(check(what, OPEN, f"not at hand: {' '.join(str(e).split())[:120]}"))
            continue
        same = opened.fingerprint() == _said(run, name)
        checks.append(outcome(what, [] if same else [f"{path} is not what the run was made with"], "as in run.json"))
        if same:
            inputs[name] = opened
    return inputs, checks
