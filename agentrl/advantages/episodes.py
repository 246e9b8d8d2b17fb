"""Strata and advantages of episodes: what `compute` needs to know of an episode, read off its `Trajectory`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, Literal

import numpy as np

from agentrl.advantages import AdvantageError, Advantages, compute
from agentrl.advantages.arrays import Keys
from agentrl.advantages.estimators import ESTIMATORS
from agentrl.advantages.strata import GroupStratifier, cap_strata
from agentrl.scores import normalize_answer
from agentrl.types import Trajectory

# Looking for answers in every observation takes longer than all else that is done with an episode.
_WITHOUT_TURN_REWARDS = ESTIMATORS.keys() - {"mt_grpo"}


def group_strata(
    groups: Sequence[Sequence[Trajectory]],
    stratifier: GroupStratifier,
    max_strata: int | None,
    scope: Literal["prompt", "batch"],
) -> list[Hashable]:
    """Return the stratum of each episode, group after group.

    Where `max_strata` is given, strata are capped by `cap_strata` among the episodes that are compared: those of a group,
    or with scope "batch" all of them. The cap looks only at episodes whose environment did not fail; a failed episode keeps
    the stratum it has.

    Raises:
        AdvantageError: if `max_strata` is below 2, or the stratifier fails.
    """
    strata = [stratifier(group) for group in groups]
    if scope == "batch":
        strata, groups = [list(chain.from_iterable(strata))], [list(chain.from_iterable(groups))]
    if max_strata is not None:
        strata = [_capped(keys, group, max_strata) for keys, group in zip(strata, groups, strict=True)]
    return list(chain.from_iterable(strata))


def _capped(keys: Sequence[Hashable], episodes: Sequence[Trajectory], max_strata: int) -> list[Hashable]:
    counted = [trajectory.valid for trajectory in episodes]
    capped = iter(cap_strata(list(compress(keys, counted)), max_strata))
    return [next(capped) if counts else key for key, counts in zip(keys, counted, strict=True)]


def episode_advantages(
    trajectories: Sequence[Trajectory],
    groups: Keys,
    strata: Keys,
    *,
    estimator: str,
    scope: Literal["prompt", "batch"],
    options: Mapping[str, Any],
    group_size: int | None = None,
    past: Sequence[Mapping[str, float]] = (),
) -> Advantages:
    """Return the advantages of N episodes from `groups` [N] and `strata` [N]; `compute` explains the other arguments.

    An episode that has no reward, or whose environment failed, is excluded.

    Raises:
        AdvantageError: as `agentrl.advantages.compute`.
    """
    return compute(
        [np.nan if t.reward is None else t.reward for t in trajectories],
        groups=groups,
        strata=strata,
        estimator=estimator,
        valid=[t.valid for t in trajectories],
        group_size=group_size,
        lengths=[length(t) for t in trajectories],
        turn_rewards=None if estimator in _WITHOUT_TURN_REWARDS else turn_rewards(trajectories),
        anchors=[anchors(t) for t in trajectories],
        scope=scope,
        past=past,
        **options,
    )


def length(trajectory: Trajectory) -> int:
    """The number of tokens that the model sampled, or 1 if there is none: a length is a weight, which cannot be 0."""
    return max(1, trajectory.model_tokens)


def anchors(trajectory: Trajectory) -> list[str]:
    """What the model had been shown last before each turn: the observation of the turn before, nothing before the first.

    Turns of one question that follow the same observation are GiGPO's steps from one anchor state (arXiv 2505.10978).
    """
    return ["", *(turn.observation for turn in trajectory.turns[:-1])]


def turn_rewards(trajectories: Sequence[Trajectory]) -> list[Sequence[float]]:
    """What each turn of each episode earned: what a reward gave it, or where none gives turns a value, `presence`.

    Raises:
        AdvantageError: if some of the valid episodes have turn rewards and others have not, since the two cannot be compared.
    """
    without = [t.id for t in trajectories if t.valid and t.turn_rewards is None]
    if all(t.turn_rewards is None for t in trajectories):
        return [presence(t) for t in trajectories]
    if without:
        raise AdvantageError(
            f"a reward gave each turn of some episodes a value and none to those of episode {without[0]}; return Earned for "
            "every episode, or for none"
        )
    return [t.turn_rewards or () for t in trajectories]


def presence(trajectory: Trajectory) -> list[float]:
    """1 for each turn whose observation holds an accepted answer, else 0 (MT-GRPO's presence reward, arXiv 2505.11821)."""
    accepted = [words for answer in trajectory.question.golden_answers if (words := normalize_answer(answer))]
    shown = [f" {normalize_answer(turn.observation)} " for turn in trajectory.turns]
    return [float(any(f" {answer} " in text for answer in accepted)) for text in shown]
