"""What every estimator shares: the batch it receives, moments by part, and standardising by part.

Shapes: n rollouts that count, G groups, S strata, where a stratum belongs to one group; C parts of either sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agentrl.types import AgentRLError

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

TOLERANCE = 64 * float(np.finfo(np.float64).eps)
"""A part with std <= TOLERANCE * max|reward in the part| is degenerate.

The bound follows the rewards' own magnitude, so that 1e-12 and 1e12 are treated alike, and 64 units in the last place
cover what summing a few reward terms in another order can change. Differences that are rounding noise around zero, left
where larger terms cancelled, are relatively large and not caught; eps keeps those small.
"""


class AdvantageError(AgentRLError):
    """Rewards, groups, strata or options from which advantages cannot be computed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts that count, with groups and strata numbered.

    Attributes:
        rewards: [n], finite.
        groups: [n], the group of each rollout, 0 to G-1.
        strata: [n], the stratum of each rollout, 0 to S-1; equal keys in different groups have different numbers.
        stratum_groups: [S], the group that each stratum belongs to.
        stratum_keys: [S] objects, the key of each stratum as it was given.
    """

    rewards: Floats
    groups: Ints
    strata: Ints
    stratum_groups: Ints
    stratum_keys: NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class Moments:
    """Counts, deviations and standard deviations by part.

    Attributes:
        count: [C].
        centred: [n], each value less the mean of its part.
        std: [C].
        degenerate: [C], true where the part has fewer than two values or its std is within TOLERANCE.
    """

    count: Ints
    centred: Floats
    std: Floats
    degenerate: Bools


def moments(values: Floats, parts: Ints, ddof: int = 0) -> Moments:
    """Moments of values [n] by parts [n], which are numbered 0 to C-1 without gaps.

    std = sqrt(sum centred^2 / (count - ddof)).
    """
    count = np.bincount(parts)
    low = np.full(len(count), np.inf)
    np.minimum.at(low, parts, values)
    magnitude = np.zeros(len(count))
    np.maximum.at(magnitude, parts, np.abs(values))
    # Measured from the smallest value, equal values are exactly 0 and a large common offset costs no digits.
    shifted = values - low[parts]
    centred = shifted - (np.bincount(parts, shifted) / count)[parts]
    # ddof 1 of a single value would divide by zero; such a part is degenerate whatever its std.
    std = np.sqrt(np.bincount(parts, centred**2) / np.maximum(count - ddof, 1))
    return Moments(count, centred, std, (count < 2) | (std <= TOLERANCE * magnitude))


def standardise(values: Floats, parts: Ints, eps: float, ddof: int) -> tuple[Floats, Bools]:
    """Return (value - mean) / (std + eps) by part [n], exactly 0 in degenerate parts, and which those are [C].

    Raises:
        AdvantageError: if eps is negative or not finite, or ddof is neither 0 nor 1.
    """
    if not (eps >= 0 and math.isfinite(eps)):
        raise AdvantageError(f"eps must be a finite number of at least 0, got {eps!r}")
    if ddof not in (0, 1):
        raise AdvantageError(f"ddof must be 0 (divide by n) or 1 (divide by n - 1), got {ddof!r}")
    part = moments(values, parts, ddof)
    scores = np.zeros_like(values)
    np.divide(part.centred, (part.std + eps)[parts], out=scores, where=~part.degenerate[parts])
    return scores, part.degenerate
