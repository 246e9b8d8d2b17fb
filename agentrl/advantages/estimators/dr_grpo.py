"""Advantages without the division by the standard deviation."""

from __future__ import annotations

from agentrl.advantages.base import Batch, Floats, centre


def dr_grpo(batch: Batch) -> Floats:
    """Dr. GRPO (arXiv 2503.20783): groups with a small spread of rewards get no larger gradient than others.

        A(i) = R_i - mean, mean over the rollouts of i's group

    Returns [n]. The loss of the same paper, which divides by a constant and not by lengths, is `training.loss: dr_grpo`.
    """
    return centre(batch.by_group, batch.groups)
