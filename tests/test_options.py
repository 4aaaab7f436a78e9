"""Settings that are given by name: what is taken, what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from sae_training import SAEConfig
from saeunlearn.errors import ConfigError
from saeunlearn.features.selection import SelectConfig
from saeunlearn.methods.sspu import SSPUConfig
from saeunlearn.options import settings_of


@dataclass(frozen=True)
class Settings:
    n: int = 3
    rate: float = 0.5
    on: bool = True
    name: str = "x"
    form: Literal["hard", "soft"] = "hard"
    k: int | None = None


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"n": 4}, 4), ({"n": 4.0}, 4), ({"rate": 1}, 1), ({"rate": 0.25}, 0.25), ({"on": False}, False),
        ({"name": "y"}, "y"), ({"form": "soft"}, "soft"), ({"k": None}, None), ({"k": 7}, 7), ({"k": 7.0}, 7),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_the_right_type_are_taken(given: dict[str, Any], value: Any) -> None:
    (name,) = given
    got = getattr(settings_of(Settings, given, "test"), name)
    assert got == value
    assert isinstance(got, int) or name not in ("n", "k") or got is None


@pytest.mark.parametrize(
    "given",
    [
        {"n": 4.5}, {"n": "4"}, {"n": True}, {"n": None}, {"n": math.inf}, {"n": math.nan}, {"n": [1]}, {"rate": "1"},
        {"rate": True}, {"rate": math.nan}, {"rate": math.inf}, {"rate": None}, {"on": 1}, {"on": "true"},
        {"name": 3}, {"name": None}, {"form": "firm"}, {"form": 1}, {"k": "7"}, {"k": 7.5}, {"k": False},
        {"other": 1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_wrong_type_are_refused_by_name(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=rf"test setting.*{name}"):
        settings_of(Settings, given, "test")


@pytest.mark.parametrize("cls", [SAEConfig, SelectConfig, SSPUConfig])
def test_defaults_are_of_the_type_that_is_asked_for(cls: type) -> None:
    defaults = vars(cls())
    assert settings_of(cls, defaults, "test") == cls()
    assert settings_of(cls, {}, "test") == cls()
