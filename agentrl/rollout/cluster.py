"""Brings up what rollouts need (Ray, the retriever, the engines) and takes it down again, whatever happens."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from agentrl.config import Config, ConfigError, RetrieverConfig
from agentrl.engines.vllm import environment
from agentrl.models import resolve_model
from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EnvironmentFailure
from retrievers.remote import HttpRetriever

# Ray counts CPUs to place actors, not to bind them; a laptop's two would not place retriever, engine and trainer.
_LEAST_CPUS = 8


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is running. `workers` and `retriever` are Ray actors; `retriever` is None where it is a server elsewhere."""

    pool: RolloutPool
    workers: list[Any]
    retriever: Any | None


@contextmanager
def cluster(config: Config, on_phase: Callable[[str], None] = lambda phase: None) -> Iterator[Cluster]:
    """Start Ray, retriever and engines for `config`, and stop them at the end of the block.

    `on_phase` is told what is being waited for.

    Raises:
        ConfigError: if the device that the config asks for is not there.
        EnvironmentFailure: if a part does not start in time.
        RetrieverError: if the retriever's server does not answer.
    """
    config.require("retriever")
    on_phase("model files")
    resolve_model(config.model.path)
    on_phase("Ray")
    _connect(config)
    try:
        _check_device(config)
        on_phase("retriever")
        retriever = _start_retriever(config)
        on_phase(f"{config.rollout.workers} engine(s)")
        workers = _start_workers(config, retriever)
        deadline = config.rollout.episode_timeout_seconds + 60.0
        yield Cluster(RolloutPool(workers, deadline), workers, retriever)
    finally:
        ray.shutdown()


def _connect(config: Config) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would run engine and trainer at the lowest priority, behind whatever else the machine does.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, this is how Ray spells it
    on_terminate = signal.getsignal(signal.SIGTERM)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.ray.address is None:
            ray.init(
                # Without "local" Ray joins whatever cluster it finds on this machine.
                address="local",
                num_cpus=max(_LEAST_CPUS, os.cpu_count() or 1),
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


def _check_device(config: Config) -> None:
    gpus = ray.cluster_resources().get("GPU", 0)
    wanted = config.rollout.workers * config.engine.gpus + 1
    if config.device == "cuda" and gpus < wanted:
        hint = f"; on a machine without GPUs use {config.cpu_config}" if config.cpu_config else ""
        raise ConfigError(f"config {config.name!r} needs {wanted} GPUs (engines and trainer), Ray sees {gpus:g}{hint}")


def _start_retriever(config: Config) -> Any | None:
    settings = config.retriever
    if settings.kind == "http":
        asyncio.run(_probe(settings))
        return None
    # Imported by Ray's worker alone: this module must not load Java's bridge where torch is.
    from retrievers.lucene import LuceneRetriever

    actor = (
        ray.remote(LuceneRetriever)
        .options(num_cpus=1, max_restarts=3, max_concurrency=1000)
        .remote(
            str(config.data.resolve(settings.index).absolute()),
            k1=settings.k1,
            b=settings.b,
            threads=settings.threads,
            heap=settings.heap,
        )
    )
    _await([actor.ping.remote()], 120.0, "retriever")
    return actor


async def _probe(settings: RetrieverConfig) -> None:
    """Raise RetrieverError now, rather than in the first episode, if the server does not search."""
    retriever = HttpRetriever(settings.url, settings.timeout_seconds, settings.retries)
    try:
        await retriever.search(["ready?"], 1)
    finally:
        await retriever.close()


def _start_workers(config: Config, retriever: Any | None) -> list[Any]:
    resources = {"num_gpus": config.engine.gpus} if config.device == "cuda" else {"num_cpus": 1}
    worker = ray.remote(RolloutWorker).options(
        max_concurrency=1000,
        runtime_env={"env_vars": environment(config.engine, config.device)},
        **resources,
    )
    workers = [worker.remote(config, retriever) for _ in range(config.rollout.workers)]
    _await([w.start.remote() for w in workers], config.engine.start_timeout_seconds, "engine")
    return workers


def _await(references: list[Any], timeout: float, what: str) -> None:
    try:
        ray.get(references, timeout=timeout)
    except GetTimeoutError as error:
        raise EnvironmentFailure(f"the {what} did not start within {timeout:g} s") from error
    except RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except RayActorError as error:
        # Of a constructor that raised, Ray keeps the traceback as text; its last line is the error itself.
        reason = str(error).strip().splitlines()[-1]
        raise EnvironmentFailure(f"the {what} died while it started: {reason}") from error
