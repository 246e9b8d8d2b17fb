"""Looking up what a config names: by a registered name, or by an import path `package.module:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from retrievers.names import did_you_mean, import_path

F = TypeVar("F", bound=Callable[..., Any])


def look_up(name: str, registry: Mapping[str, F], kind: str, error: Callable[[str], Exception]) -> F:
    """Return registry[name], or what the import path `package.module:function` leads to.

    Args:
        kind: what is looked up, for messages.
        error: an exception class, or a function from a message to the exception.

    Raises:
        Exception: what `error` makes, if the name is neither registered nor the path of something callable.
    """
    if name in registry:
        return registry[name]
    if registry and ":" not in name:
        known = ", ".join(sorted(registry))
        hint = did_you_mean(name, registry)
        raise error(f"unknown {kind} {name!r} (there are: {known}; or write package.module:function){hint}")
    try:
        found = import_path(name)
    except ImportError as problem:
        raise error(f"{kind} {problem}") from problem
    if not callable(found):
        raise error(f"{kind} {name!r} is a {type(found).__name__}, not a function")
    return found


def call_problem(function: Callable[..., Any], *arguments: Any, **options: Any) -> str | None:
    """Return why a function cannot be called so, with what it takes; None if it can, or does not say what it takes."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions written in C do not.
        return None
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        return f"{error}; it takes {signature}"
    return None
