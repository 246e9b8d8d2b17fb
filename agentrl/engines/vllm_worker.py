"""What vLLM's workers need on any device. vLLM imports this module in their processes, as `worker_extension_cls`."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def _end_with(parent: int) -> None:
    """End this process, whatever its threads wait for, once it is no child of `parent` any more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# A core whose engine was killed may wait for ever on its own way out, and keep its memory.
_starter = multiprocessing.parent_process()
if _starter is not None and os.getppid() == _starter.pid:
    threading.Thread(target=_end_with, args=(_starter.pid,), name="end-with-parent", daemon=True).start()


class Extension:
    """Being named makes vLLM import this module."""
