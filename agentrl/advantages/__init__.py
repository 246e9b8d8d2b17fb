"""Advantages of rollouts from their rewards, groups and strata, without torch, Ray or Java.

    result = compute([1.0, 0.0, 1.0, 0.0], groups=["q1"] * 4, strata=[0, 0, 1, 1], alpha=0.8)

An estimator is a function `estimator(batch: Batch, *, option=default, ...) -> float64 [n]`, or [n, T] with a value for
each turn, found by its name in `ESTIMATORS` or by an import path `package.module:function`. One that learns from batch to
batch returns an `Estimate`, whose notes the caller hands on:

    result = compute(rewards, groups, strata, "value_baseline", past=past)
    past.append(result.notes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Real
from typing import Any, Literal

import numpy as np

from agentrl.advantages.arrays import Keys, as_lengths, as_rewards, as_turns, like, number_keys, renumber
from agentrl.advantages.base import AdvantageError, Batch, Estimate, Floats, Turns
from agentrl.advantages.diagnostics import Report, StratumReport, by_stratum, report_table, summarise
from agentrl.advantages.estimators import ESTIMATORS, Estimator, check_options, get_estimator
from agentrl.advantages.strata import STRATIFIERS, GroupStratifier, Stratifier, get_stratifier, label
from retrievers.names import describe_exception

__all__ = [
    "ESTIMATORS",
    "STRATIFIERS",
    "AdvantageError",
    "Advantages",
    "Batch",
    "Estimate",
    "Estimator",
    "GroupStratifier",
    "Report",
    "Stratifier",
    "StratumReport",
    "Turns",
    "by_stratum",
    "compute",
    "get_estimator",
    "get_stratifier",
    "label",
    "report_table",
]


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages of N rollouts in the order they were given, in the kind that the rewards had.

    Lists give lists, a torch tensor gives tensors on its device and in its dtype, anything else gives NumPy arrays.

    Attributes:
        values: floats [N], or [N, T] from an estimator with a value for each turn; 0 for excluded rollouts and beyond a
            rollout's last turn.
        valid: booleans [N], false for excluded rollouts.
        notes: what the estimator wants to know of this batch when it sees later ones; mostly nothing.
    """

    values: Any
    valid: Any
    notes: Mapping[str, float]
    _summarise: Callable[[], Report] = field(repr=False)

    @cached_property
    def report(self) -> Report:
        """What structure the rollouts have and what it does to the learning signal; made when it is first asked for."""
        return self._summarise()


