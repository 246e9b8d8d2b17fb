"""What vLLM's workers need on any device. vLLM imports this module in their processes, as `worker_extension_cls`."""

from __future__ import annotations

import multiprocessing
import os
import threading


def _end_with(starter: multiprocessing.process.BaseProcess) -> None:
    """End this process, whatever its threads wait for, as soon as the one that started it has ended."""
    starter.join()
    os._exit(1)


# A core whose engine was killed may wait for ever on its own way out, and keep its memory.
_starter = multiprocessing.parent_process()
if _starter is not None:
    threading.Thread(target=_end_with, args=(_starter,), name="end-with-starter", daemon=True).start()


class Extension:
    """Being named makes vLLM import this module."""
