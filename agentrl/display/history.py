"""How reward and strata moved from step to step, read out of a run's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from agentrl.advantages import by_stratum

REWARD = "reward/mean"
"""The metric whose mean moves: the reward of a step, averaged over its valid episodes."""

WINDOW = 5
"""A moving mean is that of a step and the four before it: the reward of one step swings with the questions drawn."""


@dataclass(frozen=True, slots=True)
class History:
    """Reward and strata of n steps.

    Attributes:
        steps: [n] their numbers, ascending. A step without a finite reward is left out.
        rewards: [n] the mean reward of each step.
        means: [n] the moving mean of the rewards, over fewer than `WINDOW` steps at the start.
        shares: by stratum [n] its share of the step's valid episodes, from 0 to 1. Strata that are numbers come first.
    """

    steps: tuple[int, ...]
    rewards: tuple[float, ...]
    means: tuple[float, ...]
    shares: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, metrics: Iterable[Mapping[str, Any]]) -> Self:
        """Read the metrics of steps in their order: the lines of metrics.jsonl, each with its `step`."""
        kept = [line for line in metrics if line.get(REWARD) is not None]
        rewards = tuple(float(line[REWARD]) for line in kept)
        recent = [rewards[max(0, end - WINDOW) : end] for end in range(1, len(rewards) + 1)]
        strata = [by_stratum(line) for line in kept]
        return cls(
            steps=tuple(int(line["step"]) for line in kept),
            rewards=rewards,
            means=tuple(sum(some) / len(some) for some in recent),
            shares={
                stratum: tuple(step.get(stratum, {}).get("share") or 0.0 for step in strata)
                for stratum in sorted({name for step in strata for name in step}, key=_order)
            },
        )


def _order(stratum: str) -> tuple[bool, int, str]:
    # The last of counted strata may be called `3+`.
    number = stratum.removesuffix("+")
    return (False, int(number), stratum) if number.isdecimal() else (True, 0, stratum)
