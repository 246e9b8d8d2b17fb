"""Advantages per turn from rewards per turn."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Floats, moments, required, standardise
from agentrl.advantages.estimators.grpo import grpo


def mt_grpo(batch: Batch, *, weight: float = 1.0, eps: float = 1e-6, ddof: int = 0) -> Floats:
    """Multi-turn GRPO (arXiv 2505.11821), its two turns extended to any number.

        A(i, t) = A_T(i, t) + weight * A_O(i)   before rollout i's last turn
        A(i, t) = A_O(i)                        at its last turn
        A_O(i): grpo over i's group
        A_T(i, t) = (r(i, t) - mean) / (std + eps), over the rollouts of the group for which turn t is not the last

    Returns [n, T], T the most turns of a rollout; 0 beyond a rollout's last turn. The reward of a last turn is not used:
    the rollout's own reward stands for it.

    Args:
        batch: the rollouts with turn rewards.
        weight: the share of the outcome in earlier turns, at least 0.
        eps: added to either standard deviation.
        ddof: 0 divides variances by n, 1 by n - 1.

    Raises:
        AdvantageError: if the batch has no turn rewards or an argument is out of range.
    """
    if not 0 <= weight < float("inf"):
        raise AdvantageError(f"weight must be a finite number of at least 0, got {weight!r}")
    turns = required(batch.turns, "mt_grpo", "turn_rewards")
    rewards = required(turns.rewards, "mt_grpo", "turn_rewards")
    early = ~turns.last
    rollouts, index = turns.rollouts[early], turns.index[early]
    width = turns.index.max(initial=-1) + 1
    _, parts = np.unique(batch.groups[rollouts] * width + index, return_inverse=True)
    outcome = grpo(batch, eps=eps, ddof=ddof)
    values = np.zeros((len(batch.rewards), width))
    turn = standardise(moments(rewards[early], parts, batch.tolerance), parts, eps, ddof)
    values[rollouts, index] = turn + weight * outcome[rollouts]
    values[turns.rollouts[turns.last], turns.index[turns.last]] = outcome
    return values
