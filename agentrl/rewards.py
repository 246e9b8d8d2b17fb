"""Reward functions over a trajectory, by the name that `reward.kind` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agentrl import scores
from agentrl.types import Trajectory


def exact_match(trajectory: Trajectory) -> float:
    """Return 1.0 where the episode's answer is an accepted one, and 0.0 where it is another or missing.

    Source: Search-R1's outcome reward (arXiv 2503.09516, section 3.4).

    Raises:
        ValueError: if the question has no accepted answer.
    """
    if trajectory.answer is None:
        return 0.0
    return scores.exact_match(trajectory.answer, trajectory.question.golden_answers)


REWARDS: Mapping[str, Callable[[Trajectory], float]] = {"exact_match": exact_match}
