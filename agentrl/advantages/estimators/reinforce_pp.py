"""Advantages whitened over the batch."""

from __future__ import annotations

from typing import Literal

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Floats, centre, moments, standardise


def reinforce_pp(
    batch: Batch, *, baseline: Literal["none", "group"] = "none", eps: float = 1e-6, ddof: int = 0
) -> Floats:
    """REINFORCE++ (arXiv 2501.03262).

        A(i) = (V_i - mean) / (std + eps), mean and std over the batch

    Returns [n]. The KL penalty that the paper puts into the reward is `training.kl` with `where: reward` here.

    Args:
        batch: the rollouts; their strata are not used.
        baseline: "none": V_i = R_i. "group": V_i = R_i less the mean of i's group, the paper's variant with baseline.
        eps: added to the standard deviation.
        ddof: 0 divides the variance by n, 1 by n - 1.

    Raises:
        AdvantageError: if an argument is out of range.
    """
    if baseline not in ("none", "group"):
        raise AdvantageError(f"baseline must be none or group, got {baseline!r}")
    values = batch.rewards if baseline == "none" else centre(batch.by_group, batch.groups)
    everyone = np.zeros_like(batch.groups)
    return standardise(moments(values, everyone, batch.tolerance), everyone, eps, ddof)
