"""The estimators by name, one module each; finding one, and checking its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from agentrl.advantages.base import AdvantageError, Estimate, Floats
from agentrl.advantages.estimators.dr_grpo import dr_grpo
from agentrl.advantages.estimators.gigpo import gigpo
from agentrl.advantages.estimators.grpo import grpo
from agentrl.advantages.estimators.mt_grpo import mt_grpo
from agentrl.advantages.estimators.opo import opo
from agentrl.advantages.estimators.reinforce_pp import reinforce_pp
from agentrl.advantages.estimators.rloo import rloo
from agentrl.advantages.estimators.stratified import stratified
from agentrl.advantages.estimators.value_baseline import value_baseline
from agentrl.registry import look_up
from retrievers.names import did_you_mean

Estimator = Callable[..., Floats | Estimate]
"""estimator(batch: Batch, *, option=default, ...) -> float64 [n], or [n, T] with a value for each turn, or an `Estimate`"""

ESTIMATORS: dict[str, Estimator] = {
    "stratified": stratified,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "opo": opo,
    "gigpo": gigpo,
    "mt_grpo": mt_grpo,
    "value_baseline": value_baseline,
}


def get_estimator(name: str) -> Estimator:
    """Return the estimator of a registered name or of an import path such as `package.module:function`.

    Raises:
        AdvantageError: if there is none.
    """
    return look_up(name, ESTIMATORS, "estimator", AdvantageError)


def check_options(name: str, estimator: Estimator, options: Mapping[str, Any]) -> None:
    """Raise AdvantageError for an option that the estimator does not take; `name` is the one the caller gave."""
    _, *parameters = inspect.signature(estimator).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            raise AdvantageError(
                f"estimator {name!r} has no option {option!r} (it has: {', '.join(known) or 'none'})"
                f"{did_you_mean(option, known)}"
            )
