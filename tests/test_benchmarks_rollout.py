"""The benchmark of rollouts compares equal work: the same requests and ids with barriers and without."""

import asyncio
import random

import pytest
import rollout_pool
from rollout import equal_turns, reuse
from rollout_pool import Bench, BenchWorker
from rollout_rivals import Barrier, WordRetriever
from rollout_work import Lab, Produced, make_work
from virtual_ray import Actor, VirtualRay

from agentrl.config import AgentConfig, parse_config
from agentrl.rollout import pool, supervisor
from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.supervisor import Limits
from agentrl.types import Question
from retrievers.base import Hit

PASSAGES = [Hit(f"p{i}", f'"T{i}"\nwords of passage {i}', 1.0) for i in range(9)]
PLACES = 5


class FakeProducer:
    """Takes a millisecond a token, with a place for each request; its cache holds the prompts that it has seen whole."""

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


class FakeBenchWorker(BenchWorker):
    def __init__(self, config, codec):
        super().__init__(config, PASSAGES)
        self._codec = codec

    def _make_engine(self, model):
        self.producer = FakeProducer()
        self._lab = Lab(self.producer, self._codec, self._config.agent, PASSAGES, PLACES)
        return self.producer


@pytest.fixture
def bench(codec, tokenizer, tmp_path, monkeypatch):
    """The benchmark's worker without a model, in virtual time."""
    ray = VirtualRay()
    for module in (pool, supervisor, rollout_pool):
        monkeypatch.setattr(module, "ray", ray)
    for module in (pool, supervisor):
        monkeypatch.setattr(module, "time", ray)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    agent = AgentConfig(
        instruction="", max_turns=3, max_turn_tokens=300, max_observation_tokens=80, max_episode_tokens=4000
    )
    config = parse_config(
        {
            "name": "bench",
            "model": {"path": str(tmp_path)},
            "engine": {"max_concurrent": PLACES},
            "retriever": {"kind": "object", "target": "rollout_pool:NoPassages"},
            "agent": agent.model_dump(),
        },
        source="test",
    )
    actor = Actor(ray, lambda actor: FakeBenchWorker(config, codec))
    workers = RolloutPool([actor], [ray.get(actor.prepare.remote())], Limits(PLACES, 1e6, 1e6))
    questions = [Question(f"q{i}", f"why {i}?", ("so",)) for i in range(3)]
    yield Bench(actor, workers, codec, agent, PASSAGES, questions, PLACES, ray.monotonic)
    ray.close()


def producer(bench):
    return bench.worker.instance.producer


def test_both_methods_play_the_same_script_and_barriers_wait_longer(bench):
    work = make_work(bench.questions, 4 * PLACES, (2, 20), seed=1)
    free, held = bench.play(work, 0.01), bench.hold(work, 0.01)
    assert equal_turns(free, held) == 1.0
    assert producer(bench).forgotten == 2
    for seed, request in free.produced.items():
        assert len(request.ids) == work.steps[seed].tokens
    # A turn with barriers takes as long as its longest generation and its slowest search.
    turns = range(4)
    slowest = [
        max((0.01 * s.latency for s in work.steps.values() if s.turn == t and s.query), default=0) for t in turns
    ]
    longest = [max((s.tokens / 1000 for s in work.steps.values() if s.turn == t), default=0) for t in turns]
    assert held.seconds == pytest.approx(sum(slowest) + sum(longest))


def test_the_pool_fills_the_places_and_no_more_and_barriers_ask_for_all_at_once(bench):
    work = make_work(bench.questions, 4 * PLACES, (2, 4), seed=2)
    bench.play(work, 0.0)
    assert producer(bench).most == PLACES
    bench.hold(work, 0.0)
    assert producer(bench).most == 4 * PLACES


@pytest.mark.parametrize("chained", [True, False])
def test_a_replay_sends_the_same_requests(bench, chained):
    work = make_work(bench.questions, 8, (2, 9), seed=3)
    played = bench.play(work, 0.001)
    producer(bench).most = 0
    repeated = bench.replay(work, played, chained=chained)
    assert equal_turns(played, repeated) == 1.0
    assert producer(bench).most == (PLACES if chained else len(work.steps))


def test_reuse_counts_episodes_by_their_turns(bench):
    work = make_work(bench.questions, 8, (2, 9), seed=4)
    played = bench.play(work, 0.0)
    rows = reuse([(work, played)])
    assert sum(row["sent"] for row in rows) == sum(len(r.prompt_ids) for r in played.produced.values())
    assert sum(row["sent"] - row["computed"] for row in rows) == 4 * len(work.steps)
    assert {row["turns"] for row in rows} <= {2, 3, 4}


def test_latencies_have_mean_one_and_a_long_tail():
    latencies = [s.latency for s in make_work([Question("q", "why?", ("so",))], 4000, (2, 9), seed=5).steps.values()]
    assert sum(latencies) / len(latencies) == pytest.approx(1.0, abs=0.1)
    assert max(latencies) > 10


def test_a_barrier_opens_when_all_who_stay_are_there():
    order = []

    async def pass_through():
        barrier = Barrier(3)

        async def stay(name):
            order.append(f"{name} came")
            await barrier.wait()
            order.append(f"{name} passed")

        stays = [asyncio.create_task(stay(name)) for name in "ab"]
        # Both wait by then, and the third is not there.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        order.append("c left")
        barrier.leave()
        await asyncio.gather(*stays)

    asyncio.run(pass_through())
    assert order == ["a came", "b came", "c left", "a passed", "b passed"]


def test_words_find_their_passage():
    found = asyncio.run(WordRetriever(PASSAGES).search(["passage 4"], 2))
    assert found[0][0].id == "p4"
    assert len(found[0]) == 2
