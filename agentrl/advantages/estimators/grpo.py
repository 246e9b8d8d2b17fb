"""Group-relative advantages: every rollout against all rollouts of its prompt."""

from __future__ import annotations

from agentrl.advantages.base import Batch, Floats, standardise


def grpo(batch: Batch, *, eps: float = 1e-6, ddof: int = 0) -> Floats:
    """GRPO (arXiv 2402.03300), called global normalisation in arXiv 2510.06214.

        A_G(i) = (R_i - mean) / (std + eps), mean and std over the rollouts of i's group

    Returns [n]; exactly 0 in a group of one and in a group whose rewards do not vary.

    Args:
        batch: the rollouts; their strata are not used.
        eps: added to the standard deviation.
        ddof: 0 divides the variance by n, 1 by n - 1.

    Raises:
        AdvantageError: if eps or ddof is out of range.
    """
    return standardise(batch.by_group, batch.groups, eps, ddof)
