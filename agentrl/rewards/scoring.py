"""From an episode to what it earned: the rewards of a config, called one after another and summed."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentrl.config import RewardConfig
from agentrl.rewards.base import Parts, RewardError, read
from agentrl.rewards.judge import Judge
from agentrl.rewards.kinds import REWARDS
from agentrl.rewards.own import OwnReward
from agentrl.types import EnvironmentFailure, Trajectory


@dataclass(frozen=True, slots=True)
class _Reward:
    name: str
    weight: float
    call: Callable[[Trajectory], Any]
    place: str


class Rewards:
    """The rewards of a config, at work where the episodes run. Use it on one event loop only."""

    def __init__(self, settings: Sequence[RewardConfig], timeout_seconds: float) -> None:
        """Import and make the rewards; those of an episode have `timeout_seconds` together.

        Raises:
            RewardError: if one cannot be made.
            ConfigError: if the environment lacks a key that a judge needs.
        """
        self._timeout_seconds = timeout_seconds
        self._rewards = [_make(one) for one in settings]

    async def score(self, trajectory: Trajectory) -> Trajectory:
        """Return a valid episode with its reward, what each reward came to, and what its turns earned.

        Raises:
            EnvironmentFailure: if something that a reward asks, such as a judge, failed.
            RewardError: if a reward raised anything else, returned something else, or took too long.
        """
        total, parts, turns = 0.0, dict[str, float](), None
        deadline = asyncio.timeout(self._timeout_seconds)
        under_way = self._rewards[0]
        try:
            async with deadline:
                for reward in self._rewards:
                    under_way = reward
                    earned = await _call(reward, trajectory)
                    # Code that is cancelled may go on all the same.
                    if deadline.expired():
                        raise TimeoutError
                    total += reward.weight * earned.value
                    named = {f"{reward.name}/{name}": value for name, value in earned.named.items()}
                    parts |= named or {reward.name: earned.value}
                    if earned.turns is not None:
                        weighted = [reward.weight * value for value in earned.turns]
                        turns = [a + b for a, b in zip(turns or [0.0] * len(weighted), weighted, strict=True)]
        # Code that is cancelled may turn that into an exception of its own, and a reward may raise TimeoutError too.
        except Exception as error:
            if not deadline.expired():
                raise
            raise self._too_late(under_way) from error
        if not math.isfinite(total):
            raise RewardError(f"the weighted sum of the rewards is {total}; lower their weights")
        return trajectory.with_reward(total, parts, None if turns is None else tuple(turns))

    async def close(self) -> None:
        """Close what the rewards hold, such as the connections of a judge."""
        for reward in self._rewards:
            close = getattr(reward.call, "close", None)
            if close is not None:
                await close()

    def _too_late(self, reward: _Reward) -> Exception:
        message = f"{reward.place} did not return within {self._timeout_seconds:g} s, which rollout.reward_timeout_seconds allows"
        return RewardError(message) if isinstance(reward.call, OwnReward) else EnvironmentFailure(message)


def penalty(trajectory: Trajectory, settings: Sequence[RewardConfig]) -> float:
    """Return what rewards below 0, such as a penalty for length, took off the reward of an episode; at least 0.

    With it, the reward is what the episode earned, which no penalty makes smaller.
    """
    taken_off = 0.0
    for one in settings:
        value = sum(value for name, value in trajectory.reward_parts.items() if name.partition("/")[0] == one.name)
        taken_off += max(0.0, -one.weight * value)
    return taken_off


def _make(settings: RewardConfig) -> _Reward:
    name, weight = settings.name, settings.weight
    if settings.kind not in REWARDS:
        own = OwnReward(settings)
        return _Reward(name, weight, own, own.place)
    kind = REWARDS[settings.kind]
    call = kind(**settings.options) if inspect.isclass(kind) else partial(kind, **settings.options)
    return _Reward(name, weight, call, settings.kind)


async def _call(reward: _Reward, trajectory: Trajectory) -> Parts:
    if isinstance(reward.call, OwnReward | Judge):
        returned = await reward.call(trajectory)
    else:
        try:
            returned = reward.call(trajectory)
        except ValueError as error:
            raise RewardError(f"{reward.place}: {error}") from error
    try:
        return read(returned, trajectory)
    except RewardError as error:
        raise RewardError(f"{reward.place}: {error}") from error
