"""Whatever dies or dawdles, every question is answered for, once: real agent, worker, pool and Ray, scripted engine."""

import os
import random
import signal
from types import SimpleNamespace

import pytest
import ray
from chaos_parts import ScriptedWorker, SlowRetriever
from scripted import make_config

from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.supervisor import Limits
from agentrl.types import Question

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("started_ray")]

GROUPS, SIZE = 50, 4


def kill(actor):
    try:
        os.kill(ray.get(actor.pid.remote(), timeout=20), signal.SIGKILL)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ProcessLookupError):
        return False
    return True


@pytest.fixture
def running(tmp_path, tokenizer):
    """Two scripted workers and the slow retriever that they search, on real Ray actors."""
    orders = tmp_path / "orders"
    orders.mkdir()
    searched = {"index": "none", "timeout_seconds": 1.0, "retries": 8}
    config = make_config(tmp_path, tokenizer, retriever=searched, engine={"max_concurrent": 8})
    slow = ray.remote(SlowRetriever).options(name="slow", max_restarts=-1, max_concurrency=100)
    retriever = slow.remote(str(orders))
    worker = ray.remote(ScriptedWorker).options(max_restarts=-1, max_concurrency=100)
    workers = [worker.remote(config, ["slow"], str(orders)) for _ in range(2)]
    processes = ray.get([w.prepare.remote() for w in workers])
    # A group may be with the worker at each of the five kills.
    limits = Limits(places=8, episode_seconds=60.0, start_seconds=60.0, grace_seconds=10.0, tries=6, max_failures=20)
    yield SimpleNamespace(
        pool=RolloutPool(workers, processes, limits), workers=workers, retriever=retriever, orders=orders
    )
    for actor in [*workers, retriever]:
        ray.kill(actor)


def check(asked, groups):
    assert [[episode.id for episode in group] for group in groups] == [names for _, names in asked]
    for (question, _), group in zip(asked, groups, strict=True):
        assert all(episode.question == question for episode in group)
        assert [(episode.failure, episode.answer) for episode in group] == [("", "there")] * SIZE
        assert all(len(episode.searches) == 2 for episode in group)


@pytest.mark.parametrize("what", ["kill", "die"])
def test_a_real_worker_that_fails_comes_back_with_its_adapter(running, what):
    running.pool.publish(7, {"adapter": b"weights"})
    asked = [(Question(f"q{i}", f"q{i}", ("there",)), [f"{what}/{i}/{j}" for j in range(SIZE)]) for i in range(6)]
    (running.orders / f"q2.{what}").touch()
    groups = running.pool.sample(asked, 1.0)
    check(asked, groups)
    assert {version for group in groups for episode in group for version in episode.adapter_versions} == {7}
    assert running.pool.counters["rollout/restarts"] == 1
    assert running.pool.counters["rollout/retried_groups"] >= 1


def test_a_closed_stream_cancels_the_real_episodes_that_it_began(running):
    stuck = [(Question("stuck", "stuck", ("there",)), [f"stuck/{j}" for j in range(8)]) for _ in range(2)]
    for _ in range(2):
        (running.orders / "stuck.hang").touch()
    stream = running.pool.stream(stuck, temperature=1.0)
    stream._hand_out()
    stream.close()
    asked = [(Question(f"q{i}", f"q{i}", ("there",)), [f"after/{i}/{j}" for j in range(SIZE)]) for i in range(6)]
    check(asked, running.pool.sample(asked, 1.0))
    assert running.pool.counters["rollout/restarts"] == 0


def test_200_episodes_survive_killed_workers_killed_retrievers_and_delays(running):
    """Workers are killed five times, the retriever five times, and twenty searches outlast their deadline."""
    rng = random.Random(0)
    for _ in range(20):
        (running.orders / f"delay-{rng.random()}").touch()
    asked = [(Question(f"q{i}", "where?", ("there",)), [f"{i}/{j}" for j in range(SIZE)]) for i in range(GROUPS)]
    left = ["worker", "retriever"] * 5
    reached = []

    def trouble(done):
        reached.append(done)
        due = GROUPS * SIZE * (1 - len(left) / 11)
        if left and done >= due:
            actor = running.retriever if left[-1] == "retriever" else rng.choice(running.workers)
            # One that is on its way back is left alone, and another is due with the next group.
            if kill(actor):
                left.pop()

    rounds = []
    while not rounds or left:
        # Each round has ids of its own.
        named = [(question, [f"{len(rounds)}/{name}" for name in names]) for question, names in asked]
        rounds.append((named, running.pool.sample(named, 1.0, trouble)))
    assert not list(running.orders.iterdir())
    for named, groups in rounds:
        check(named, groups)
    # Kills that meet a worker on its way back are part of one restart.
    assert 1 <= running.pool.counters["rollout/restarts"] <= 5
    assert reached[-1] == GROUPS * SIZE
