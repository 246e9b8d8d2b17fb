"""What benchmarks/rollout.py compares agentrl's rollouts with, on the same engine: turn barriers, requests alone, long turns."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

from rollout_work import (
    PASSAGES,
    SEED,
    TIMEOUT,
    Lab,
    Played,
    Produced,
    ScriptedEngine,
    SlowRetriever,
    Work,
    check_script,
)

from agentrl.agent.episode import Agent
from agentrl.engines.base import Engine, Generation, Sampling
from agentrl.types import Question, Trajectory
from retrievers.base import Hit, Retriever

SEARCH_R1_TURN = 500
"""The tokens that Search-R1 samples a turn before it cuts them at the first tag."""


class Barrier:
    """Lets nobody pass before everyone who has not left is there."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self._waiting = 0
        self._gate = asyncio.Event()

    async def wait(self) -> None:
        self._waiting += 1
        gate = self._gate
        self._open_if_complete()
        await gate.wait()

    def leave(self) -> None:
        self._parties -= 1
        self._open_if_complete()

    def _open_if_complete(self) -> None:
        if self._waiting == self._parties:
            self._gate.set()
            self._gate, self._waiting = asyncio.Event(), 0


class BarrierEngine:
    """An engine whose generations of one turn are all handed out when the last is done."""

    trainable: ClassVar[bool] = False

    def __init__(self, engine: ScriptedEngine, barrier: Barrier) -> None:
        self._engine, self._barrier = engine, barrier

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        generation = await self._engine.generate(prompt_ids, sampling)
        await self._barrier.wait()
        return generation

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        await self._engine.load_adapter(version, files)

    async def close(self) -> None:
        pass


class BarrierRetriever:
    """A retriever whose answers of one turn are all handed out when the last is there."""

    def __init__(self, retriever: Retriever, barrier: Barrier) -> None:
        self._retriever, self._barrier = retriever, barrier

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        hits = await self._retriever.search(queries, k)
        await self._barrier.wait()
        return hits


async def hold(lab: Lab, work: Work, mean_latency: float) -> Played:
    """Play all episodes with turn barriers, from an empty prefix cache; `mean_latency` in seconds.

    Each turn is sampled for all episodes, then all searches are made, then the next turn begins, as Search-R1's generation
    loop does (search_r1/llm_agent/generation.py, commit a14dc3a). The agent is agentrl's. All episodes are in the batch, and
    the engine takes as many requests at once as it has places.
    """
    await lab.engine.forget()
    barrier = Barrier(len(work.ids))
    scripted = ScriptedEngine(lab.engine, work, lab.codec)
    retriever = SlowRetriever(lab.passages, work, mean_latency)
    held = Agent(lab.agent, lab.codec, BarrierEngine(scripted, barrier), BarrierRetriever(retriever, barrier), PASSAGES)

    async def run(question: Question, name: str) -> Trajectory:
        trajectory = await held.run(question, name, temperature=1.0, seed=SEED, timeout=TIMEOUT)
        barrier.leave()
        return trajectory

    now = asyncio.get_running_loop().time
    started = now()
    trajectories = await asyncio.gather(*map(run, work.questions, work.ids))
    seconds = now() - started
    check_script(work, trajectories)
    return Played(seconds, scripted.produced)


async def replay(lab: Lab, work: Work, played: Played, chained: bool) -> Played:
    """Send the requests of played episodes again, from an empty prefix cache, without agents and retriever.

    A chained request waits for the one before it in its episode, and episodes for a place; the others wait for nothing
    and go to the engine in the order of asking.
    """
    await lab.engine.forget()
    produced: dict[int, Produced] = {}

    async def send(seed: int) -> None:
        request = played.produced[seed]
        produced[seed] = await lab.engine.produce(request.prompt_ids, work.steps[seed].tokens, seed)

    places = asyncio.Semaphore(lab.places)
    chains: dict[int, list[int]] = {}
    for seed in played.produced:
        chains.setdefault(work.steps[seed].episode, []).append(seed)

    async def follow(chain: Sequence[int]) -> None:
        async with places:
            for seed in chain:
                await send(seed)

    now = asyncio.get_running_loop().time
    started = now()
    await asyncio.gather(*(map(follow, chains.values()) if chained else map(send, played.produced)))
    return Played(now() - started, produced)


class WordRetriever:
    """Finds the passages that share most words with the query; enough for a model that was trained to search."""

    def __init__(self, passages: Sequence[Hit]) -> None:
        self._passages = [(set(hit.contents.lower().replace('"', " ").split()), hit) for hit in passages]

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self._best(set(query.lower().split()), k) for query in queries]

    def _best(self, words: set[str], k: int) -> list[Hit]:
        scored = [(len(words & own) / (len(own) + 5), hit) for own, hit in self._passages]
        best = sorted(scored, key=lambda pair: -pair[0])[:k]
        return [dataclasses.replace(hit, score=score) for score, hit in best]


class Recorder:
    """An engine that keeps what it was asked for and what it answered."""

    trainable: ClassVar[bool] = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls: list[tuple[list[int], Sampling, Generation]] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        prompt = list(prompt_ids)
        generation = await self._engine.generate(prompt, sampling)
        self.calls.append((prompt, sampling, generation))
        return generation

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        await self._engine.load_adapter(version, files)

    async def close(self) -> None:
        pass


async def cut(lab: Lab, questions: Sequence[Question], adapter: Mapping[str, bytes]) -> dict[str, float]:
    """Run an episode of the adapter for each question, then sample each turn again up to 500 tokens without a stop string."""
    await lab.engine.load_adapter(1, adapter)
    recorder = Recorder(lab.engine)
    agent = Agent(lab.agent, lab.codec, recorder, WordRetriever(lab.passages), 3)
    await asyncio.gather(
        *(
            agent.run(question, f"cut/{number}", temperature=1.0, seed=SEED, timeout=TIMEOUT)
            for number, question in enumerate(questions)
        )
    )
    uncut = await asyncio.gather(
        *(
            lab.engine.generate(prompt, Sampling(SEARCH_R1_TURN, sampling.temperature, (), sampling.seed))
            for prompt, sampling, _ in recorder.calls
        )
    )
    kept = [generation.token_ids for _, _, generation in recorder.calls]
    stopped = sum(map(len, kept))
    whole = sum(len(generation.token_ids) for generation in uncut)
    same = statistics.mean(long.token_ids[: len(short)] == short for short, long in zip(kept, uncut, strict=True))
    return {"turns": len(kept), "stopped": stopped, "cut": whole, "ratio": whole / stopped, "same_kept_ids": same}
