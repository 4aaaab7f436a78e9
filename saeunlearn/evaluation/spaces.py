"""The search spaces of `saeunlearn compare`: what is tuned of each method, and how settings are proposed.

Two to four fields a method: the ones that its paper or field tunes (step size, strength, steps, weight of the retain
loss), and always the limit of the retention budget: a fixed limit would decide for the method how far it may go.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..methods import Method, get_method

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STARTUP = 10  # trials that are drawn without regard to others; TPE learns from them


@dataclass(frozen=True)
class Field:
    """The range of one setting, ends included. `also`: settings that go with it, as multiples of it."""

    low: float
    high: float
    log: bool = True
    whole: bool = False
    also: Mapping[str, float] = field(default_factory=dict)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


LIMIT = Field(0.005, 0.08)
RATE = Field(0.01, 0.3)
STEPS = Field(100, 400, whole=True)
WEIGHT = Field(0.3, 10.0)
STRENGTH = Field(1.0, 100.0)
ERASURE = {
    "lam": Field(0.003, 3.0),
    "token_lam": Field(0.003, 0.3),
    "eps": Field(0.0003, 0.3),
    "max_retain_rise": LIMIT,
}

SPACES: dict[str, dict[str, Field]] = {
    # A gated run has a second limit, twice the first by default.
    "sspu": {"lr": Field(0.02, 0.3), "gamma": Field(1.0, 32.0), "alpha": Field(3.0, 600.0),
             "max_retain_rise": Field(0.005, 0.08, also={"max_other_rise": 2.0})},
    "rmu": {"lr": RATE, "beta": Field(1.0, 20.0), "retain_weight": Field(3.0, 300.0), "max_retain_rise": LIMIT},
    "ga": {"lr": Field(0.001, 0.1), "steps": STEPS, "max_retain_rise": LIMIT},
    "graddiff": {"lr": RATE, "steps": STEPS, "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "kl": {"lr": RATE, "steps": STEPS, "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "npo": {"lr": RATE, "beta": Field(0.02, 1.0), "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "npo-lora": {"lr": RATE, "beta": Field(0.1, 2.0), "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "simnpo": {"lr": RATE, "beta": Field(0.5, 10.0), "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "idkdpo": {"lr": RATE, "beta": Field(0.005, 0.5), "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "crisp": {"lr": RATE, "steps": STEPS, "retain_weight": Field(0.3, 30.0), "max_retain_rise": LIMIT},
    "reglu": {"lr": RATE, "mix": Field(0.1, 0.9, log=False), "retain_weight": WEIGHT, "max_retain_rise": LIMIT},
    "unierase": {"clamp": Field(0.25, 3.0), "cut": Field(0.05, 1.0), "lam": Field(0.001, 1.0),
                 "max_retain_rise": LIMIT},
    "key-erasure": ERASURE,
    "key-erasure-sae": ERASURE,
    "overwrite": {"lr": Field(0.005, 0.08), "retain_weight": WEIGHT, "token_lam": Field(0.003, 0.3),
                  "max_retain_rise": LIMIT},
    "clamp": {"strength": STRENGTH, "max_retain_rise": LIMIT},
    "conditional": {"strength": STRENGTH, "percentile": Field(90.0, 99.9, log=False), "max_retain_rise": LIMIT},
    "dsg": {"strength": STRENGTH, "percentile": Field(80.0, 99.5, log=False), "max_retain_rise": LIMIT},
}  # fmt: skip


def space_of(method: Method) -> Mapping[str, Field]:
    """The fields that are tuned: those of the table, or of the attribute `space` that a method of your own brings.

    Raises ConfigError for a method without one, or with one that its Config does not have.
    """
    space = SPACES.get(method.name) or getattr(method, "space", None)
    if not space:
        raise ConfigError(
            f"{method.name} has no search space and cannot be compared at an equal budget: give its class an attribute "
            "`space`, {setting: saeunlearn.evaluation.spaces.Field(low, high)}"
        )
    known = {f.name for f in fields(method.Config)}
    for name, found in space.items():
        if missing := sorted({name, *found.also} - known):
            raise ConfigError(f"the search space of {method.name} names {missing}, which its settings do not have")
        if not (found.low < found.high and (found.low > 0 or not found.log)):
            raise ConfigError(f"the range of {name} in the search space of {method.name} is not one: {found}")
    return space


def start_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the tuned fields with which a method starts: `given`, or its defaults.

    Raises ConfigError where one lies outside its range: trial 0 must be a point of the space.
    """
    method = get_method(name)
    defaults = {f.name: f.default for f in fields(method.Config) if f.default is not MISSING} | dict(given)
    out = {}
    for field_name, found in space_of(method).items():
        value = defaults.get(field_name)
        if not isinstance(value, int | float) or not found.low <= value <= found.high:
            raise ConfigError(
                f"{name} starts with {field_name} = {value}, outside its range from {found.low} to {found.high}"
            )
        out[field_name] = value
    return out


def settings_with(name: str, given: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings for a point of its space: `given`, then the point, then what goes with it."""
    space = space_of(get_method(name))
    also = {other: times * params[n] for n, f in space.items() if n in params for other, times in f.also.items()}
    return {**given, **params, **also}


def propose(name: str, start: Mapping[str, Any], earlier: Sequence[FrozenTrial], seed: int, number: int
            ) -> dict[str, Any]:  # fmt: skip
    """The point of trial `number`: the start, then STARTUP − 1 seeded draws, then TPE on all earlier trials.

    It depends on nothing else: not on how many processes there are, nor on which was killed.
    """
    import optuna

    if number == 0:
        return dict(start)
    sampler = optuna.samplers.TPESampler(
        seed=zlib.crc32(f"{seed}/{name}/{number}".encode()), n_startup_trials=STARTUP, multivariate=False
    )
    with quiet():
        study = optuna.create_study(direction="maximize", sampler=sampler)
        if number >= STARTUP:
            study.add_trials(earlier)
        return study.ask(distributions(name)).params


def distributions(name: str) -> dict[str, BaseDistribution]:
    return {n: f.distribution() for n, f in space_of(get_method(name)).items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing below a warning within the context."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
