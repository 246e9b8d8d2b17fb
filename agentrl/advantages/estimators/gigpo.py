"""Advantages per turn: an episode against its group, and a turn against turns that stood at the same observation."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Floats, moments, required, standardise
from agentrl.advantages.estimators.grpo import grpo


def gigpo(batch: Batch, *, weight: float = 1.0, gamma: float = 0.95, eps: float = 1e-6, ddof: int = 0) -> Floats:
    """Group-in-group policy optimisation (arXiv 2505.10978).

        A(i, t) = A_E(i) + weight * A_S(i, t)
        A_E(i): grpo over i's group
        A_S(i, t) = (V(i, t) - mean) / (std + eps), over the turns of the group that have the anchor of turn t
        V(i, t) = sum_{s >= t} gamma^(s - t) r(i, s), where the last turn also earns the rollout's reward

    Returns [n, T], T the most turns of a rollout; 0 beyond a rollout's last turn. A turn that alone has its anchor gets
    A_S = 0.

    Args:
        batch: the rollouts with anchors; turn rewards are 0 where not given.
        weight: the paper's omega, at least 0.
        gamma: the discount, from 0 to 1.
        eps: added to either standard deviation.
        ddof: 0 divides variances by n, 1 by n - 1.

    Raises:
        AdvantageError: if the batch has no anchors or an argument is out of range.
    """
    if not 0 <= gamma <= 1:
        raise AdvantageError(f"gamma must be from 0 to 1, got {gamma!r}")
    if not 0 <= weight < float("inf"):
        raise AdvantageError(f"weight must be a finite number of at least 0, got {weight!r}")
    turns = required(batch.turns, "gigpo", "anchors")
    anchors = required(turns.anchors, "gigpo", "anchors")
    place = turns.rollouts, turns.index
    returns = np.zeros((len(batch.rewards), turns.index.max(initial=-1) + 1))
    if turns.rewards is not None:
        returns[place] = turns.rewards
    returns[turns.rollouts[turns.last], turns.index[turns.last]] += batch.rewards
    for t in range(returns.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * returns[:, t + 1]
    values = np.zeros_like(returns)
    values[place] = weight * standardise(moments(returns[place], anchors, batch.tolerance), anchors, eps, ddof)
    values[place] += grpo(batch, eps=eps, ddof=ddof)[turns.rollouts]
    return values
