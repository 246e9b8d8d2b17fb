"""Strata and advantages of episodes: what `compute` needs to know of an episode, read off its `Trajectory`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import compress
from typing import Any, Literal

import numpy as np

from agentrl.advantages import Advantages, compute
from agentrl.advantages.arrays import Keys
from agentrl.advantages.base import AdvantageError
from agentrl.advantages.estimators import ESTIMATORS
from agentrl.advantages.strata import Stratifier, cap_strata
from agentrl.scores import normalize_answer
from agentrl.types import Trajectory
from retrievers.names import describe_exception

# Looking for answers in every observation takes longer than all else that is done with an episode.
_WITHOUT_TURN_REWARDS = ESTIMATORS.keys() - {"mt_grpo"}


def episode_strata(
    trajectories: Sequence[Trajectory], stratifier: Stratifier, max_strata: int | None
) -> list[Hashable]:
    """Return the stratum [N] of each episode, capped by `cap_strata` where `max_strata` is given.

    The cap looks only at episodes whose environment did not fail; a failed episode keeps the stratum it has.

    Raises:
        AdvantageError: if `max_strata` is below 2, or the stratifier raises anything.
    """
    strata = [_stratum(trajectory, stratifier) for trajectory in trajectories]
    if max_strata is None:
        return strata
    counted = [trajectory.valid for trajectory in trajectories]
    capped = iter(cap_strata(list(compress(strata, counted)), max_strata))
    return [next(capped) if counts else key for key, counts in zip(strata, counted, strict=True)]


def _stratum(trajectory: Trajectory, stratifier: Stratifier) -> Hashable:
    try:
        return stratifier(trajectory)
    except Exception as error:  # The stratifier may be the user's own.
        raise AdvantageError(
            f"the stratifier fails for episode {trajectory.id} of question {trajectory.question.id}: "
            f"{describe_exception(error)}"
        ) from error


def group_strata(
    groups: Sequence[Sequence[Trajectory]],
    stratifier: Stratifier,
    max_strata: int | None,
    scope: Literal["prompt", "batch"],
) -> list[Hashable]:
    """Return the stratum of each episode, group after group, capped among the episodes that it is compared with.

    Raises:
        AdvantageError: as `episode_strata`.
    """
    everyone = [trajectory for group in groups for trajectory in group]
    compared = groups if scope == "prompt" else [everyone]
    return [stratum for episodes in compared for stratum in episode_strata(episodes, stratifier, max_strata)]


def episode_advantages(
    trajectories: Sequence[Trajectory],
    groups: Keys,
    strata: Keys,
    *,
    estimator: str,
    scope: Literal["prompt", "batch"],
    options: Mapping[str, Any],
    group_size: int | None = None,
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
        turn_rewards=None if estimator in _WITHOUT_TURN_REWARDS else [turn_rewards(t) for t in trajectories],
        anchors=[anchors(t) for t in trajectories],
        scope=scope,
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


def turn_rewards(trajectory: Trajectory) -> list[float]:
    """1 for each turn whose observation holds an accepted answer, else 0 (MT-GRPO's presence reward, arXiv 2505.11821)."""
    accepted = [words for answer in trajectory.question.golden_answers if (words := normalize_answer(answer))]
    shown = [f" {normalize_answer(turn.observation)} " for turn in trajectory.turns]
    return [float(any(f" {answer} " in text for answer in accepted)) for text in shown]
