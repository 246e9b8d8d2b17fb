"""Brings up what rollouts need (Ray, the retriever, the engines) and takes it down again, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private import worker as ray_worker
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from agentrl.adapters import adapter_folder, check_tensors
from agentrl.config import Config, ConfigError
from agentrl.engines import environment
from agentrl.models import resolve_model
from agentrl.rollout.devices import engines_need_gpus
from agentrl.rollout.imports import LibrariesFirst
from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.retriever import check_recording, index_actor, make_retriever, retriever_identity
from agentrl.rollout.supervisor import Limits
from agentrl.rollout.worker import RolloutWorker
from agentrl.runs.logs import process_name
from agentrl.types import EnvironmentFailure

_logger = logging.getLogger(__name__)

# Ray counts CPUs to place actors, not to bind them; a laptop's two would not place retriever, engine and trainer.
_LEAST_CPUS = 8
# Beside one for each engine, index and trainer process: what Ray Train and its queues are placed with and give back, and one.
_SPARE_CPUS = 2

_GIB = 2**30

_CONNECT_SECONDS = 10.0
# A socket's path has at most 107 bytes, of which Ray takes the rest for itself.
_SOCKET_FOLDER = 40

_CLOSE_SECONDS = 10.0

# How often what comes up beside the engines is looked at.
_CHECK_SECONDS = 1.0

# An encoder of a dense index may have to be read from a slow disk.
_RETRIEVER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is running. `workers` and `indexes` are Ray actors; there are no indexes where something else is searched."""

    pool: RolloutPool
    workers: list[Any]
    indexes: list[Any]


class Beside(Protocol):
    """What comes up while retriever and engines do, such as a trainer."""

    def start(self) -> None:
        """Start it, and return without waiting for it."""

    def check(self) -> None:
        """Raise whatever has ended it."""


@contextmanager
def cluster(
    config: Config,
    on_phase: Callable[[str], None] = lambda phase: None,
    *,
    beside: Beside | None = None,
    logs: Path | None = None,
    store_bytes: int | None = None,
) -> Iterator[Cluster]:
    """Start Ray, retriever and engines for `config`, and stop them at the end of the block.

    Args:
        on_phase: is told what is being waited for.
        beside: a trainer that needs its place beside them. It starts with the engines, or, where it shares their card, once
            they have taken their part: vLLM measures what is free of the card while it starts.
        logs: the folder that every process writes what it prints into; without one Ray keeps it, and an error that leaves
            the block says where.
        store_bytes: the size of the object store of a Ray on this machine; None takes Ray's own, 30 % of the memory.

    Raises:
        ConfigError: if the GPUs that the config asks for are not there.
        ModelError: if there is no such model, or the adapter does not fit it.
        EnvironmentFailure: if Ray cannot be reached, has too few free CPUs, or a part does not start in time.
        RetrieverError: if the retriever's server does not answer.
        Exception: whatever `beside` raises.
    """
    config.require("retriever")
    on_phase("Ray")
    context = _connect(config, logs, store_bytes)
    workers: list[Any] = []
    try:
        _check_resources(config, beside is not None)
        on_phase("model files")
        _check_model_files(config, on_phase)
        on_phase("retriever")
        # All of them come up side by side.
        indexes = _make_indexes(config)
        starting = _make_workers(config)
        check = _nothing
        starts_beside = beside is not None and not (engines_need_gpus(config) and config.engine.shares_card)
        if starts_beside:
            beside.start()
            check = beside.check
        if config.ray.address is not None:
            on_phase("model files on each machine")
        # A download takes as long as it takes, and is no slow start.
        _await([worker.fetch.remote() for worker in starting], math.inf, "model", check)
        preparing = [worker.prepare.remote() for worker in starting]
        on_phase("retriever")
        _await([actor.ping.remote() for actor in indexes], _RETRIEVER_SECONDS, "retriever", check)
        on_phase(f"{config.rollout.workers} engine(s)")
        processes = _await(preparing, config.start_seconds, "engine", check)
        workers = starting
        if beside is not None and not starts_beside:
            beside.start()
        yield Cluster(RolloutPool(workers, processes, _limits(config)), workers, indexes)
    except Exception as error:
        if logs is None:
            error.add_note(f"what its processes printed: {context.address_info['session_dir']}/logs")
        raise
    finally:
        # Engines keep adapters on the disk, which nobody else removes.
        with suppress(RayError):
            ray.get([worker.close.remote() for worker in workers], timeout=_CLOSE_SECONDS)
        ray.shutdown()


