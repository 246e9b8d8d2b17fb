"""Rollouts in this process, without Ray: what a look at a small policy needs, ready within seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from agentrl.adapters import WeightFiles, adapter_folder, check_tensors
from agentrl.config import Config, with_setting
from agentrl.engines import check_device
from agentrl.models import resolve_model
from agentrl.rollout.pool import Request
from agentrl.rollout.retriever import index_options, retriever_identity, retriever_over
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import Trajectory
from retrievers.backends import open_index
from retrievers.base import Retriever


def local_config(config: Config) -> Config:
    """Return `config` with an engine that can run beside an index in one process and starts soon: transformers for vLLM."""
    if config.engine.kind != "vllm":
        return config
    return with_setting(config, "engine.kind", "transformers", source="--quick")


class LocalPool:
    """What `RolloutPool` is to a cluster: the same methods, for one worker in this process and its event loop."""

    def __init__(self, worker: RolloutWorker, runner: asyncio.Runner) -> None:
        self._worker, self._runner = worker, runner

    def publish(self, version: int, files: WeightFiles) -> None:
        """Load an adapter or a model. Raises EnvironmentFailure if it cannot be loaded."""
        self._runner.run(self._worker.prepare(version, files))

    def sample(
        self,
        requests: Sequence[Request],
        temperature: float,
        on_done: Callable[[int], None] = lambda done: None,
        on_stall: Callable[[str], None] = lambda message: None,
        rewarded: bool = True,
    ) -> list[list[Trajectory]]:
        """See `RolloutPool.sample`; `on_stall` is never called. Raises EngineDied if the engine does."""
        return self._runner.run(self._sample(requests, temperature, on_done, rewarded))

    async def _sample(
        self, requests: Sequence[Request], temperature: float, on_done: Callable[[int], None], rewarded: bool
    ) -> list[list[Trajectory]]:
        done = 0

        async def roll_out(request: Request) -> list[Trajectory]:
            nonlocal done
            group = await self._worker.rollout(*request, temperature, rewarded)
            done += len(group)
            on_done(done)
            return group

        return await asyncio.gather(*map(roll_out, requests))


@contextmanager
def local_pool(config: Config, on_phase: Callable[[str], None] = lambda phase: None) -> Iterator[LocalPool]:
    """Start engine and retriever of a config of `local_config` in this process, and stop them at the end of the block.

    Raises:
        ConfigError: if the config wants a GPU and there is none.
        ModelError: if there is no such model, or the adapter does not fit it.
        EngineDied, RetrieverError: if a part does not start.
    """
    config.require("retriever")
    check_device(config)
    on_phase("model files")
    adapter = adapter_folder(config)
    model = resolve_model(config.model.path, weights=config.engine.kind != "openai")
    if adapter is not None:
        check_tensors(adapter, model)
    with asyncio.Runner() as runner:
        on_phase("retriever")
        identity = "" if config.retriever.replay is not None else retriever_identity(config.retriever, config.data)
        with ExitStack() as opened:
            worker = _LocalWorker(config, identity, opened)
            try:
                on_phase("engine")
                runner.run(worker.prepare())
                yield LocalPool(worker, runner)
            finally:
                runner.run(worker.close())


class _LocalWorker(RolloutWorker):
    """Opens its indexes itself, and leaves it to `opened` to close them."""

    def __init__(self, config: Config, identity: str, opened: ExitStack) -> None:
        self._opened = opened
        super().__init__(config, identity, ())

    def _check_devices(self) -> None:
        """This process has all the cards of the machine, and shares them with nobody."""

    def _make_retriever(self, identity: str, indexes: Sequence[str]) -> Retriever:
        config, settings, data = self._config, self._config.retriever, self._config.data
        # What is replayed needs no index.
        searched = settings.indexes if settings.replay is None else []
        opened = [
            self._opened.enter_context(
                closing(open_index(data.resolve_index(index.index), **index_options(config, index)))
            )
            for index in searched
        ]
        return retriever_over(settings, data, identity, opened)
