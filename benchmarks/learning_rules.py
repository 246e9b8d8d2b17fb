"""Estimators that only studies of learning compare: a config names one as `learning_rules:NAME`."""

from __future__ import annotations

from agentrl.advantages.balance import rarity_bonus
from agentrl.advantages.base import AdvantageError, Batch, Floats
from agentrl.advantages.estimators.grpo import grpo


def grpo_with_balance(batch: Batch, *, balance: float, eps: float = 1e-6) -> Floats:
    """GRPO and a force towards strata of equal size, without the practice of `stratified`: A(i) = A_G(i) + balance * b(i).

    Returns [n]. b is that of `agentrl.advantages.balance`, and `balance` at least 0.

    Raises:
        AdvantageError: if an argument is out of range.
    """
    if not 0 <= balance < float("inf"):
        raise AdvantageError(f"balance must be a finite number of at least 0, got {balance!r}")
    return grpo(batch, eps=eps) + balance * rarity_bonus(batch)
