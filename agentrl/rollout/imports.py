"""How Ray's workers begin: they look for modules among the libraries, then where the driver does, and write their logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ray.job_config import JobConfig

from agentrl.runs.logs import log_folder


class LibrariesFirst(JobConfig):
    """The settings of a Ray job in whose workers no file of the user's is imported in place of a library.

    Ray puts the driver's working directory and the folder of its script before everything else, in each worker, Ray Train's
    included: a `tokenizers.py` that happens to lie there is then imported by transformers.
    """

    def __init__(self, logs: Path | None = None) -> None:
        """Each worker writes what it prints into the folder `logs`, if there is one."""
        # This package's own folder goes before a folder of its name in the working directory, such as a checkout beside it.
        folders = [str(Path(__file__).parents[2]), *map(os.path.abspath, sys.path)]
        variables = {} if logs is None else log_folder(logs)
        # A job has one hook. Ray would let another, given to ray.init, take the place of this one.
        hook = _setup(folders, captures_output=logs is not None)
        super().__init__(runtime_env={"worker_process_setup_hook": hook, "env_vars": variables})

    def _runtime_env_has_working_dir(self) -> bool:
        # What Ray asks before it puts the folders in front.
        return True


def _setup(folders: list[str], captures_output: bool) -> Callable[[], None]:
    # An inner function travels as code: a worker runs it before it can import agentrl from one of these folders.
    def setup() -> None:
        import sys

        sys.path.extend(folder for folder in folders if folder not in sys.path)
        if captures_output:
            from agentrl.runs.logs import capture_output

            capture_output()

    return setup
