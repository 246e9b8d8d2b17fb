"""The parts of `retrieval.py` that run agentrl's commands: the service under load, and the building of an index."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from measuring import in_turns
from retrieval_work import K

from retrievers.clients.remote import HttpRetriever

_POLL_SECONDS = 0.05
_STOP_SECONDS = 30.0

Say = Callable[[str], None]


@contextmanager
def service(index: str) -> Iterator[str]:
    """Serve an index as a user does, and give the URL. Raises RuntimeError if the service does not start."""
    command = [sys.executable, "-m", "agentrl.cli", "serve-retriever", "--index", index, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    try:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if not said.startswith("serving "):
            raise RuntimeError(f"the service did not start and said {said!r}")
        yield said.rpartition(" ")[2]
    finally:
        _stop(process)


def measure_http(
    url: str, queries: Sequence[str], clients: Sequence[int], rounds: int, requests: dict[int, int], say: Say
) -> dict[int, dict[str, Any]]:
    """Return for each number of clients the seconds of every request and of every round.

    Args:
        url: of the service.
        queries: each is asked once by each number of clients at most.
        clients: how many at once; each sends a request with one query, waits for the answer, and sends the next.
        rounds: in each, the numbers of clients take turns at being first.
        requests: of each number of clients in a round.
        say: told about each round.
    """
    return asyncio.run(_measure_http(url, queries, clients, rounds, requests, say))


async def _measure_http(
    url: str, queries: Sequence[str], clients: Sequence[int], rounds: int, requests: dict[int, int], say: Say
) -> dict[int, dict[str, Any]]:
    rest = iter(queries)
    retrievers = [HttpRetriever(url) for _ in range(max(clients))]
    # Connections are made, and Java warmed up, before anything is measured.
    for _ in range(3):
        await asyncio.gather(*(retriever.search([next(rest)], K) for retriever in retrievers))
    result: dict[int, dict[str, Any]] = {count: {"latencies": [], "seconds": []} for count in clients}
    for number in range(rounds):
        for count in in_turns([str(count) for count in clients], number):
            measured = result[int(count)]
            mine = iter([next(rest) for _ in range(requests[int(count)])])
            began = time.perf_counter()
            found = await asyncio.gather(*(_ask_all(retriever, mine) for retriever in retrievers[: int(count)]))
            measured["seconds"].append(time.perf_counter() - began)
            measured["latencies"] += chain.from_iterable(found)
        rates = (f"{count} clients {requests[count] / result[count]['seconds'][-1]:,.0f}" for count in clients)
        say(f"HTTP round {number + 1} of {rounds}, requests/s: {', '.join(rates)}")
    await asyncio.gather(*(retriever.close() for retriever in retrievers))
    return result


async def _ask_all(retriever: HttpRetriever, queries: Iterator[str]) -> list[float]:
    """Ask what is left of queries that other clients take from too; return the seconds of each request."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        await retriever.search([query], K)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_build(corpus: Path, out: Path) -> dict[str, float]:
    """Build a Lucene index as a user does; return seconds, documents and the most MiB that all its processes had.

    Memory is what is resident, summed over the processes, so that pages they share count several times.

    Raises:
        RuntimeError: if the build fails.
    """
    command = [sys.executable, "-m", "agentrl.cli", "index", "build", "--corpus", str(corpus), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment())
    most = 0
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            most = max(most, _resident_bytes(watched))
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"the build of {out} ended with status {process.returncode}")
    documents = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["documents"]
    return {"seconds": seconds, "documents": documents, "mib": most / 2**20}


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        # One of them has just ended; the next look sees the others.
        pass
    return total


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # On a narrow terminal the service's URL would be broken in two.
    return dict(os.environ) | {"PYTHONPATH": path, "COLUMNS": "200"}


def _stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
