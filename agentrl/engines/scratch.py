"""ScratchFolder: a folder that lives as long as its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ScratchFolder:
    """A new folder under `agentrl-UID` in the machine's temporary folder.

    A process that is killed cannot remove its folder. So each process holds a lock on its own, which the system drops when
    the process ends, and whoever makes a folder first removes those that nobody holds. A lock, unlike a process id, means
    the same in every container that shares the temporary folder.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir()) / f"agentrl-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        # Else one process could take another's new folder, not locked yet, for one that nobody holds.
        with _locked(root):
            for folder in root.iterdir():
                _remove_unless_held(folder)
            self.path = Path(tempfile.mkdtemp(dir=root))
            self._lock: int | None = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_unless_held(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        # Its process lives.
        return
    finally:
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
