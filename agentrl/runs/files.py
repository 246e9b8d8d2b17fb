"""Writing files so that a kill or a full disk loses nothing that stood there before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from agentrl.types import AgentRLError


class RunError(AgentRLError):
    """A run folder, or a file of one, cannot be used as asked."""


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is either the old one or the whole new one, whenever the process is killed.

    Raises:
        OSError: if the disk takes no more; it names the file, which stays as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _naming(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `replace_file` does."""
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, which is made if need be.

    Raises:
        OSError: if the disk takes no more; it names the file, which stays as it was.
    """
    try:
        # Without a buffer, because a buffer that could not be written is tried again when the file is closed.
        with path.open("ab", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _naming(error, path) from error


def _naming(error: OSError, path: Path) -> OSError:
    """Return the error with the name of the file that was asked for."""
    return OSError(error.errno, error.strerror, str(path))
