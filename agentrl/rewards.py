"""What an episode earns: a reward function by the name that `reward.kind` gives, less what `reward.length` takes off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agentrl import scores
from agentrl.config import LengthConfig, RewardConfig
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


def length_penalty(trajectory: Trajectory, settings: LengthConfig) -> float:
    """Return what the episode's length takes off its reward, from 0 to 1.

    The length is that of the model's own tokens: how long passages are is the retriever's doing, and a limit on them all
    would punish searching. Of L tokens it is (L - (limit - cache)) / cache within these bounds.

    Source: the soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4).
    """
    over = trajectory.model_tokens - (settings.limit - settings.cache)
    return min(1.0, max(0.0, over / settings.cache))


def make_reward(settings: RewardConfig) -> Callable[[Trajectory], float]:
    """Return the reward function that the settings describe."""
    kind, length = REWARDS[settings.kind], settings.length
    if length is None:
        return kind
    return lambda trajectory: kind(trajectory) - length_penalty(trajectory, length)
