"""What an episode earns: the weighted sum of the rewards that the section `reward` of a config lists.

A reward takes a `Trajectory` and returns a number, a mapping of named numbers that add up, or `Earned`, which adds a number
for each turn. It may be `async`. One with options is called as `function(trajectory, **options)`; a class is made once with
`Class(**options)`, and what was made is called with the trajectory.
"""

from agentrl.rewards.base import Earned, RewardError
from agentrl.rewards.kinds import (
    REWARDS,
    exact_match,
    f1,
    length,
    output_format,
    retrieval_recall,
    search_cost,
    sub_exact_match,
)
from agentrl.rewards.scoring import Rewards, penalty

__all__ = [
    "REWARDS",
    "Earned",
    "RewardError",
    "Rewards",
    "exact_match",
    "f1",
    "length",
    "output_format",
    "penalty",
    "retrieval_recall",
    "search_cost",
    "sub_exact_match",
]
