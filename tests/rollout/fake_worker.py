"""A rollout worker without an engine, in a module of its own so that Ray's processes can import it."""

import asyncio
import os
import signal

from fakes import make_episode

from agentrl.types import EngineDied


class Worker:
    """Runs an episode in `seconds`, unless a file of the question's name in `orders` tells it to do otherwise, once."""

    def __init__(self, orders, seconds):
        self._orders, self._seconds = orders, seconds
        self._version = None
        self._ready = False

    async def prepare(self, version=None, files=None):
        if os.path.exists(f"{self._orders}/no-start"):
            os.kill(os.getpid(), signal.SIGKILL)
        self._ready, self._version = True, version if version is not None else self._version
        return os.getpid()

    async def rollout(self, question, episode_ids, temperature):
        assert self._ready, "an actor that was made anew was used before it was prepared"
        order = self._take(question.id)
        await asyncio.sleep(self._seconds)
        if order == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "die":
            raise EngineDied("the engine died")
        if order == "hang":
            await asyncio.sleep(1000)
        if order == "bug":
            raise ValueError("a bug")
        return [make_episode(name, question, reward=float(self._version or 0)) for name in episode_ids]

    def _take(self, name):
        path = f"{self._orders}/{name}"
        for order in ("kill", "die", "hang", "bug", "always-kill"):
            if os.path.exists(f"{path}.{order}"):
                if order == "always-kill":
                    return "kill"
                os.remove(f"{path}.{order}")
                return order
        return None
