"""Options of an estimator that change while a run goes on: by its progress, or by how the strata improve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from agentrl.advantages.base import AdvantageError
from retrievers.names import did_you_mean

SHAPES = ("step", "linear", "cosine")


@dataclass(frozen=True, slots=True)
class StratumRewards:
    """The rewards of one stratum in one step: how many, their mean and their variance (ddof 0)."""

    count: float
    mean: float
    variance: float


class Rule(Protocol):
    """Gives an option its value, which lies between `start` and `end`."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    def value(self, progress: float) -> float:
        """Return the value at `progress`, the share of the run's steps that are done, from 0 to 1."""
        ...

    def observe(self, strata: Mapping[str, StratumRewards]) -> None:
        """Take note of a step's rewards by stratum."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """A value that goes from `start` to `end`, which it has from `at` on, as a share of the run.

        step:   start before `at`
        linear: start + (end - start) * progress / at
        cosine: start + (end - start) * (1 - cos(pi * progress / at)) / 2

    Raises:
        AdvantageError: if the shape is unknown, a value is not finite or `at` is not within 0 to 1.
    """

    start: float
    end: float
    shape: str = "step"
    at: float = 0.5

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise AdvantageError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        _check_number("start", self.start)
        _check_number("end", self.end)
        _check_number("at", self.at, 0, 1)

    def value(self, progress: float) -> float:
        if progress >= self.at:
            return self.end
        if self.shape == "step":
            return self.start
        way = progress / self.at
        return self.start + (self.end - self.start) * (
            way if self.shape == "linear" else (1 - math.cos(math.pi * way)) / 2
        )

    def observe(self, strata: Mapping[str, StratumRewards]) -> None:
        """A schedule does not depend on rewards."""


@dataclass(slots=True)
class ProgressRule:
    """A value that moves from `start` towards `end` as rewards inside the strata stop improving.

    Every `window` steps the mean reward of each stratum is compared with its mean in the window before. If one of at
    least `least` rollouts in both windows rose by more than `errors` standard errors of the difference, the value goes
    back towards `start` by `stride`; after `patience` windows without such a rise it goes towards `end` by `stride` in
    each. The variance of a mean takes rewards to vary by at least 0.01, so that a stratum of equal rewards is not
    infinitely sure.

    Raises:
        AdvantageError: if a setting is out of range.
    """

    start: float = 1.0
    end: float = 0.0
    window: int = 50
    stride: float = 0.25
    least: int = 30
    errors: float = 2.0
    patience: int = 3
    _value: float = field(init=False, repr=False)
    _steps: int = field(init=False, repr=False, default=0)
    _quiet: int = field(init=False, repr=False, default=0)
    _now: dict[str, list[float]] = field(init=False, repr=False, default_factory=dict)
    _before: dict[str, list[float]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_number("start", self.start)
        _check_number("end", self.end)
        _check_number("stride", self.stride, 0)
        _check_number("errors", self.errors, 0)
        for name in ("window", "least", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise AdvantageError(f"{name} must be a whole number of at least 1, got {value!r}")
        self._value = self.start

    def value(self, progress: float) -> float:
        return self._value

    def observe(self, strata: Mapping[str, StratumRewards]) -> None:
        for name, rewards in strata.items():
            total = self._now.setdefault(name, [0.0, 0.0, 0.0])
            total[0] += rewards.count
            total[1] += rewards.count * rewards.mean
            total[2] += rewards.count * (rewards.variance + rewards.mean**2)
        self._steps += 1
        if self._steps % self.window:
            return
        if self._before:
            rose = any(self._rose(self._before[name], now) for name, now in self._now.items() if name in self._before)
            self._quiet = 0 if rose else self._quiet + 1
            if rose:
                self._move(self.start)
            elif self._quiet >= self.patience:
                self._move(self.end)
        self._before, self._now = self._now, {}

    def _move(self, target: float) -> None:
        distance = target - self._value
        self._value += math.copysign(min(self.stride, abs(distance)), distance)

    def _rose(self, before: Sequence[float], now: Sequence[float]) -> bool:
        if min(before[0], now[0]) < self.least:
            return False
        means = [total / count for count, total, _ in (before, now)]
        errors = [max(square / count - (total / count) ** 2, 0.01) / count for count, total, square in (before, now)]
        return means[1] - means[0] > self.errors * math.sqrt(sum(errors))


RULES: dict[str, type[Any]] = {"schedule": Schedule, "progress": ProgressRule}


class Options:
    """An estimator's options during a run: those that are mappings become rules, the others stay as they are.

        Options({"alpha": {"start": 1, "end": 0, "shape": "step", "at": 0.5}, "eps": 1e-6})
        Options({"alpha": {"rule": "progress", "window": 20}})

    Raises:
        AdvantageError: if a mapping is no rule; the message names the option.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._constants = {name: value for name, value in options.items() if not isinstance(value, Mapping)}
        self._rules = {name: make_rule(name, value) for name, value in options.items() if isinstance(value, Mapping)}

    @property
    def moving(self) -> list[str]:
        """The names of the options that have a rule."""
        return list(self._rules)

    def at(self, progress: float) -> dict[str, Any]:
        """Return the options at `progress`, the share of the run's steps that are done, from 0 to 1."""
        return self._constants | {name: rule.value(progress) for name, rule in self._rules.items()}

    def ends(self) -> list[dict[str, Any]]:
        """Return the options with every rule at its start, and with every rule at its end."""
        starts = {name: rule.start for name, rule in self._rules.items()}
        ends = {name: rule.end for name, rule in self._rules.items()}
        return [self._constants | starts, self._constants | ends]

    def observe(self, strata: Mapping[str, StratumRewards]) -> None:
        """Hand a step's rewards by stratum to the rules."""
        for rule in self._rules.values():
            rule.observe(strata)


def make_rule(option: str, spec: Mapping[str, Any]) -> Rule:
    """Return the rule that `spec` describes: its settings, and `rule`, schedule (the default) or progress.

    Raises:
        AdvantageError: if the rule or a setting is unknown, missing or out of range; the message names `option`.
    """
    settings = dict(spec)
    name = settings.pop("rule", "schedule")
    if name not in RULES:
        raise AdvantageError(f"{option}: rule must be one of {', '.join(RULES)}, got {name!r}")
    kind = RULES[name]
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    for setting in settings:
        if setting not in known:
            hint = did_you_mean(setting, known)
            raise AdvantageError(f"{option}: rule {name} has no setting {setting!r} (it has: {', '.join(known)}){hint}")
    try:
        return kind(**settings)
    except TypeError as error:
        raise AdvantageError(f"{option}: rule {name} needs a start and an end") from error
    except AdvantageError as error:
        raise AdvantageError(f"{option}: {error}") from error


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdvantageError(f"{name} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise AdvantageError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
