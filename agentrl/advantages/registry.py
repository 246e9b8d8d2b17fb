"""Looking up an estimator by its name or by an import path, and checking its options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from agentrl.advantages.base import AdvantageError
from agentrl.advantages.estimators import ESTIMATORS, Estimator
from agentrl.registry import look_up


def get_estimator(name: str) -> Estimator:
    """Return the estimator of a registered name or of an import path such as `package.module:function`.

    Raises:
        AdvantageError: if there is none.
    """
    return look_up(name, ESTIMATORS, "estimator", AdvantageError)


def option_names(estimator: Estimator) -> list[str] | None:
    """Return the names of the options that an estimator takes, or None if it takes any."""
    _, *parameters = inspect.signature(estimator).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def check_options(name: str, estimator: Estimator, options: Mapping[str, Any]) -> None:
    """Raise AdvantageError for an option that the estimator does not take; `name` is the one the caller gave."""
    known = option_names(estimator)
    if known is None:
        return
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise AdvantageError(
                f"estimator {name!r} has no option {option!r} (it has: {', '.join(known) or 'none'}){hint}"
            )