def _check_model_files(config: Config, on_phase: Callable[[str], None]) -> None:
    """Find or download what engines and trainer load, and raise ModelError if the adapter does not fit the model."""
    # The machines of a cluster download for themselves, and this one may be none of them.
    weights = config.engine.kind != "openai" and config.ray.address is None
    model = resolve_model(
        config.model.path,
        weights=weights,
        on_bytes=lambda done, total: on_phase(f"model files ({done / _GIB:.1f} of {total / _GIB:.1f} GiB)"),
    )
    adapter = adapter_folder(config)
    if adapter is not None:
        check_tensors(adapter, model)


def _connect(config: Config, logs: Path | None, store_bytes: int | None) -> Any:
    """Start Ray, or join the cluster at `ray.address`, and return its context."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would run engine and trainer at the lowest priority, behind whatever else the machine does.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, this is how Ray spells it
    on_terminate = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "job_config": LibrariesFirst(logs),
    }
    # What Ray reports of processes that died goes to standard output otherwise, whatever `log_to_driver` says.
    ray_worker.print_to_stdstream = _log_report
    address = config.ray.address
    if address is not None:
        _check_listening(address)
        # How often Ray tries to connect, about 40 s each time; 20 times is its default.
        os.environ["RAY_gcs_server_port_wait_time_s"] = "1"  # noqa: SIM112, this is how Ray spells it
    try:
        if address is None:
            trainers = 1 if config.training is None else config.training.workers
            actors = config.rollout.workers + len(config.retriever.indexes) + trainers
            context = ray.init(
                # Without "local" Ray joins whatever cluster it finds on this machine.
                address="local",
                num_cpus=max(_LEAST_CPUS, os.cpu_count() or 1, actors + _SPARE_CPUS),
                include_dashboard=False,
                object_store_memory=store_bytes,
                **common,
            )
        else:
            context = ray.init(address=address, **common)
    except Exception as error:
        raise EnvironmentFailure(_start_problem(address, error)) from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own in place that prints a stack trace and skips our clean-up.
        signal.signal(signal.SIGTERM, on_terminate)
    return context


def _log_report(report: Mapping[str, Any], **options: Any) -> None:
    for line in report["lines"]:
        _logger.info("Ray's %s: %s", report["pid"], line)


def _check_listening(address: str) -> None:
    """Raise EnvironmentFailure if nothing listens at an address with a port; Ray would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    # A port beyond 65535 overflows.
    except (OSError, OverflowError) as error:
        raise EnvironmentFailure(
            f"ray.address {address}: nothing listens there ({error}); start a cluster with `ray start --head`, or correct "
            "the address"
        ) from error


def _start_problem(address: str | None, error: Exception) -> str:
    """Say why there is no Ray, and what to set."""
    if address is not None:
        return (
            f"ray.address {address}: cannot connect: {error}. If the cluster uses token authentication, set RAY_AUTH_MODE to "
            "token and RAY_AUTH_TOKEN to its token; else check that it runs, and runs the same version of Ray and Python"
        )
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "AF_UNIX" in str(error):
        return (
            f"Ray keeps its sockets in {folder}, a name too long for them; set RAY_TMPDIR to a folder with a name of at most "
            f"{_SOCKET_FOLDER} characters, such as /tmp"
        )
    return (
        f"Ray did not start: {error} It needs half a minute of a machine that is not too busy, and room in {folder}; set "
        "RAY_TMPDIR to a folder on a fast local disk, or ray.address to a cluster that runs"
    )


