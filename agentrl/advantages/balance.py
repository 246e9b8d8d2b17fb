"""A force towards strata of equal size, so that rare ones get practised."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import Batch, Floats


def rarity_bonus(batch: Batch) -> Floats:
    """Return how much rarer than usual each rollout's stratum is within its group [n]; it sums to 0 over a group.

        b(i) = -log(n_k / K) - H, H = -sum_k (n_k / K) log(n_k / K)

    for a rollout i in a stratum of n_k of the K rollouts of its group. As an advantage it follows the gradient of the
    entropy H(P) of the strata: grad H(P) = -sum_k grad P(k) log P(k) = E[(-log P(k) - H(P)) grad log P(k)], with the
    group's own shares in place of P. It depends on counts alone, not on rewards.
    """
    size = np.bincount(batch.groups).astype(np.float64)
    count = np.bincount(batch.strata).astype(np.float64)
    surprise = np.log(size[batch.stratum_groups] / count)
    entropy = np.bincount(batch.stratum_groups, count * surprise) / size
    return (surprise - entropy[batch.stratum_groups])[batch.strata]
