"""Advantages against a value that is learnt from past batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Estimate, moments, standardise
from agentrl.advantages.estimators.rloo import rloo
from agentrl.advantages.value import fit_value, note_sums


def value_baseline(
    batch: Batch,
    *,
    window: int = 20,
    ridge: float = 1.0,
    per_stratum: bool = True,
    scale: Literal["none", "batch"] = "none",
    eps: float = 1e-6,
    ddof: int = 0,
) -> Estimate:
    """A learnt baseline V(question, stratum), refitted before each batch; see `agentrl.advantages.value`.

        A(i) = R_i - V(i), V(i) = x_i + t_0 + t_1 x_i + t_k(i), x_i the mean of the other rollouts of i's group

    Returns [n]; rloo in the first batch of a run, and 0 in a group of one. A group without reward variance has advantages
    too: V compares it with past batches.

    A baseline that depends on the action is biased: E[sum_i t_k(i) grad log pi(i)] = K sum_k t_k grad P(k), which is 0 only
    where all t_k are equal. As with the mean of a stratum, what speaks for one stratum against another is lost from the
    gradient as far as V has learnt it. `per_stratum: false` without `scale` is unbiased: x_i and the past do not depend on
    rollout i.

    The note `r2` is 1 - sum (R - V)^2 / sum (R - mean)^2 over this batch, which V has not seen; it is missing where
    rewards do not vary.

    Args:
        batch: the rollouts, with the notes of past batches.
        window: how many past batches V is fitted to, at least 1.
        ridge: above 0; a penalty of so many rollouts, for rewards of size 1.
        per_stratum: false leaves t_k out.
        scale: "batch" divides by std + eps, std that of the batch's rewards; where they do not vary, A is 0.
        eps: added to the standard deviation.
        ddof: 0 divides the variance by n, 1 by n - 1.

    Raises:
        AdvantageError: if an argument is out of range.
    """
    if isinstance(window, bool) or not (isinstance(window, int) and window >= 1):
        raise AdvantageError(f"window must be a whole number of at least 1, got {window!r}")
    if isinstance(ridge, bool) or not (isinstance(ridge, int | float) and 0 < ridge < float("inf")):
        raise AdvantageError(f"ridge must be a finite number above 0, got {ridge!r}")
    if not isinstance(per_stratum, bool):
        raise AdvantageError(f"per_stratum must be true or false, got {per_stratum!r}")
    if scale not in ("none", "batch"):
        raise AdvantageError(f"scale must be none or batch, got {scale!r}")
    compared = (batch.by_group.count > 1)[batch.groups]
    excess = rloo(batch)
    others = batch.rewards - excess
    value = fit_value(batch.past[-window:], ridge, per_stratum)
    advantages = np.where(compared, excess - value.beyond_others(batch, others), 0.0)
    notes = note_sums(batch, others, excess, compared)
    rewards = moments(batch.rewards[compared], np.zeros(compared.sum(), dtype=np.intp), batch.tolerance)
    if not rewards.degenerate.all():
        notes["r2"] = 1 - float((advantages**2).sum() / (rewards.centred**2).sum())
    if scale == "batch":
        everyone = np.zeros_like(batch.groups)
        spread = moments(batch.rewards, everyone, batch.tolerance)
        advantages = standardise(replace(spread, centred=advantages), everyone, eps, ddof)
    return Estimate(advantages, notes)
