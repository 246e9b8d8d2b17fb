"""Scripted episodes through agentrl's RolloutPool, with the engine in a rollout worker on Ray, as a run has it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rollout_rivals import hold, replay
from rollout_work import GROUP, SEED, CountingEngine, Lab, Played, Produced, Work, check_script, scripted_agent

from agentrl.agent.codec import Codec
from agentrl.config import AgentConfig, Config, parse_config
from agentrl.engines import environment
from agentrl.engines.base import Engine
from agentrl.models import load_tokenizer
from agentrl.rollout.pool import Request, RolloutPool
from agentrl.rollout.supervisor import Limits
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import Question, Trajectory
from retrievers.base import Hit

# A benchmark waits for its slowest round.
_PATIENCE = 3600.0


class NoPassages:
    """Stands for the retriever until a script brings its own."""

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        raise RuntimeError("no script was given")


class BenchWorker(RolloutWorker):
    """A rollout worker whose episodes follow a script, and which runs the rivals on the same engine."""

    def __init__(self, config: Config, passages: Sequence[Hit]) -> None:
        super().__init__(config, "", [])
        self._passages = passages
        self._produced: dict[int, Produced] = {}

    def _make_engine(self, model: str) -> Engine:
        agent = self._config.agent
        engine = CountingEngine(
            model,
            self._config.engine,
            device="cpu",
            dtype="float32",
            max_tokens=agent.max_episode_tokens,
            lora_rank=16,
            seed=SEED,
        )
        codec = Codec(load_tokenizer(model))
        engine.unsampled = unsampled(codec)
        self._lab = Lab(engine, codec, agent, self._passages, self._config.engine.max_concurrent)
        return engine

    async def follow(self, work: Work, mean_latency: float, agent: AgentConfig) -> None:
        """Have the next episodes follow a script, from an empty prefix cache."""
        await self._lab.engine.forget()
        self._agent, scripted = scripted_agent(self._with(agent), work, mean_latency)
        self._produced = scripted.produced

    async def produced(self) -> dict[int, Produced]:
        """Return the requests that the episodes made, by seed, in the order of asking."""
        return self._produced

    async def run(self, function: Callable[..., Any], agent: AgentConfig, *arguments: Any) -> Any:
        """Run a rival on this worker's engine."""
        return await function(self._with(agent), *arguments)

    def _with(self, agent: AgentConfig) -> Lab:
        lab = self._lab
        return Lab(lab.engine, lab.codec, agent, lab.passages, lab.places)


def unsampled(codec: Codec) -> dict[int, float]:
    """Return logit biases against the ids with which a real model could write a tag that the script does not have."""
    return {number: -100.0 for token, number in codec.tokenizer.get_vocab().items() if "<" in token}


@dataclass(frozen=True, slots=True)
class Bench:
    """The worker, the pool in front of it, and what rivals in this process need to know."""

    worker: Any
    pool: RolloutPool
    codec: Codec
    agent: AgentConfig
    passages: Sequence[Hit]
    questions: Sequence[Question]
    places: int
    clock: Callable[[], float] = time.perf_counter

    def play(self, work: Work, mean_latency: float) -> Played:
        """Play all episodes through the pool; `mean_latency` in seconds."""
        return self.sample(work, mean_latency)[1]

    def sample(self, work: Work, mean_latency: float = 0.0) -> tuple[list[list[Trajectory]], Played]:
        """Play all episodes through the pool, and return them too, group by group."""
        ray.get(self.worker.follow.remote(work, mean_latency, self.agent))
        started = self.clock()
        groups = self.pool.sample(requests(work), 1.0)
        seconds = self.clock() - started
        check_script(work, [trajectory for group in groups for trajectory in group])
        return groups, Played(seconds, ray.get(self.worker.produced.remote()))

    def hold(self, work: Work, mean_latency: float) -> Played:
        """Play all episodes with turn barriers."""
        return self.run(hold, work, mean_latency)

    def replay(self, work: Work, played: Played, *, chained: bool) -> Played:
        """Send the requests of played episodes again, without episodes."""
        return self.run(replay, work, played, chained)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return ray.get(self.worker.run.remote(function, self.agent, *arguments))


def requests(work: Work) -> list[Request]:
    """Return the groups of the script, each with one question."""
    return [(work.questions[first], work.ids[first : first + GROUP]) for first in range(0, len(work.ids), GROUP)]


@contextmanager
def bench(
    model: str, agent: AgentConfig, places: int, threads: int, passages: Sequence[Hit], questions: Sequence[Question]
) -> Iterator[Bench]:
    """Start Ray and one worker with `places`; stop them at the end of the block."""
    config = parse_config(
        {
            "name": "benchmark",
            "model": {"path": model},
            "engine": {"max_concurrent": places, "threads": threads},
            "retriever": {"kind": "object", "target": f"{__name__}:{NoPassages.__name__}"},
            "agent": agent.model_dump(),
            "rollout": {"episode_timeout_seconds": _PATIENCE},
        },
        source="benchmark",
    )
    here = str(Path(__file__).parent)
    variables = environment(config) | {
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
    }
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(BenchWorker).options(max_concurrency=1000, runtime_env={"env_vars": variables})
        worker = actor.remote(config, list(passages))
        process = ray.get(worker.prepare.remote())
        pool = RolloutPool([worker], [process], Limits(places, _PATIENCE, _PATIENCE))
        yield Bench(worker, pool, Codec(load_tokenizer(model)), agent, passages, questions, places)
        ray.get(worker.close.remote())
    finally:
        ray.shutdown()
