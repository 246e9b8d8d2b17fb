"""What every estimator shares: the batch it receives, moments by part, and standardising by part.

Shapes: n rollouts that count, G groups, S strata, where a stratum belongs to one group; C parts of either sort; M turns.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agentrl.types import AgentRLError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]


class AdvantageError(AgentRLError):
    """Rewards, groups, strata or options from which advantages cannot be computed."""


def tolerance_of(*, single: bool) -> float:
    """Return how far rewards may spread, relative to their size, and still count as equal: 64 units in the last place.

    64 units cover what a sum of a few terms changes when its terms are added in another order. The units are float64's,
    or float32's for `single` rewards. Rewards in half precision use float32's too: their own units are so coarse that a
    difference of one unit can be meant. The bound is relative, so rewards of 1e-12 and of 1e12 are treated alike. It
    does not catch the rounding noise that is left near 0 where large terms cancel; eps keeps that noise small.
    """
    return 64 * float(np.finfo(np.float32 if single else np.float64).eps)


@dataclass(frozen=True, slots=True)
class Turns:
    """The M turns of the rollouts that count, rollout after rollout and in order.

    Attributes:
        rollouts: [M], the rollout that each turn belongs to, 0 to n-1.
        index: [M], 0 for a rollout's first turn.
        last: [M], true at a rollout's last turn.
        rewards: [M], what each turn earned of its own; None where not given.
        anchors: [M], what was observed before each turn, numbered so that equal numbers mean the same observation in
            the same group; None where not given.
    """

    rollouts: Ints
    index: Ints
    last: Bools
    rewards: Floats | None
    anchors: Ints | None


@dataclass(frozen=True, slots=True)
class Moments:
    """Counts, deviations and standard deviations by part.

    Attributes:
        count: [C].
        centred: [n], each value less the mean of its part.
        std: [C].
        degenerate: [C], true where the part has fewer than two values, or its std is at most the tolerance times the size
            of its values.
    """

    count: Ints
    centred: Floats
    std: Floats
    degenerate: Bools


def moments(values: Floats, parts: Ints, tolerance: float) -> Moments:
    """Return the moments of values [n] by parts [n], which are numbered 0 to C-1 without gaps.

    std = sqrt(sum centred^2 / count); `tolerance` is the batch's, see `tolerance_of`.
    """
    count = np.bincount(parts)
    first = np.zeros(len(count))
    # Of several assignments to one place NumPy keeps the last.
    first[parts[::-1]] = values[::-1]
    # Measured from a value of its part, equal values are exactly 0 and a large common offset costs no digits.
    shifted = values - first[parts]
    centred = shifted - (np.bincount(parts, shifted) / count)[parts]
    std = np.sqrt(np.bincount(parts, centred**2) / count)
    # The first value of a part has the size of all of them where they are as near to one another as the tolerance.
    return Moments(count, centred, std, (count < 2) | (std <= tolerance * np.abs(first)))


@dataclass(frozen=True)
class Batch:
    """The rollouts that count, with groups and strata numbered.

    Attributes:
        rewards: [n], finite.
        groups: [n], the group of each rollout, 0 to G-1.
        strata: [n], the stratum of each rollout, 0 to S-1; equal keys in different groups have different numbers.
        stratum_groups: [S], the group that each stratum belongs to.
        stratum_keys: [S], the position of each stratum's key in `keys`.
        keys: the distinct stratum keys as they were given.
        lengths: [n], the rollouts' lengths in tokens; None where not given.
        turns: the rollouts' turns; None where neither turn rewards nor anchors were given.
        tolerance: relative; a part whose std is smaller has no variance.
        past: what the estimator noted of earlier batches of the run (`Estimate.notes`), the oldest first.
    """

    rewards: Floats
    groups: Ints
    strata: Ints
    stratum_groups: Ints
    stratum_keys: Ints
    keys: tuple[Hashable, ...]
    lengths: Floats | None = None
    turns: Turns | None = None
    tolerance: float = tolerance_of(single=False)
    past: Sequence[Mapping[str, float]] = ()

    @cached_property
    def by_group(self) -> Moments:
        """The moments of the rewards by group."""
        return moments(self.rewards, self.groups, self.tolerance)

    @cached_property
    def by_stratum(self) -> Moments:
        """The moments of the rewards by stratum."""
        return moments(self.rewards, self.strata, self.tolerance)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimator returns that learns from one batch of a run to the next.

    Attributes:
        advantages: [n], or [n, T] with a value for each turn.
        notes: finite numbers by name that describe the batch. Later batches have them in `Batch.past`, also after a resume,
            and each is a metric of the step, `estimator/NAME`.
    """

    advantages: Floats
    notes: Mapping[str, float]


T = TypeVar("T")


def required(value: T | None, estimator: str, argument: str) -> T:
    """Return `value`, an optional part of a batch.

    Raises:
        AdvantageError: if it is None; the message names the argument of `compute` that would have given it.
    """
    if value is None:
        raise AdvantageError(f"estimator {estimator!r} needs {argument}=… for each rollout")
    return value


def standardise(part: Moments, parts: Ints, eps: float, ddof: int) -> Floats:
    """Return (value - mean) / (std + eps) by part [n], exactly 0 in degenerate parts.

    std = sqrt(sum centred^2 / (count - ddof)).

    Raises:
        AdvantageError: if eps is negative or not finite, or ddof is neither 0 nor 1.
    """
    if not (eps >= 0 and math.isfinite(eps)):
        raise AdvantageError(f"eps must be a finite number of at least 0, got {eps!r}")
    if ddof not in (0, 1):
        raise AdvantageError(f"ddof must be 0 (divide by n) or 1 (divide by n - 1), got {ddof!r}")
    # ddof 1 of a single value would divide by zero; such a part is degenerate whatever its std.
    std = part.std * np.sqrt(part.count / np.maximum(part.count - ddof, 1)) if ddof else part.std
    # Dividing by infinity makes the 0 of a degenerate part.
    return part.centred / np.where(part.degenerate, np.inf, std + eps)[parts]


def centre(part: Moments, parts: Ints) -> Floats:
    """Return value - mean by part [n], exactly 0 in degenerate parts."""
    return np.where(part.degenerate[parts], 0.0, part.centred)
