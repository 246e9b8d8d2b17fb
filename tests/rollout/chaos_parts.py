"""A worker with a scripted engine and a retriever that can be made slow, for Ray's processes to import."""

import asyncio
import os
import random

from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent
from agentrl.engines.base import Generation
from agentrl.models import load_tokenizer
from agentrl.rollout.worker import RolloutWorker, _Watched
from retrievers.base import Hit


class Scripted:
    """Searches twice, then answers; a turn takes some 50 ms."""

    def __init__(self, codec):
        self._codec = codec

    async def generate(self, prompt_ids, sampling):
        await asyncio.sleep(random.uniform(0.02, 0.08))
        seen = self._codec.decode(prompt_ids).count("<information>")
        text = "<search> where </search>" if seen < 2 else "<answer> there </answer>"
        ids = tuple(self._codec.encode(text))
        return Generation(ids, (-0.1,) * len(ids), "stop", 0)


class ScriptedWorker(RolloutWorker):
    def _start(self):
        config = self._config
        codec = Codec(load_tokenizer(config.model.path))
        self._engine = _Watched(Scripted(codec))
        self._slots = asyncio.Semaphore(config.engine.max_concurrent)
        self._agent = Agent(config.agent, codec, self._engine, self._retriever, config.retriever.k)


class SlowRetriever:
    """Takes longer than any deadline for each file `delay-*` that it finds, once."""

    def __init__(self, orders):
        self._orders = orders

    def ping(self):
        return os.getpid()

    async def search(self, queries, k):
        for name in os.listdir(self._orders):
            if name.startswith("delay-"):
                try:
                    os.remove(f"{self._orders}/{name}")
                except FileNotFoundError:
                    continue
                await asyncio.sleep(60)
        return [[Hit("p1", '"There"\nIt is there.', 1.0)] for _ in queries]
