"""What options of the command line, and settings of a run, mean as values. All raise ConfigError, naming the option."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

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


def settings_of(cls: type, given: Mapping[str, Any], what: str) -> Any:
    """An instance of the settings dataclass `cls`. Raises ConfigError naming unknown settings and wrong types."""
    known = get_type_hints(cls)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown {what} settings {unknown}; known: {', '.join(known)}")
    values = {}
    for name, value in given.items():
        options = get_args(known[name]) if isinstance(known[name], UnionType) else (known[name],)
        if int in options and isinstance(value, float) and value.is_integer():
            value = int(value)  # 50.0 is how some JSON writers say 50
        if not any(_is_a(option, value) for option in options):
            wanted = " or ".join(_in_words(option) for option in options)
            raise ConfigError(f"{what} setting {name} must be {wanted}, got {value!r}")
        values[name] = value
    return cls(**values)


def _is_a(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, "empty")
