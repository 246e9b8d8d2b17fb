"""What a batch of advantages says about its groups and strata."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import Batch, Floats, moments


def summarise(batch: Batch, advantages: Floats) -> dict[str, float]:
    """Return a small report on a batch and its advantages [n]; groups count where at least one rollout does.

    Keys:
        groups, strata: how many there are.
        degenerate_share: the share of rollouts in degenerate strata.
        groups_without_signal_global: groups of one or without reward variance, for which GRPO is 0.
        groups_without_signal: groups whose advantages are all 0.
        between_strata_share: the share of a group's reward variance that lies between its strata,
            sum_k n_k (mean_k - mean)^2 / sum_i (R_i - mean)^2, averaged over groups with variance; 0 if there are none.
    """
    group = moments(batch.rewards, batch.groups)
    stratum = moments(batch.rewards, batch.strata)
    bias = np.bincount(batch.strata, group.centred) / stratum.count
    between = np.bincount(batch.groups, bias[batch.strata] ** 2)
    total = np.bincount(batch.groups, group.centred**2)
    varied = ~group.degenerate
    silent = np.bincount(batch.groups, advantages != 0) == 0
    return {
        "groups": float(len(group.count)),
        "strata": float(len(stratum.count)),
        "degenerate_share": _mean(stratum.degenerate[batch.strata].astype(np.float64)),
        "groups_without_signal_global": float(group.degenerate.sum()),
        "groups_without_signal": float(silent.sum()),
        "between_strata_share": _mean(between[varied] / total[varied]),
    }


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0
