"""What a reward may return, and the check that it did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from agentrl.types import AgentRLError, Trajectory

_NAME = re.compile(r"[\w.-]{1,64}")


class RewardError(AgentRLError):
    """A reward cannot be called as agentrl calls it, or did not return what a reward returns."""


@dataclass(frozen=True, slots=True)
class Earned:
    """What an episode and each of its turns earned, for estimators that compare turns, such as `mt_grpo`.

    Attributes:
        value: of the episode: a number, or named numbers that add up to it.
        turns: one number for each turn of the episode, which do not count towards `value`.
    """

    value: float | Mapping[str, float]
    turns: Sequence[float]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a reward returned, checked: the value of the episode, its named parts if it has any, and the turns' values."""

    value: float
    named: Mapping[str, float]
    turns: tuple[float, ...] | None


def read(returned: Any, trajectory: Trajectory) -> Parts:
    """Return what a reward returned for an episode, in Python's own numbers.

    Raises:
        RewardError: unless it is a finite number, a mapping of texts to such numbers, or an `Earned` of them that has a number
            for each turn.
    """
    turns = None
    if isinstance(returned, Earned):
        if not isinstance(returned.turns, Sequence):
            raise RewardError(f"it returned {returned!r}; `turns` must be a list with a number for each turn")
        returned, turns = returned.value, tuple(_number(value) for value in returned.turns)
        if len(turns) != len(trajectory.turns):
            raise RewardError(f"it returned {len(turns)} values for an episode of {len(trajectory.turns)} turns")
    if not isinstance(returned, Mapping):
        return Parts(_number(returned), {}, turns)
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in returned):
        raise RewardError(f"it returned {returned!r}; the names of its parts must be letters, digits, and any of _ . -")
    named = {name: _number(value) for name, value in returned.items()}
    return Parts(sum(named.values()), named, turns)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # Python's whole numbers have no bound, and floats have one.
        return False


def _number(value: Any) -> float:
    # NumPy's and torch's scalars are numbers that have `item`.
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, Real) or not _is_finite(plain):
        raise RewardError(
            f"it returned {value!r}; return a finite number, a mapping of names to them, or Earned(value, turns)"
        )
    return float(plain)
