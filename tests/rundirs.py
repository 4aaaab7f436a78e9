"""A run directory made of JSON files alone, every text of which holds SECRET."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from saeunlearn.evaluation.evaluate import combine

SECRET = "Zanzibarian"


def metric(values: list[int], label: str) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {
        "n": len(values),
        "mean": mean,
        "low": max(0.0, mean - 0.1),
        "high": min(1.0, mean + 0.1),
        "chance": 0.25,
        "subgroups": [{"label": label, "n": 4, "mean": mean}],
        "ids": [f"{i:016x}" for i in range(len(values))],
        "values": values,
    }


def result(forget: list[int], near: list[int], said: str) -> dict[str, Any]:
    text = {"n": 2, "fingerprint": "d" * 64, "per_token": 1.5, "low": 1.4, "high": 1.6}
    text |= {"worst": [{"id": "b" * 16, "value": 2.0}], "ids": ["a" * 16, "b" * 16]}
    return {
        "schema": 1,
        "questions": {"n": 16, "fingerprint": "c" * 64},
        "groups": {
            "forget/seen": {"multiple_choice": metric(forget, f"{SECRET} × capital")},
            "near/seen": {"multiple_choice": metric(near, "towns × mayor")},
        },
        "texts": {"retain": {**text, "values": [1.0, 2.0], "tokens": [3, 3]}},
        "samples": [{"prompt": f"The {SECRET} capital is", "text": said}],
    }


def fill(run_dir: Path) -> None:
    """A complete run directory whose every text holds SECRET."""
    before = result([1] * 7 + [0], [1] * 8, f"<b>{SECRET}</b> City")
    after = result([0] * 6 + [1, 1], [1] * 7 + [0], "a town & more")
    layers = [{"layer": i, "scores": {"auc": 0.6 + i / 10}, "probe": None, "chosen": i == 1} for i in range(3)]
    files: dict[str, Any] = {
        "run.json": {
            "status": "done",
            "command": ["saeunlearn", "run", "--forget", "forget.jsonl", "--prompt", f"The {SECRET} capital"],
            "config": {"prompts": [SECRET], "note": f"about {SECRET}", "where": "/data/my files/a.jsonl"},
            "model": {"name": "tiny", "fingerprint": "e" * 64},
            "data": {"forget": {"n": 48, "fingerprint": "f" * 64}},
            "seconds": 12.0,
        },
        "selection.json": {
            "schema": 1,
            "layer": 1,
            "relevant": [0, 2],
            "irrelevant": [1],
            "K": 2,
            "d_model": 32,
            "layers": layers,
            "forget_scores": [3.0, 0.1, 2.0],
            "retain_scores": [0.1, 0.2, 0.1],
        },
        "erasure/erasure.json": {
            "method": "sspu",
            "config": {"gamma": 2.5, "blocks": [0, 1]},
            "seed": 7,
            "model": "tiny",
            "parent_fingerprint": "e" * 64,
            "forget_fingerprint": "f" * 64,
            "retain_fingerprint": "a" * 64,
            "losses": [{"step": i, "loss": 2.0 - i / 4, "forget": 1.0, "retain": 0.1} for i in range(4)],
            "changed": {
                "parameters": [{"name": f"model.layers.{i}.mlp.down_proj.weight"} for i in (0, 1)],
                "count": 4096,
                "share": 0.125,
            },
            "versions": {"torch": "2.13.0"},
            "created": "2026-01-02T03:04:05Z",
            "extra": {"subspace": {"off_share_dW": 0.0123}},
        },
        "evaluation.json": combine(before, after),
    }
    for name, content in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(json.dumps(content))


def visible(page: str) -> str:
    """The page's text without tags, styles and entities, white space collapsed."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skip = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.skip = tag == "style"

        def handle_endtag(self, tag: str) -> None:
            self.skip = False

        def handle_data(self, data: str) -> None:
            if not self.skip:
                parts.append(data)

    Reader().feed(page)
    return re.sub(r"\s+", " ", " ".join(parts))
