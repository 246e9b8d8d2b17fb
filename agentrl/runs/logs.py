"""What the processes of a run say: a bounded file for each in the run folder, and the traceback of what ended the run.

The driver logs into `logs/driver.log`. Each process that Ray starts writes what it and its children print, down to the
last words of a native library, into a file of its own, so that nobody's death takes it away.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from agentrl.runs.files import replace_text

LIMIT_BYTES = 8 << 20
"""A log that has grown beyond this becomes NAME.log.1, in place of the one before, and begins again."""

_LOOK_SECONDS = 5.0
_FOLDER, _PROCESS = "AGENTRL_LOGS", "AGENTRL_PROCESS"


def log_folder(logs: Path) -> dict[str, str]:
    """Return the environment variables that tell `capture_output` to write into the folder `logs`."""
    return {_FOLDER: str(logs)}


def process_name(name: str) -> dict[str, str]:
    """Return the environment variables that name the log of an actor; a process without a name writes into ray.log."""
    return {_PROCESS: name}


def capture_output() -> None:
    """Send what this process and its children print to its file. Each process that Ray starts calls this first.

    Where the folder is not there, on a machine that does not share it, Ray keeps the output among its own logs.
    """
    folder = Path(os.environ[_FOLDER])
    if not folder.is_dir():
        return
    path = folder / f"{os.environ.get(_PROCESS, 'ray')}.log"
    # Children inherit the two descriptors, and each write of anybody goes to the end of the file, also after a truncation.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    os.write(1, f"--- {time.strftime('%F %T')} {platform.node()} process {os.getpid()}\n".encode())
    threading.Thread(target=_bound_for_ever, args=(path,), name="bound-log", daemon=True).start()


def bound(path: Path, limit: int = LIMIT_BYTES) -> None:
    """Move the contents of a log to `PATH.1` if they are more than `limit` bytes; its writers go on writing meanwhile."""
    if path.stat().st_size > limit:
        path.with_name(f"{path.name}.1").write_bytes(path.read_bytes()[-limit:])
        os.truncate(path, 0)


def _bound_for_ever(path: Path) -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        try:
            bound(path)
        except FileNotFoundError:
            # Somebody removed the run folder.
            return
        except OSError:
            # A full disk may have room again later.
            continue


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Log the driver's messages into the run folder while the block runs.

    If the block fails, the traceback, with those of other processes that it holds, is written to error.txt, and the
    exception gets a note that names the places to look at.
    """
    logs, error_file = folder / "logs", folder / "error.txt"
    logs.mkdir(exist_ok=True)
    error_file.unlink(missing_ok=True)
    handler = RotatingFileHandler(logs / "driver.log", maxBytes=LIMIT_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("agentrl")
    level = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        own.info("ended by %s: %s", type(error).__name__, error)
        # SystemExit and KeyboardInterrupt are somebody's wish and no failure.
        if isinstance(error, Exception):
            error.add_note(_keep(error, error_file, logs))
        raise
    finally:
        own.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _keep(error: Exception, file: Path, logs: Path) -> str:
    """Write the traceback of an error and return a line that says where it is."""
    try:
        replace_text(file, "".join(traceback.format_exception(error)))
    except OSError as problem:
        return f"the traceback cannot be kept: {problem}; logs: {logs}"
    return f"traceback: {file}; logs: {logs}"
