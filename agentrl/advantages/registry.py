"""Looking up an estimator or a stratifier by its name or by an import path, and checking an estimator's options."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from agentrl.advantages.base import AdvantageError
from agentrl.advantages.estimators import ESTIMATORS, Estimator

F = TypeVar("F", bound=Callable[..., Any])


def get_estimator(name: str) -> Estimator:
    """Return the estimator of a registered name or of an import path such as `package.module:function`.

    Raises:
        AdvantageError: if there is none.
    """
    return look_up(name, ESTIMATORS, "estimator")


def look_up(name: str, registry: Mapping[str, F], kind: str) -> F:
    """Return registry[name], or what the import path `package.module:function` leads to. `kind` is named in errors.

    Raises:
        AdvantageError: if the name is neither registered nor the path of something callable.
    """
    if name in registry:
        return registry[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(sorted(registry))
        raise AdvantageError(f"unknown {kind} {name!r} (there are: {known}; or write package.module:function){hint}")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise AdvantageError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise AdvantageError(f"{kind} {name!r} is a {type(found).__name__}, not a function")
    return found


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