def _check_resources(config: Config, trains: bool) -> None:
    free = ray.available_resources()
    workers, indexes = config.rollout.workers, len(config.retriever.indexes)
    trainers = config.training.workers if trains else 0
    parts = f"{workers} engine(s), {indexes} index(es)" + (f" and {trainers} trainer(s)" if trains else "")
    needs_gpus = engines_need_gpus(config)
    gpus = indexes * config.retriever.gpus
    if needs_gpus:
        gpus += workers * config.engine.gpus + trainers * config.trainer_gpus
    if free.get("GPU", 0) < round(gpus, 4):
        hint = f"; on a machine without GPUs use {config.cpu_config}" if config.cpu_config else ""
        raise ConfigError(
            f"config {config.name!r} needs {gpus:g} GPUs ({parts}), and Ray has {free.get('GPU', 0):g} free{hint}"
        )
    # The trainer's queues need a CPU until they are placed, which its processes are after them.
    cpus = indexes + (0 if needs_gpus else workers) + trainers
    if free.get("CPU", 0) < cpus:
        raise EnvironmentFailure(
            f"config {config.name!r} needs {cpus} CPUs ({parts}), and the cluster at ray.address {config.ray.address} has "
            f"{free.get('CPU', 0):g} free; free some, add a node, or lower rollout.workers"
        )


def _make_indexes(config: Config) -> list[Any]:
    settings = config.retriever
    check_recording(settings)
    if settings.kind == "http" and settings.replay is None:
        asyncio.run(_probe(config))
    names = _index_names(config)
    return [index_actor(config, index, name) for index, name in zip(settings.indexes, names, strict=True)]


async def _probe(config: Config) -> None:
    """Raise RetrieverError now, rather than in the first episode, if the server does not search."""
    bare = config.retriever.model_copy(update={"cache": None, "record": None, "rerank": None})
    retriever: Any = make_retriever(bare, config.data, "", [])
    try:
        await retriever.search(["ready?"], 1)
    finally:
        await retriever.close()


def _index_names(config: Config) -> list[str]:
    return [f"index-{number}" for number in range(len(config.retriever.indexes))]


def _make_workers(config: Config) -> list[Any]:
    resources = {"num_gpus": config.engine.gpus} if engines_need_gpus(config) else {"num_cpus": 1}
    worker = ray.remote(RolloutWorker)
    identity = "" if config.retriever.replay is not None else retriever_identity(config.retriever, config.data)
    return [
        worker.options(
            max_concurrency=1000,
            # The pool counts deaths and ends the run when there are too many.
            max_restarts=-1,
            runtime_env={"env_vars": environment(config) | process_name(f"engine-{number}")},
            **resources,
        ).remote(config, identity, _index_names(config))
        for number in range(config.rollout.workers)
    ]


def _nothing() -> None:
    pass


def _limits(config: Config) -> Limits:
    rollout = config.rollout
    return Limits(
        places=config.engine.max_concurrent,
        episode_seconds=rollout.episode_timeout_seconds,
        start_seconds=config.start_seconds,
        reward_seconds=rollout.reward_timeout_seconds,
        max_failures=rollout.max_failures,
        window_seconds=rollout.failure_window_seconds,
    )


def _await(references: Sequence[Any], timeout: float, what: str, check: Callable[[], None]) -> list[Any]:
    """Return the results within `timeout` seconds, or raise why there are none, or what `check` raises meanwhile."""
    end = time.monotonic() + timeout
    while True:
        check()
        left = end - time.monotonic()
        try:
            return ray.get(references, timeout=max(0.0, min(left, _CHECK_SECONDS)))
        except GetTimeoutError as error:
            if left <= _CHECK_SECONDS:
                raise EnvironmentFailure(f"the {what} did not start within {timeout:g} s") from error
        except RayTaskError as error:
            # The task's own error has the worker's traceback for its text.
            raise error.cause from error
        except RayActorError as error:
            # Of a constructor that raised, Ray keeps the traceback as text; its last line is the error itself.
            reason = str(error).strip().splitlines()[-1]
            raise EnvironmentFailure(f"the {what} died while it started: {reason}") from error
