"""Stratified advantages: every rollout against those of its prompt that searched alike, blended with GRPO's."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import numpy as np

from agentrl.advantages.balance import rarity_bonus
from agentrl.advantages.base import AdvantageError, Batch, Floats, moments, standardise
from agentrl.advantages.estimators.grpo import grpo
from agentrl.advantages.merge import merge_degenerate
from agentrl.advantages.shrinkage import shrinkage


def stratified(
    batch: Batch,
    *,
    alpha: float | Literal["auto"] = 0.8,
    eps: float = 1e-6,
    ddof: int = 0,
    degenerate: Literal["zero", "global", "merge"] = "zero",
    min_stratum_size: int = 2,
    balance: float = 0.0,
) -> Floats:
    """Stratified GRPO (arXiv 2510.06214).

        A_S(i) = (R_i - mean_k) / (std_k + eps), mean_k and std_k over the rollouts of i's stratum
        A(i) = alpha * (A_S(i) + balance * b(i)) + (1 - alpha) * A_G(i), A_G as in grpo

    Returns [n]. alpha 0 is GRPO, bit for bit. The term in b, off by default, is this project's.

    Args:
        batch: the rollouts; for "merge" the stratum keys must be finite real numbers.
        alpha: the share of A_S, from 0 to 1, or "auto": a weight for each stratum from its size and how much strata
            differ, see `agentrl.advantages.shrinkage`; it is 0 in degenerate strata, which then keep A_G whole.
        eps: added to either standard deviation.
        ddof: 0 divides variances by n, 1 by n - 1.
        degenerate: what a stratum of fewer than `min_stratum_size` rollouts, or one whose rewards do not vary, gets.
            "zero": A_S = 0, so (1 - alpha) * A_G remains. "global": A_S = A_G. "merge": it joins its nearest as
            `agentrl.advantages.merge` says, and A_S is computed over the joined stratum for all of its members; what is
            still degenerate then gets A_S = 0.
        min_stratum_size: at least 2.
        balance: at least 0; weighs b, how rare i's stratum is in its group, see `agentrl.advantages.balance`. It needs an
            alpha that is a number: "auto" would leave it out in just the strata that are rare.

    Raises:
        AdvantageError: if an argument is out of range.
    """
    if alpha != "auto" and not (isinstance(alpha, Real) and 0 <= alpha <= 1):
        raise AdvantageError(f"alpha must be auto, or from 0 (GRPO) to 1 (stratified only), got {alpha!r}")
    if degenerate not in ("zero", "global", "merge"):
        raise AdvantageError(f"degenerate must be zero, global or merge, got {degenerate!r}")
    if not min_stratum_size >= 2:
        raise AdvantageError(f"min_stratum_size must be at least 2, got {min_stratum_size!r}")
    if not 0 <= balance < float("inf"):
        raise AdvantageError(f"balance must be a finite number of at least 0, got {balance!r}")
    if balance and alpha == "auto":
        raise AdvantageError(
            "balance needs an alpha that is a number: auto is 0 in the rare strata that balance is for"
        )
    a_global = grpo(batch, eps=eps, ddof=ddof)
    strata, part = batch.strata, batch.by_stratum
    odd = part.degenerate | (part.count < min_stratum_size)
    if degenerate == "merge":
        strata = merge_degenerate(batch, odd)
        part = moments(batch.rewards, strata, batch.tolerance)
        odd = part.degenerate
    a_stratified = standardise(part, strata, eps, ddof)
    if degenerate == "global" or min_stratum_size > 2:
        a_stratified = np.where(odd[strata], a_global if degenerate == "global" else 0.0, a_stratified)
    weight = np.where(odd, 0.0, shrinkage(batch, part, strata))[strata] if alpha == "auto" else alpha
    if balance:
        a_stratified += balance * rarity_bonus(batch)
    return weight * a_stratified + (1 - weight) * a_global
