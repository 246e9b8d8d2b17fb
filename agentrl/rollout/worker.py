"""RolloutWorker: a Ray actor with one engine that runs the episodes of whole groups, all at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent
from agentrl.config import Config
from agentrl.models import load_tokenizer, resolve_model
from agentrl.rewards import REWARDS
from agentrl.rollout.retrieval import ActorRetriever
from agentrl.types import Question, Trajectory
from retrievers.base import Retriever
from retrievers.remote import HttpRetriever


class RolloutWorker:
    """Made through `ray.remote(RolloutWorker)`; every method runs in the actor's event loop."""

    def __init__(self, config: Config, retriever: Any) -> None:
        """`retriever` is a Ray actor with `search`, or None where the config names a server."""
        self._config = config
        settings = config.retriever
        self._retriever: Retriever = (
            HttpRetriever(settings.url, settings.timeout_seconds, settings.retries)
            if settings.kind == "http"
            else ActorRetriever(retriever, settings)
        )
        self._agent: Agent | None = None

    async def start(self) -> int:
        """Start the engine and return the actor's process id."""
        from agentrl.engines.vllm import VllmEngine

        config = self._config
        # Resolved here because each machine of a cluster has its own disk.
        model = resolve_model(config.model.path)
        engine = VllmEngine(
            model,
            config.engine,
            device=config.device,
            dtype=config.model.dtype,
            max_tokens=config.agent.max_episode_tokens,
            lora_rank=config.model.lora.rank,
            seed=config.seed,
        )
        self._engine = engine
        self._slots = asyncio.Semaphore(config.engine.max_concurrent)
        self._agent = Agent(config.agent, Codec(load_tokenizer(model)), engine, self._retriever, config.retriever.k)
        return os.getpid()

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        await self._engine.load_adapter(version, files)

    async def rollout(self, question: Question, episode_ids: Sequence[str], temperature: float) -> list[Trajectory]:
        """Run one episode for each id, as many at once as the engine has places for, and score them."""
        if self._agent is None:
            raise RuntimeError("call start() before rollout()")
        reward = REWARDS[self._config.reward.kind]
        trajectories = await asyncio.gather(*(self._run(question, i, temperature) for i in episode_ids))
        return [t.with_reward(reward(t)) if t.valid else t for t in trajectories]

    async def _run(self, question: Question, episode_id: str, temperature: float) -> Trajectory:
        # An episode's time begins when it has a place, or the last of a long queue would run out of it while they wait.
        async with self._slots:
            return await self._agent.run(
                question,
                episode_id,
                temperature=temperature,
                seed=self._config.seed,
                timeout=self._config.rollout.episode_timeout_seconds,
            )
