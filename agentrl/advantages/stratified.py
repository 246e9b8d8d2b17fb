"""Stratified advantages: every rollout against those of its prompt that searched alike, blended with GRPO's."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Bools, Floats, Ints, standardise
from agentrl.advantages.grpo import grpo


def stratified(
    batch: Batch,
    *,
    alpha: float = 0.8,
    eps: float = 1e-6,
    ddof: int = 0,
    degenerate: Literal["zero", "global", "merge"] = "zero",
) -> Floats:
    """Stratified GRPO (arXiv 2510.06214).

        A_S(i) = (R_i - mean_k) / (std_k + eps), mean_k and std_k over the rollouts of i's stratum
        A(i) = alpha * A_S(i) + (1 - alpha) * A_G(i), A_G as in grpo

    Returns [n]. alpha 0 is GRPO, bit for bit.

    Args:
        batch: the rollouts; for "merge" the stratum keys must be finite real numbers.
        alpha: the share of A_S, from 0 to 1.
        eps: added to either standard deviation.
        ddof: 0 divides variances by n, 1 by n - 1.
        degenerate: what a stratum of one, or one whose rewards do not vary, gets. "zero": A_S = 0, so (1 - alpha) * A_G
            remains. "global": A_S = A_G. "merge": it joins that stratum of its group that is not degenerate and whose
            key is nearest by absolute difference, the smaller key on a tie, and A_S is computed over the joined stratum
            for all of its members; where a group has degenerate strata only, all of them join into one. What is still
            degenerate then gets A_S = 0.

    Raises:
        AdvantageError: if an argument is out of range.
    """
    if not 0 <= alpha <= 1:
        raise AdvantageError(f"alpha must be from 0 (GRPO) to 1 (stratified only), got {alpha!r}")
    if degenerate not in ("zero", "global", "merge"):
        raise AdvantageError(f"degenerate must be zero, global or merge, got {degenerate!r}")
    a_global = grpo(batch, eps=eps, ddof=ddof)
    a_stratified, is_degenerate = standardise(batch.rewards, batch.strata, eps, ddof)
    if degenerate == "global":
        a_stratified = np.where(is_degenerate[batch.strata], a_global, a_stratified)
    elif degenerate == "merge":
        a_stratified, _ = standardise(batch.rewards, _merged(batch, is_degenerate), eps, ddof)
    return alpha * a_stratified + (1 - alpha) * a_global


def _merged(batch: Batch, is_degenerate: Bools) -> Ints:
    """Return the strata [n] after each degenerate one, of is_degenerate [S], has joined its nearest."""
    odd = [key for key in set(batch.stratum_keys) if not (isinstance(key, Real) and np.isfinite(float(key)))]
    if odd:
        raise AdvantageError(f"degenerate=merge needs strata whose keys are finite numbers, got {odd[0]!r}")
    keys = batch.stratum_keys.astype(np.float64)
    order = np.lexsort((keys, batch.stratum_groups))
    keys, groups, sound = keys[order], batch.stratum_groups[order], ~is_degenerate[order]
    last = len(order) - 1
    place = np.arange(len(order))
    below = np.maximum.accumulate(np.where(sound, place, 0))
    above = np.minimum.accumulate(np.where(sound, place, last)[::-1])[::-1]
    to_below, to_above = (
        np.where(sound[near] & (groups[near] == groups), np.abs(keys[near] - keys), np.inf) for near in (below, above)
    )
    nearest = np.where(to_below <= to_above, below, above)
    alone = np.isinf(np.minimum(to_below, to_above))
    target = np.empty_like(order)
    target[order] = np.where(alone, np.searchsorted(groups, groups), nearest)
    _, renumbered = np.unique(target, return_inverse=True)
    return renumbered[batch.strata]