def compute(
    rewards: Any,
    groups: Keys,
    strata: Keys,
    estimator: str = "stratified",
    *,
    valid: Any = None,
    group_size: int | None = None,
    lengths: Any = None,
    turn_rewards: Sequence[Sequence[float]] | None = None,
    anchors: Sequence[Keys] | None = None,
    scope: Literal["prompt", "batch"] = "prompt",
    past: Sequence[Mapping[str, float]] = (),
    **options: Any,
) -> Advantages:
    """Return the advantages of N rollouts.

    Args:
        rewards: [N] numbers in a list, a NumPy array or a torch tensor; computed with in float64. NaN or None marks a
            rollout whose environment failed: it takes part in no mean, its advantage is 0, and it is counted.
        groups: [N] hashable ids; rollouts with equal ids answer one prompt.
        strata: [N] hashable keys, tuples too; rollouts are compared with those that have an equal key in the same group.
        estimator: a name in `ESTIMATORS` or an import path `package.module:function`.
        valid: [N] booleans; false excludes a rollout as a reward of NaN does.
        group_size: the number of rollouts that every group must have. It makes an error of an id that two data sets share
            and of a group that was taken apart.
        lengths: [N] numbers of tokens; `opo` needs them.
        turn_rewards: [N] sequences with a number for each turn; `mt_grpo` needs them.
        anchors: [N] sequences with a hashable key for each turn, what was observed before it; `gigpo` needs them.
        scope: "prompt" compares rollouts of one group; "batch" takes all rollouts for one group, so that strata reach
            over prompts.
        past: the notes of earlier batches of a run, the oldest first; `value_baseline` learns from them.
        options: the estimator's settings; its docstring explains them.

    Raises:
        AdvantageError: if lengths differ, a group has another size than `group_size`, a reward is infinite or no number, a
            key is not hashable or is missing (None, NaN, pandas' NA), the estimator or an option is unknown, an option is
            out of range, or the estimator needs what was not given. It is raised, too, where the estimator raises
            anything, or returns something other than finite numbers, one for each rollout that counts or one for each of
            its turns, or notes that are not finite numbers by name.
    """
    function = get_estimator(estimator)
    check_options(estimator, function, options)
    if scope not in ("prompt", "batch"):
        raise AdvantageError(f"scope must be prompt or batch, got {scope!r}")
    all_rewards, counts, tolerance = as_rewards(rewards, valid)
    if not len(all_rewards) == len(groups) == len(strata):
        raise AdvantageError(
            "rewards, groups and strata must have one entry for each rollout, "
            f"got {len(all_rewards)}, {len(groups)} and {len(strata)}"
        )
    if group_size is not None:
        _check_sizes(groups, group_size)
    _, group_index = number_keys(groups, counts, "groups")
    if scope == "batch":
        group_index = np.zeros_like(group_index)
    keys, key_index = number_keys(strata, counts, "strata")
    pairs, stratum_index = renumber(group_index * len(keys) + key_index)
    width = max(len(keys), 1)
    batch = Batch(
        all_rewards[counts],
        group_index,
        stratum_index,
        pairs // width,
        pairs % width,
        tuple(keys),
        as_lengths(lengths, counts),
        as_turns(turn_rewards, anchors, group_index, counts),
        tolerance,
        past,
    )
    found = _estimate(batch, estimator, function, options)
    values = np.zeros((len(all_rewards), *found.advantages.shape[1:]))
    values[counts] = found.advantages
    kind = like(rewards)
    report = partial(summarise, batch, found.advantages, excluded=int((~counts).sum()))
    return Advantages(kind(values), kind(counts), found.notes, report)


def _estimate(batch: Batch, estimator: str, function: Estimator, options: Mapping[str, Any]) -> Estimate:
    try:
        returned = function(batch, **options)
        estimate = returned if isinstance(returned, Estimate) else Estimate(returned, {})
        found = np.asarray(estimate.advantages, dtype=np.float64)
    except AdvantageError:
        raise
    except Exception as error:  # The estimator may be the user's own.
        raise AdvantageError(f"estimator {estimator!r} fails: {describe_exception(error)}") from error
    _check(found, batch, estimator)
    _check_notes(estimate.notes, estimator)
    return Estimate(found, estimate.notes)


def _check_sizes(groups: Keys, size: int) -> None:
    ids, index = number_keys(groups, np.ones(len(groups), dtype=np.bool_), "groups")
    count = np.bincount(index)
    odd = np.flatnonzero(count != size)
    if len(odd):
        raise AdvantageError(
            f"group {ids[odd[0]]!r} has {count[odd[0]]} rollouts instead of {size}; do two data sets share this id?"
        )


def _check(found: Floats, batch: Batch, estimator: str) -> None:
    count = len(batch.rewards)
    if found.ndim not in (1, 2) or len(found) != count or not np.isfinite(found).all():
        raise AdvantageError(
            f"estimator {estimator!r} must return {count} finite numbers, or {count} rows of them with one for each turn, "
            f"got shape {found.shape} with {int((~np.isfinite(found)).sum())} not finite"
        )


def _check_notes(notes: Mapping[str, float], estimator: str) -> None:
    for name, value in notes.items():
        if not (isinstance(name, str) and isinstance(value, Real) and np.isfinite(value)):
            raise AdvantageError(f"estimator {estimator!r} must note finite numbers by name, got {name!r}: {value!r}")
