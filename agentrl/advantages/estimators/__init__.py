"""The estimators by name, one module each."""

from __future__ import annotations

from collections.abc import Callable

from agentrl.advantages.base import Floats
from agentrl.advantages.estimators.dr_grpo import dr_grpo
from agentrl.advantages.estimators.gigpo import gigpo
from agentrl.advantages.estimators.grpo import grpo
from agentrl.advantages.estimators.mt_grpo import mt_grpo
from agentrl.advantages.estimators.opo import opo
from agentrl.advantages.estimators.reinforce_pp import reinforce_pp
from agentrl.advantages.estimators.rloo import rloo
from agentrl.advantages.estimators.stratified import stratified

Estimator = Callable[..., Floats]
"""estimator(batch: Batch, *, option=default, ...) -> float64 [n], or [n, T] with a value for each turn"""

ESTIMATORS: dict[str, Estimator] = {
    "stratified": stratified,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "opo": opo,
    "gigpo": gigpo,
    "mt_grpo": mt_grpo,
}
