"""The search spaces against the methods' own settings, and what is proposed from them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import comparisons
import pytest
from optuna.trial import TrialState, create_trial

from saeunlearn.errors import ConfigError
from saeunlearn.evaluation.spaces import (
    SPACES,
    STARTUP,
    Field,
    distributions,
    propose,
    settings_with,
    space_of,
    start_of,
)
from saeunlearn.methods import METHODS, get_method
from saeunlearn.models import LanguageModel
from saeunlearn.sandbox.build import DEMO_SETTINGS

COMPARED = sorted(set(METHODS) - {"delta", "wreck", "other"})


def test_every_method_that_needs_no_second_model_has_a_space() -> None:
    assert sorted(SPACES) == COMPARED


@pytest.mark.parametrize("name", COMPARED)
def test_a_space_fits_the_settings_of_its_method(name: str, llama: LanguageModel) -> None:
    method, space = get_method(name), SPACES[name]
    assert 2 <= len(space) <= 4
    assert any("rise" in n for n in space)  # a budget that were fixed would decide for the method
    limits = {f.name for f in fields(method.Config) if f.name.startswith("max_") and f.name.endswith("_rise")}
    assert limits <= {*space, *(other for f in space.values() for other in f.also)}
    kinds = {f.name: type(f.default) for f in fields(method.Config)}
    for point in ({n: f.low for n, f in space.items()}, {n: f.high for n, f in space.items()}, start_of(name, {})):
        typed = {n: int(v) if space[n].whole else v for n, v in point.items()}
        method.check(llama, method.Config(**settings_with(name, {}, typed)))
        assert all(type(v) is kinds[n] for n, v in typed.items())
    for n, d in distributions(name).items():
        assert (d.low, d.high, d.log) == (space[n].low, space[n].high, space[n].log)


def test_trial_0_is_the_defaults() -> None:
    for name in COMPARED:
        start = start_of(name, {})
        assert get_method(name).Config(**settings_with(name, {}, start)) == get_method(name).Config()
    start = start_of("sspu", DEMO_SETTINGS)
    assert start.items() <= DEMO_SETTINGS.items()
    assert settings_with("sspu", DEMO_SETTINGS, start) == {**DEMO_SETTINGS, "max_other_rise": 0.04}  # not gated: unused


def finished(name: str, number: int, value: float) -> Any:
    params = propose(name, start_of(name, {}), [], 0, number)
    trial = create_trial(state=TrialState.COMPLETE, value=value, params=params, distributions=distributions(name))
    trial.number = number
    return trial


def test_proposals_depend_on_seed_and_number_alone_at_first() -> None:
    start = start_of("npo", {})
    drawn = [propose("npo", start, [], 0, n) for n in range(STARTUP)]
    assert drawn[0] == start
    assert drawn[3] == propose("npo", start, [finished("npo", n, n) for n in range(3)], 0, 3)
    assert len({p["lr"] for p in drawn}) == STARTUP
    assert propose("npo", start, [], 1, 3) != drawn[3]
    for p in drawn:
        assert all(SPACES["npo"][n].low <= v <= SPACES["npo"][n].high for n, v in p.items())


def test_later_proposals_learn_from_the_earlier() -> None:
    start = start_of("npo", {})
    tried = [finished("npo", n, 0.0) for n in range(STARTUP)]

    def rated(sign: int) -> list[Any]:
        return [
            create_trial(
                state=TrialState.COMPLETE, value=sign * t.params["lr"], params=t.params, distributions=t.distributions
            )
            for t in tried
        ]  # fmt: skip

    up, down = ([propose("npo", start, rated(s), seed, STARTUP)["lr"] for seed in range(10)] for s in (1, -1))
    assert sum(up) > 2 * sum(down)
    assert up[0] == propose("npo", start, rated(1), 0, STARTUP)["lr"]


@pytest.mark.parametrize(("space", "said"), [
    ({"nonesuch": Field(1, 2)}, "nonesuch"), ({"strength": Field(1, 2, also={"other": 2})}, "other"),
    ({"strength": Field(2, 1)}, "range"), ({"strength": Field(0, 1)}, "range"), ({}, "no search space"),
])  # fmt: skip
def test_a_space_of_your_own_is_checked(space: dict[str, Field], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = comparisons.Wreck()
    monkeypatch.setattr(comparisons.Wreck, "space", space)
    with pytest.raises(ConfigError, match=said):
        space_of(method)


def test_what_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"npo starts with lr = 5.0, outside its range from 0.01 to 0.3"):
        start_of("npo", {"lr": 5.0})
    with pytest.raises(ConfigError, match="delta has no search space"):
        start_of("delta", {})
    monkeypatch.setitem(METHODS, "wreck", "comparisons:Wreck")
    assert start_of("wreck", {}) == {"strength": 0.3, "where": 1}
