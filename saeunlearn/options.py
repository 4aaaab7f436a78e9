"""What options of the command line mean as values. All raise ConfigError, naming the option."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError


def further_settings(items: Sequence[str]) -> dict[str, Any]:
    """{NAME: value} of NAME=VALUE texts, values as JSON where they are."""
    out: dict[str, Any] = {}
    for item in items:
        name, eq, value = item.partition("=")
        if not eq:
            raise ConfigError(f"--set {item}: write NAME=VALUE")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


def named_files(items: Sequence[str], option: str) -> dict[str, str]:
    """{NAME: FILE} of NAME=FILE texts."""
    out = {}
    for item in items:
        name, eq, file = item.partition("=")
        if not eq or not name or not file:
            raise ConfigError(f"{option} {item}: write NAME=FILE")
        out[name] = file
    return out


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of a text such as 4,8."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise ConfigError(f"{option} {text}: write whole numbers, separated by commas") from e


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {n: v for n in names if (v := getattr(args, n)) is not None}


def method_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The method's settings as given. Raises ConfigError for what is not NAME=VALUE."""
    out = further_settings(args.set)
    named = {n: getattr(args, n) for n in ("form", "update", "max_retain_rise")}
    return out | {n: v for n, v in named.items() if v is not None}


def selection_settings(args: argparse.Namespace) -> dict[str, Any]:
    return given(args, "k", "layer")
