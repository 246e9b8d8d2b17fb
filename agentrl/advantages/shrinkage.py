"""How far a stratum can stand on itself: the weight behind `alpha: auto`."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import Batch, Floats, Ints, Moments


def shrinkage(batch: Batch, stratum: Moments, strata: Ints) -> Floats:
    """Return the weight [S], from 0 to 1, of each stratum's own rollouts against those of its group.

    `stratum` holds the moments of the rewards by strata [n], which are the batch's or some of them merged.

        w_k = tau^2 / (tau^2 + s^2 / n_k), and 0 in a degenerate stratum
        s^2 = sum_k sum_{i in k} (R_i - mean_k)^2 / (K - S)
        tau^2 = max(0, (M - s^2) / n_0), M = sum_k n_k (mean_k - mean)^2 / (S - 1), n_0 = (K - sum_k n_k^2 / K) / (S - 1)

    for a group of K rollouts in S strata of n_k. w_k is the empirical-Bayes weight of a stratum's own mean when means of
    strata are drawn with variance tau^2 (Efron and Morris, "Data analysis using Stein's estimator and its
    generalizations", JASA 70 (1975), 311-319); s^2 and tau^2 are the analysis-of-variance estimates for unequal counts
    (Searle, Casella and McCulloch, Variance Components, 1992, section 3.6).

    w_k is 0 where strata do not differ more than chance would have it, where each stratum holds one rollout and where there is
    one stratum; it tends to 1 as n_k grows while strata differ.
    """
    group, groups = batch.by_group, batch.groups
    stratum_groups = np.zeros(len(stratum.count), dtype=groups.dtype)
    stratum_groups[strata] = groups
    size, parts = group.count, np.bincount(stratum_groups, minlength=len(group.count))
    bias = np.bincount(strata, group.centred) / stratum.count
    between = np.bincount(stratum_groups, stratum.count * bias**2, len(size)) / np.maximum(parts - 1, 1)
    within = np.bincount(groups, stratum.centred**2) / np.maximum(size - parts, 1)
    effective = (size - np.bincount(stratum_groups, stratum.count**2, len(size)) / size) / np.maximum(parts - 1, 1)
    spread = np.zeros(len(size))
    np.divide(between - within, effective, out=spread, where=(parts > 1) & (size > parts) & (between > within))
    tau, noise = spread[stratum_groups], within[stratum_groups] / stratum.count
    weight = np.zeros(len(stratum.count))
    np.divide(tau, tau + noise, out=weight, where=(tau > 0) & ~stratum.degenerate)
    return weight
