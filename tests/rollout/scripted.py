"""Real rollout workers whose engine is scripted: each episode searches twice and answers, unless an order says otherwise."""

import asyncio
import random
from collections import Counter, defaultdict
from pathlib import Path

from virtual_ray import ProcessExit, unavailable

from agentrl.agent.codec import Codec
from agentrl.config import parse_config
from agentrl.engines.base import Generation
from agentrl.models import load_tokenizer
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EngineDied
from retrievers.base import Hit


class ScriptedEngine:
    """Searches twice, then answers; `wait(prompt)` is awaited in each turn. Remembers what it loaded.

    Attributes:
        versions: of these adapters and models.
        models: the files of each model that it loaded, by name.
        asleep: whether it sleeps, in which it can neither generate nor load.
    """

    trainable = True

    def __init__(self, codec, wait):
        self._codec, self._wait = codec, wait
        self.versions = []
        self.models = []
        self.asleep = False
        self.closed = 0

    async def generate(self, prompt_ids, sampling):
        assert not self.asleep
        version = self.versions[-1] if self.versions else 0
        prompt = self._codec.decode(prompt_ids)
        await self._wait(prompt)
        text = "<search> where </search>" if prompt.count("<information>") < 2 else "<answer> there </answer>"
        ids = tuple(self._codec.encode(text))
        return Generation(ids, (-0.1,) * len(ids), "stop", version)

    async def load_adapter(self, version, files):
        assert not self.asleep
        self.versions.append(version)

    async def load_weights(self, version, folder):
        assert not self.asleep
        self.versions.append(version)
        self.models.append({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    async def sleep(self):
        self.asleep = True

    async def wake(self):
        self.asleep = False

    async def close(self):
        self.closed += 1


class OnePassage:
    """A retriever that finds the same passage for every query, at once."""

    async def search(self, queries, k):
        return [[Hit("p1", '"There"\nIt is there.', 1.0)] for _ in queries]


def make_config(tmp_path, tokenizer, **sections):
    folder = tmp_path / "model"
    if not folder.exists():
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text("{}")
    settings = {
        "name": "scripted",
        "model": {"path": str(folder)},
        "retriever": {"kind": "object", "target": "scripted:OnePassage"},
        "agent": {"instruction": "", "max_episode_tokens": 1024},
    }
    return parse_config(settings | sections, source="test")


class Script:
    """What the scripted workers of a test do, and what they did.

    Attributes:
        turn_seconds: how long a turn takes, or a function of a random generator that draws it.
        orders: by a question's text, what happens in its next turns, one entry a turn: "kill" ends the process, "die" the
            engine, "hang" never answers, "lose" loses the connection, "cut" ends the
            process so that callers only see a lost connection, an exception is raised.
        no_start: whether processes end as soon as they are to be prepared.
        running: how many episodes of each question are in a turn right now.
        begun: the turns begun.
    """

    def __init__(self, ray, config):
        self._ray, self._config = ray, config
        self.turn_seconds = 1.0
        self.orders = defaultdict(list)
        self.no_start = False
        self.running, self.most_running = Counter(), Counter()
        self.begun = 0
        self.busy_seconds = 0.0
        self._rng = random.Random(0)

    def make_worker(self, actor):
        return _Worker(self._config, self, actor)

    async def turn(self, actor, prompt):
        question = prompt.split("Question:")[-1].split("\n")[0].strip()
        self.begun += 1
        self.running[question] += 1
        self.most_running[question] = max(self.most_running[question], self.running[question])
        started = self._ray.monotonic()
        try:
            seconds = self.turn_seconds
            await asyncio.sleep(seconds(self._rng) if callable(seconds) else seconds)
            await self._obey(self.orders[question].pop(0) if self.orders[question] else None, actor)
        finally:
            self.running[question] -= 1
            self.busy_seconds += self._ray.monotonic() - started

    async def _obey(self, order, actor):
        if order == "kill":
            raise ProcessExit
        if order == "die":
            raise EngineDied("the engine died")
        if order == "hang":
            await asyncio.sleep(1e9)
        if order == "lose":
            actor.lose()
        if order == "cut":
            actor.die(unavailable)
        if isinstance(order, Exception):
            raise order


class _Worker(RolloutWorker):
    def __init__(self, config, script, actor):
        super().__init__(config, "", [])
        self._script, self._actor = script, actor

    async def prepare(self, *arguments):
        if self._script.no_start:
            raise ProcessExit
        return await super().prepare(*arguments)

    def _make_engine(self, model):
        self.scripted = ScriptedEngine(
            Codec(load_tokenizer(model)), lambda prompt: self._script.turn(self._actor, prompt)
        )
        return self.scripted
