"""Names that people write: import paths of their own code, and the known name that a misspelt one is nearest to."""

from __future__ import annotations

import difflib
import pkgutil
import re
import traceback
from collections.abc import Iterable
from typing import Any

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def import_path(path: str) -> Any:
    """Import the module of `package.module:attribute` and return the attribute.

    Raises:
        ImportError: if `path` is written otherwise, the module cannot be imported, or it has no such attribute. The message
            names the path and the cause.
    """
    if not _IMPORT_PATH.fullmatch(path):
        raise ImportError(f"{path!r} is not an import path; write it as package.module:attribute")
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # A user's module is run by importing it, and may raise anything.
        match error:
            case ImportError() | AttributeError():
                cause = str(error)
            case SyntaxError():
                # Its text has the line, and its traceback none of the file's.
                cause = f"{type(error).__name__}: {error}"
            case _:
                cause = describe_exception(error)
        raise ImportError(f"{path!r} cannot be imported: {cause}") from error


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `; did you mean NAME?` with the `most` known names that are nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def describe_exception(error: BaseException) -> str:
    """Return what was raised and the line that raised it: `ValueError: no digits (mine.py:12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
