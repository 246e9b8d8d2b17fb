"""Checkpoints on the disk: written aside, named when they are whole, and checked before anything is read from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentrl.runs.files import replace_text

_SUMS = "sha256.json"
"""The file of a checkpoint that names the others, with their sums."""


def checkpoint_step(path: Path) -> int:
    """Return the number of steps that a checkpoint folder was saved after."""
    return int(path.name.removeprefix("checkpoint-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, complete or not, the newest first."""
    # A copy that somebody keeps beside them has another name.
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


@contextmanager
def new_checkpoint(folder: Path, step: int, keep: int, best: int | None = None) -> Iterator[Path]:
    """Give a folder to write into, and make what one folder in it holds the checkpoint of `step`.

    Whenever the process is killed, `folder` holds whole checkpoints alone under their names. Of these the `keep` newest stay,
    and the one of step `best`.

    Raises:
        OSError: if the disk takes no more; older checkpoints stay as they were.
    """
    aside = folder / f".checkpoint-{step}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        (written,) = aside.iterdir()
        sums = {str(path.relative_to(written)): _sum(path) for path in _files(written)}
        replace_text(written / _SUMS, json.dumps(sums, indent=2) + "\n")
        final = folder / f"checkpoint-{step}"
        if final.exists():
            final.rename(aside / "before")
        written.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in [path for path in checkpoints_in(folder) if checkpoint_step(path) <= step][keep:]:
        if checkpoint_step(old) != best:
            discard(old)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; one that is removed in part counts as incomplete."""
    (checkpoint / _SUMS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end."""
    return (checkpoint / _SUMS).is_file()


def damage(checkpoint: Path) -> str | None:
    """Return in words what is wrong with a checkpoint, or None if every file of it is as it was written."""
    try:
        sums = json.loads((checkpoint / _SUMS).read_bytes())
        for name, wanted in sums.items():
            if _sum(checkpoint / name) != wanted:
                return f"{checkpoint / name} is not as it was written"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, AttributeError):
        return f"{checkpoint / _SUMS} is not as it was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        # Its content must be on the disk before its name says that it is whole.
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
