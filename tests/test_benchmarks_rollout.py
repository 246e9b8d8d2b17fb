"""The benchmark of rollouts compares equal work: the same requests and ids with barriers and without."""

import asyncio
import dataclasses
import random
import time

import pytest
from rollout import equal_turns, reuse
from rollout_work import Barrier, Lab, Produced, WordRetriever, make_work, play, replay

from agentrl.config import AgentConfig
from agentrl.types import Question
from retrievers.base import Hit

PASSAGES = [Hit(f"p{i}", f'"T{i}"\nwords of passage {i}', 1.0) for i in range(9)]


class FakeProducer:
    """Takes a millisecond a token; its cache holds the prompts that it has seen whole."""

    def __init__(self):
        self.forgotten = self.most = self.now = 0

    async def produce(self, prompt_ids, tokens, seed):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(tokens / 1000)
        self.now -= 1
        rng = random.Random(f"{seed} {list(prompt_ids)}")
        return Produced(seed, tuple(prompt_ids), tuple(rng.randrange(97, 122) for _ in range(tokens)), 4)

    async def forget(self):
        self.forgotten += 1


@pytest.fixture
def lab(codec):
    agent = AgentConfig(
        instruction="", max_turns=3, max_turn_tokens=300, max_observation_tokens=80, max_episode_tokens=4000
    )
    questions = [Question(f"q{i}", f"why {i}?", ("so",)) for i in range(3)]
    return Lab(FakeProducer(), codec, agent, PASSAGES, questions, places=5)


def test_both_methods_play_the_same_script_and_barriers_wait_longer(lab):
    work = make_work(lab.questions, 12, (2, 20), seed=1)

    async def both(lab):
        return await play(lab, work, 0.01, barriers=False), await play(lab, work, 0.01, barriers=True)

    lab = dataclasses.replace(lab, places=12)
    free, held = asyncio.run(both(lab))
    assert equal_turns(free, held) == 1.0
    assert lab.engine.forgotten == 2
    assert [t.searches[0].query for t in free.trajectories] == [t.searches[0].query for t in held.trajectories]
    for seed, request in free.produced.items():
        assert len(request.ids) == work.steps[seed].tokens
    # A turn with barriers takes as long as its longest generation and its slowest search.
    turns = range(4)
    slowest = sum(
        max((0.01 * s.latency for s in work.steps.values() if s.turn == t and s.query), default=0) for t in turns
    )
    longest = sum(max((s.tokens / 1000 for s in work.steps.values() if s.turn == t), default=0) for t in turns)
    assert held.seconds >= slowest + longest


def test_places_bound_the_episodes_without_barriers_only(lab):
    work = make_work(lab.questions, 12, (2, 4), seed=2)
    asyncio.run(play(lab, work, 0.0, barriers=False))
    assert lab.engine.most == 5
    asyncio.run(play(lab, work, 0.0, barriers=True))
    assert lab.engine.most == 12


@pytest.mark.parametrize("chained", [True, False])
def test_a_replay_sends_the_same_requests(lab, chained):
    work = make_work(lab.questions, 6, (2, 9), seed=3)

    async def again():
        played = await play(lab, work, 0.001, barriers=False)
        lab.engine.most = 0
        return played, await replay(lab, work, played, chained=chained)

    played, repeated = asyncio.run(again())
    assert equal_turns(played, repeated) == 1.0
    assert lab.engine.most == (5 if chained else len(work.steps))


def test_reuse_counts_episodes_by_their_turns(lab):
    work = make_work(lab.questions, 8, (2, 9), seed=4)
    played = asyncio.run(play(lab, work, 0.0, barriers=False))
    rows = reuse([(work, played)])
    assert sum(row["sent"] for row in rows) == sum(len(r.prompt_ids) for r in played.produced.values())
    assert sum(row["sent"] - row["computed"] for row in rows) == 4 * len(work.steps)
    assert {row["turns"] for row in rows} <= {2, 3, 4}


def test_latencies_have_mean_one_and_a_long_tail(lab):
    latencies = [s.latency for s in make_work(lab.questions, 4000, (2, 9), seed=5).steps.values()]
    assert sum(latencies) / len(latencies) == pytest.approx(1.0, abs=0.1)
    assert max(latencies) > 10


def test_a_barrier_opens_when_all_who_stay_are_there():
    async def pass_through():
        barrier = Barrier(3)
        order = []

        async def stay(name, seconds):
            await asyncio.sleep(seconds)
            order.append(f"{name} came")
            await barrier.wait()
            order.append(f"{name} passed")

        async def leave():
            await asyncio.sleep(0.03)
            barrier.leave()

        started = time.perf_counter()
        await asyncio.gather(stay("a", 0), stay("b", 0.01), leave())
        return order, time.perf_counter() - started

    order, seconds = asyncio.run(pass_through())
    assert order == ["a came", "b came", "a passed", "b passed"]
    assert seconds >= 0.03


def test_words_find_their_passage():
    found = asyncio.run(WordRetriever(PASSAGES).search(["passage 4"], 2))
    assert found[0][0].id == "p4"
    assert len(found[0]) == 2
