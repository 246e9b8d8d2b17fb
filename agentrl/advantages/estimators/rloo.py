"""Advantages against the mean of the other rollouts."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import Batch, Floats, centre


def rloo(batch: Batch) -> Floats:
    """REINFORCE leave-one-out (Kool et al. 2019; arXiv 2402.14740).

        A(i) = R_i - mean of the other rollouts of i's group = K / (K - 1) * (R_i - mean), K rollouts in the group

    Returns [n]; 0 in a group of one. The baseline does not depend on rollout i, so the gradient is unbiased.
    """
    count = batch.by_group.count
    return (count / np.maximum(count - 1, 1))[batch.groups] * centre(batch.by_group, batch.groups)
