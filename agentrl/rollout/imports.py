"""Where Ray's workers look for modules: libraries first, then where the driver looks, such as its working directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ray.job_config import JobConfig


class LibrariesFirst(JobConfig):
    """The settings of a Ray job in whose workers no file of the user's is imported in place of a library.

    Ray puts the driver's working directory and the folder of its script before everything else, in each worker, Ray Train's
    included: a `tokenizers.py` that happens to lie there is then imported by transformers.
    """

    def __init__(self) -> None:
        # This package's own folder goes before a folder of its name in the working directory, such as a checkout beside it.
        folders = [str(Path(__file__).parents[2]), *map(os.path.abspath, sys.path)]
        super().__init__(runtime_env={"worker_process_setup_hook": _extend_path(folders)})

    def _runtime_env_has_working_dir(self) -> bool:
        # What Ray asks before it puts the folders in front.
        return True


def _extend_path(folders: list[str]) -> Callable[[], None]:
    # An inner function travels as code: a worker runs it before it can import agentrl from one of these folders.
    def extend_path() -> None:
        import sys

        sys.path.extend(folder for folder in folders if folder not in sys.path)

    return extend_path
