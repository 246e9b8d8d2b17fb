"""RolloutWorker: a Ray actor with one engine that runs the episodes of whole groups, all at once."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import ray

from agentrl.adapters import WeightFiles, is_model
from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent, report
from agentrl.config import Config
from agentrl.engines import make_engine
from agentrl.engines.base import Engine, Generation, Sampling
from agentrl.engines.scratch import ScratchFolder
from agentrl.models import load_tokenizer, resolve_model
from agentrl.rewards import Rewards
from agentrl.rollout.devices import check_granted, engines_need_gpus
from agentrl.rollout.retriever import make_retriever
from agentrl.types import EngineDied, EnvironmentFailure, FailureCause, Question, Trajectory
from retrievers.base import Retriever, RetrieverError


class RolloutWorker:
    """Made through `ray.remote(RolloutWorker)`; every method runs in the actor's event loop."""

    def __init__(self, config: Config, identity: str, indexes: Sequence[str]) -> None:
        """`indexes` are the names of the Ray actors of `config.retriever.indexes`; `identity` as of `retriever_identity`."""
        self._config = config
        self._rewards = Rewards(config.reward, config.rollout.reward_timeout_seconds)
        self._retriever: Any = self._make_retriever(identity, indexes)
        self._contexts = AsyncExitStack()
        self._agent: Agent | None = None
        self._engine: _Watched | None = None
        self._version: int | None = None
        self._preparing = asyncio.Lock()
        # A process id may come again on another machine.
        self._process = uuid.uuid4().hex
        self._unfit = self._asleep = False

    async def fetch(self) -> None:
        """Download to this machine what the engine loads, if it is not there. That may take any time.

        Raises:
            ModelError: if there is no such model.
        """
        await asyncio.to_thread(self._resolve_model)

    async def prepare(
        self,
        version: int | None = None,
        files: WeightFiles | None = None,
        ended: str = "",
        asleep: bool = False,
    ) -> str:
        """Start the engine if it does not run, load weights that are newer than the engine's, and name this process.

        Then the engine sleeps, or is awake, as `asleep` says.

        Ray makes this actor anew when its process ends; the same call then brings it back to where it was. Without a
        version the engine keeps what it has, at first the model alone. `ended` names a process that the pool has given up.
        If it is this one, or if this one could not start its engine before, the process ends now, and Ray repeats the call
        in the next.

        Raises:
            EngineDied: if engine or retriever do not start.
            EnvironmentFailure: if the weights cannot be loaded, or the engine cannot sleep or wake.
        """
        if ended == self._process or self._unfit:
            os._exit(1)
        async with self._preparing:
            if self._engine is None:
                try:
                    await self._start()
                except EngineDied:
                    self._unfit = True
                    raise
            # Ray may repeat an old call after a newer one was answered.
            newer = version is not None and (self._version is None or version > self._version)
            if self._asleep and (newer or not asleep):
                await self._engine.wake()
                self._asleep = False
            if newer:
                await self._load(version, files)
                self._version = version
            if asleep and not self._asleep:
                await self._engine.sleep()
                self._asleep = True
        return self._process

    async def _load(self, version: int, files: WeightFiles) -> None:
        if not is_model(files):
            await self._engine.load_adapter(version, files)
            return
        # Ray keeps the files for as long as an engine may have to start again, so these are needed for the moment alone.
        scratch = ScratchFolder()
        try:
            await asyncio.to_thread(_write, files, scratch.path)
            await self._engine.load_weights(version, str(scratch.path))
        finally:
            scratch.close()

    async def _start(self) -> None:
        config = self._config
        self._check_devices()
        # Some retrievers hold a connection or a process for as long as they are used.
        if isinstance(self._retriever, AbstractAsyncContextManager):
            try:
                await self._contexts.enter_async_context(self._retriever)
            except RetrieverError as error:
                # As for an engine that does not start, the pool tries again.
                raise EngineDied(f"its retriever does not start: {error}") from error
        model = self._resolve_model()
        self._engine = _Watched(self._make_engine(model))
        self._slots = asyncio.Semaphore(config.engine.max_concurrent)
        codec = Codec(load_tokenizer(model))
        self._agent = Agent(config.agent, codec, self._engine, self._retriever, config.retriever.k)

    def _resolve_model(self) -> str:
        # Here, because each machine of a cluster has its own disk.
        return resolve_model(self._config.model.path, weights=self._config.engine.kind != "openai")

    def _make_retriever(self, identity: str, indexes: Sequence[str]) -> Retriever:
        # By name: Ray does not promise to make an actor anew whose arguments refer to other objects.
        actors = [ray.get_actor(name) for name in indexes]
        return make_retriever(self._config.retriever, self._config.data, identity, actors)

    def _check_devices(self) -> None:
        if engines_need_gpus(self._config):
            check_granted("a rollout worker", self._config.engine.gpus)

    def _make_engine(self, model: str) -> Engine:
        return make_engine(self._config, model)

    async def rollout(
        self, question: Question, episode_ids: Sequence[str], temperature: float, rewarded: bool = True
    ) -> list[Trajectory]:
        """Run one episode for each id and, where they are `rewarded`, score them.

        Of all groups together, as many episodes run as the engine has places; one that is being scored has given up its
        place. An episode whose reward fails ends as environment failure, with the traceback.

        Raises:
            EngineDied: if the engine died meanwhile; none of these episodes counts.
        """
        if self._agent is None:
            raise EngineDied("this worker has no engine: it was made anew and not prepared")
        trajectories = await asyncio.gather(*(self._run(question, i, temperature, rewarded) for i in episode_ids))
        if self._engine.death is not None:
            raise EngineDied(self._engine.death)
        return trajectories

    async def close(self) -> None:
        """Stop engine and retriever, if there are any, close the rewards, and remove what the engine keeps on the disk."""
        try:
            await self._contexts.aclose()
            await self._rewards.close()
        finally:
            if self._engine is not None:
                await self._engine.close()

    async def _run(self, question: Question, episode_id: str, temperature: float, rewarded: bool) -> Trajectory:
        # An episode's time begins when the episode has a place; else one that waits long for a place would have no time left.
        async with self._slots:
            played = await self._agent.run(
                question,
                episode_id,
                temperature=temperature,
                seed=self._config.seed,
                timeout=self._config.rollout.episode_timeout_seconds,
            )
        return await self._scored(played) if rewarded and played.valid else played

    async def _scored(self, trajectory: Trajectory) -> Trajectory:
        """Return the episode with its reward."""
        try:
            return await self._rewards.score(trajectory)
        except EnvironmentFailure as error:
            return trajectory.failed(FailureCause.REWARD, f"the reward failed: {error}")
        except Exception as error:  # noqa: BLE001, a reward is a user's code
            told = report(error).partition("\n")[2]
            return trajectory.failed(FailureCause.CODE, f"the reward failed: {error}\n{told}")


def _write(files: WeightFiles, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


class _Watched:
    """An engine that remembers that it died: to its episodes the death is one failure among others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.death: str | None = None

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        try:
            return await self._engine.generate(prompt_ids, sampling)
        except EngineDied as error:
            self.death = str(error)
            raise

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        await self._engine.load_adapter(version, files)

    async def load_weights(self, version: int, folder: str) -> None:
        await self._engine.load_weights(version, folder)

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def close(self) -> None:
        await self._engine.close()
