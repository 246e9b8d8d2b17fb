"""Brings up what rollouts need (Ray, the retriever, the engines) and takes it down again, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from agentrl.adapters import adapter_folder, check_tensors
from agentrl.config import Config, ConfigError
from agentrl.engines import environment
from agentrl.models import resolve_model
from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.retriever import index_actor, make_retriever, retriever_identity
from agentrl.rollout.supervisor import Limits
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EnvironmentFailure

# Ray counts CPUs to place actors, not to bind them; a laptop's two would not place retriever, engine and trainer.
_LEAST_CPUS = 8
# Ray Train's worker, the queue of its progress, and one to spare.
_TRAINER_CPUS = 3

_CLOSE_SECONDS = 10.0

# An encoder of a dense index may have to be read from a slow disk.
_RETRIEVER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is running. `workers` and `indexes` are Ray actors; there are no indexes where something else is searched."""

    pool: RolloutPool
    workers: list[Any]
    indexes: list[Any]


@contextmanager
def cluster(
    config: Config, on_phase: Callable[[str], None] = lambda phase: None, *, trains: bool = False
) -> Iterator[Cluster]:
    """Start Ray, retriever and engines for `config`, and stop them at the end of the block.

    `on_phase` is told what is being waited for; `trains` says that a trainer will need its place beside them.

    Raises:
        ConfigError: if the device that the config asks for is not there.
        ModelError: if there is no such model, or the adapter does not fit it.
        EnvironmentFailure: if a part does not start in time.
        RetrieverError: if the retriever's server does not answer.
    """
    config.require("retriever")
    on_phase("Ray")
    _connect(config)
    workers: list[Any] = []
    try:
        _check_device(config, trains)
        on_phase("model files")
        _check_model_files(config)
        on_phase("retriever")
        indexes = _start_indexes(config)
        on_phase(f"{config.rollout.workers} engine(s)")
        workers, processes = _start_workers(config)
        yield Cluster(RolloutPool(workers, processes, _limits(config)), workers, indexes)
    finally:
        # Engines keep adapters on the disk, which nobody else removes.
        with suppress(RayError):
            ray.get([worker.close.remote() for worker in workers], timeout=_CLOSE_SECONDS)
        ray.shutdown()


def _check_model_files(config: Config) -> None:
    """Find or download what engines and trainer load, and raise ModelError if the adapter does not fit the model."""
    # The machines of a cluster download for themselves, and this one may be none of them.
    weights = config.engine.kind != "openai" and config.ray.address is None
    model = resolve_model(config.model.path, weights=weights)
    adapter = adapter_folder(config)
    if adapter is not None:
        check_tensors(adapter, model)


def _connect(config: Config) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would run engine and trainer at the lowest priority, behind whatever else the machine does.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, this is how Ray spells it
    on_terminate = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.ray.address is None:
            actors = config.rollout.workers + len(config.retriever.indexes)
            ray.init(
                # Without "local" Ray joins whatever cluster it finds on this machine.
                address="local",
                num_cpus=max(_LEAST_CPUS, os.cpu_count() or 1, actors + _TRAINER_CPUS),
                include_dashboard=False,
                **common,
            )
        else:
            ray.init(address=config.ray.address, **common)
    except (ConnectionError, TimeoutError) as error:
        raise EnvironmentFailure(f"ray.address {config.ray.address}: cannot connect: {error}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own in place that prints a stack trace and skips our clean-up.
        signal.signal(signal.SIGTERM, on_terminate)


def _check_device(config: Config, trains: bool) -> None:
    if not _engines_need_gpus(config):
        return
    gpus = ray.cluster_resources().get("GPU", 0)
    engines, indexes = config.rollout.workers * config.engine.gpus, len(config.retriever.indexes)
    wanted = engines + indexes * config.retriever.gpus + trains
    if gpus < wanted:
        hint = f"; on a machine without GPUs use {config.cpu_config}" if config.cpu_config else ""
        what = "engines, indexes and trainer" if trains else "engines and indexes"
        raise ConfigError(f"config {config.name!r} needs {wanted:g} GPUs ({what}), Ray sees {gpus:g}{hint}")


def _engines_need_gpus(config: Config) -> bool:
    return config.device == "cuda" and config.engine.kind != "openai"


def _start_indexes(config: Config) -> list[Any]:
    settings = config.retriever
    if settings.kind == "http" and settings.replay is None:
        asyncio.run(_probe(config))
    names = _index_names(config)
    actors = [index_actor(config, index, name) for index, name in zip(settings.indexes, names, strict=True)]
    _await([actor.ping.remote() for actor in actors], _RETRIEVER_SECONDS, "retriever")
    return actors


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


def _start_workers(config: Config) -> tuple[list[Any], list[str]]:
    resources = {"num_gpus": config.engine.gpus} if _engines_need_gpus(config) else {"num_cpus": 1}
    worker = ray.remote(RolloutWorker).options(
        max_concurrency=1000,
        # The pool counts deaths and ends the run when there are too many.
        max_restarts=-1,
        runtime_env={"env_vars": environment(config)},
        **resources,
    )
    identity = "" if config.retriever.replay is not None else retriever_identity(config.retriever, config.data)
    workers = [worker.remote(config, identity, _index_names(config)) for _ in range(config.rollout.workers)]
    return workers, _await([w.prepare.remote() for w in workers], config.engine.start_timeout_seconds, "engine")


def _limits(config: Config) -> Limits:
    rollout = config.rollout
    return Limits(
        places=config.engine.max_concurrent,
        episode_seconds=rollout.episode_timeout_seconds,
        start_seconds=config.engine.start_timeout_seconds,
        max_failures=rollout.max_failures,
        window_seconds=rollout.failure_window_seconds,
    )


def _await(references: list[Any], timeout: float, what: str) -> list[Any]:
    try:
        return ray.get(references, timeout=timeout)
    except GetTimeoutError as error:
        raise EnvironmentFailure(f"the {what} did not start within {timeout:g} s") from error
    except RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except RayActorError as error:
        # Of a constructor that raised, Ray keeps the traceback as text; its last line is the error itself.
        reason = str(error).strip().splitlines()[-1]
        raise EnvironmentFailure(f"the {what} died while it started: {reason}") from error
