"""Advantages of rollouts from their rewards, groups and strata: NumPy in, NumPy out, without torch, Ray or Java.

    result = compute([1.0, 0.0, 1.0, 0.0], groups=["q1"] * 4, strata=[0, 0, 1, 1], alpha=0.8)

An estimator is a function `estimator(batch: Batch, *, option=default, ...) -> float64 [n]`, found by its name in
`ESTIMATORS` or by an import path `package.module:function`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agentrl.advantages.base import AdvantageError, Batch, Bools, Floats, Ints
from agentrl.advantages.diagnostics import summarise
from agentrl.advantages.registry import ESTIMATORS, Estimator, check_options, get_estimator
from agentrl.advantages.strata import STRATIFIERS, Stratifier, get_stratifier, label

__all__ = [
    "ESTIMATORS",
    "STRATIFIERS",
    "AdvantageError",
    "Advantages",
    "Batch",
    "Estimator",
    "Stratifier",
    "compute",
    "get_estimator",
    "get_stratifier",
    "label",
]

Keys = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """Advantages of N rollouts in the order they were given.

    Attributes:
        values: float64 [N], 0 for excluded rollouts.
        valid: bool [N], false for excluded rollouts.
        report: see `agentrl.advantages.diagnostics.summarise`, and `excluded`, the number of excluded rollouts.
    """

    values: Floats
    valid: Bools
    report: dict[str, float]


def compute(
    rewards: ArrayLike, groups: Keys, strata: Keys, estimator: str = "stratified", **options: Any
) -> Advantages:
    """Return the advantages of N rollouts.

    Args:
        rewards: [N] numbers; NaN or None marks a rollout whose environment failed; no mean includes it.
        groups: [N] hashable ids; equal ids answer one prompt. One id for all rollouts compares over the batch.
        strata: [N] hashable keys, tuples too; compared within a group only.
        estimator: a name in `ESTIMATORS` or an import path `package.module:function`.
        options: the estimator's settings; its docstring explains them.

    Raises:
        AdvantageError: if the lengths differ, a reward is infinite or no number, a key is not hashable, the estimator
            or an option is unknown, an option is out of range, or the estimator returns something other than one
            finite number for each rollout that counts.
    """
    function = get_estimator(estimator)
    check_options(estimator, function, options)
    all_rewards = _as_rewards(rewards)
    if not len(all_rewards) == len(groups) == len(strata):
        raise AdvantageError(
            "rewards, groups and strata must have one entry for each rollout, "
            f"got {len(all_rewards)}, {len(groups)} and {len(strata)}"
        )
    valid = ~np.isnan(all_rewards)
    batch = _as_batch(all_rewards, groups, strata, valid)
    found = np.asarray(function(batch, **options), dtype=np.float64)
    if found.shape != batch.rewards.shape or not np.isfinite(found).all():
        raise AdvantageError(
            f"estimator {estimator!r} must return {len(batch.rewards)} finite numbers, one for each rollout, "
            f"got shape {found.shape} with {int((~np.isfinite(found)).sum())} not finite"
        )
    values = np.zeros(len(all_rewards))
    values[valid] = found
    return Advantages(values, valid, {**summarise(batch, found), "excluded": float((~valid).sum())})


def _as_rewards(rewards: ArrayLike) -> Floats:
    try:
        array = np.asarray(rewards, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise AdvantageError(f"rewards must be numbers, or NaN for excluded rollouts: {error}") from error
    if array.ndim != 1:
        raise AdvantageError(f"rewards must be one-dimensional, got shape {array.shape}")
    infinite = np.flatnonzero(np.isinf(array))
    if len(infinite):
        raise AdvantageError(f"rewards[{infinite[0]}] is {array[infinite[0]]}; only NaN excludes a rollout")
    return array


def _as_batch(rewards: Floats, groups: Keys, strata: Keys, valid: Bools) -> Batch:
    _, group_index = _number(groups, valid, "groups")
    names, name_index = _number(strata, valid, "strata")
    pairs, stratum_index = np.unique(group_index * len(names) + name_index, return_inverse=True)
    # fromiter keeps tuples whole; np.array would make a second dimension of them.
    keys = np.fromiter(names, dtype=object, count=len(names))
    width = max(len(names), 1)
    return Batch(rewards[valid], group_index, stratum_index, pairs // width, keys[pairs % width])


def _number(keys: Keys, valid: Bools, what: str) -> tuple[list[Any], Ints]:
    """Return the distinct keys of the valid entries, and for each valid entry its key's position [n]."""
    if isinstance(keys, np.ndarray):
        if keys.ndim == 1 and keys.dtype.kind in "iu":
            distinct, index = np.unique(keys[valid], return_inverse=True)
            return distinct.tolist(), index
        keys = keys.tolist()
    # A dictionary, because keys need not be orderable among one another.
    numbers: defaultdict[Any, int] = defaultdict(itertools.count().__next__)
    try:
        index = np.fromiter(map(numbers.__getitem__, itertools.compress(keys, valid)), dtype=np.intp)
    except TypeError as error:
        raise AdvantageError(f"{what} must be hashable, such as numbers, strings or tuples of them: {error}") from error
    return list(numbers), index
