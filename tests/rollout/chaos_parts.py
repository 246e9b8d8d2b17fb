"""A worker with a scripted engine and a retriever that can be made slow, for Ray's processes to import."""

import asyncio
import os
import random
import signal

from scripted import ScriptedEngine

from agentrl.agent.codec import Codec
from agentrl.models import load_tokenizer
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EngineDied
from retrievers.base import Hit


class ScriptedWorker(RolloutWorker):
    """A turn takes some 50 ms, unless a file of the question's name in `orders` tells it to do otherwise, once."""

    def __init__(self, config, indexes, orders):
        super().__init__(config, "", indexes)
        self._orders = orders

    def pid(self):
        return os.getpid()

    def _make_engine(self, model):
        return ScriptedEngine(Codec(load_tokenizer(model)), self._wait)

    async def _wait(self, prompt):
        await asyncio.sleep(random.uniform(0.02, 0.08))
        question = prompt.split("Question:")[-1].split("\n")[0].strip()
        if taken(f"{self._orders}/{question}.kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken(f"{self._orders}/{question}.die"):
            raise EngineDied("the engine died")
        if taken(f"{self._orders}/{question}.hang"):
            await asyncio.Event().wait()


class SlowRetriever:
    """Takes longer than any deadline for each file `delay-*` that it finds, once."""

    def __init__(self, orders):
        self._orders = orders

    def ping(self):
        return os.getpid()

    def pid(self):
        return os.getpid()

    async def search(self, queries, k):
        for name in os.listdir(self._orders):
            if name.startswith("delay-") and taken(f"{self._orders}/{name}"):
                await asyncio.Event().wait()
        return [[Hit("p1", '"There"\nIt is there.', 1.0)] for _ in queries]


def taken(path):
    """Remove a file; return whether it was there."""
    try:
        os.remove(path)
    except FileNotFoundError:
        return False
    return True
