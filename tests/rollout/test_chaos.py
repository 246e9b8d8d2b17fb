"""Whatever dies or dawdles, every question is answered for, once: real agent, pool and Ray, scripted engine and passages."""

import os
import random
import signal
import threading
import time

import pytest
import ray
from chaos_parts import ScriptedWorker, SlowRetriever

from agentrl.config import parse_config
from agentrl.rollout.pool import Limits, RolloutPool
from agentrl.types import Question

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("started_ray")]

GROUPS, SIZE = 50, 4


def kill(actor, method):
    try:
        os.kill(ray.get(getattr(actor, method).remote(), timeout=20), signal.SIGKILL)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ProcessLookupError):
        return False
    return True


def test_200_episodes_survive_killed_workers_killed_retrievers_and_delays(tmp_path, tokenizer):
    """Workers are killed five times, the retriever five times, and twenty searches outlast their deadline."""
    tokenizer.save_pretrained(tmp_path / "model")
    orders = tmp_path / "orders"
    orders.mkdir()
    config = parse_config(
        {
            "name": "chaos",
            "model": {"path": str(tmp_path / "model")},
            "retriever": {"index": "none", "timeout_seconds": 1.0, "retries": 8},
            "agent": {"instruction": "", "max_episode_tokens": 1024},
            "engine": {"max_concurrent": 8},
        },
        source="test",
    )
    slow = ray.remote(SlowRetriever).options(name="slow", max_restarts=-1, max_concurrency=100)
    retriever = slow.remote(str(orders))
    worker = ray.remote(ScriptedWorker).options(max_restarts=-1, max_concurrency=100)
    workers = [worker.remote(config, "", ["slow"]) for _ in range(2)]
    pids = ray.get([w.prepare.remote() for w in workers])
    limits = Limits(places=8, deadline_seconds=60.0, start_seconds=60.0, max_failures=20)
    pool = RolloutPool(workers, pids, limits)
    requests = [(Question(f"q{i}", "where?", ("there",)), [f"{i}/{j}" for j in range(SIZE)]) for i in range(GROUPS)]
    killed = {"workers": 0, "retriever": 0}
    over = threading.Event()

    def trouble():
        rng = random.Random(0)
        for _ in range(20):
            (orders / f"delay-{rng.random()}").touch()
        while not over.is_set() and min(killed.values()) < 5:
            time.sleep(rng.uniform(0.5, 3.0))
            if killed["workers"] < 5:
                killed["workers"] += kill(rng.choice(workers), "prepare")
            if killed["retriever"] < 5:
                killed["retriever"] += kill(retriever, "ping")

    agent_of_chaos = threading.Thread(target=trouble)
    agent_of_chaos.start()
    done, finished = [], []
    try:
        # In rounds until all the trouble has happened, each with ids of its own.
        while not finished or agent_of_chaos.is_alive():
            number = len(finished)
            named = [(question, [f"{number}/{name}" for name in names]) for question, names in requests]
            finished.append((named, pool.sample(named, 1.0, done.append)))
    finally:
        over.set()
        agent_of_chaos.join()
        for actor in [*workers, retriever]:
            ray.kill(actor)
    assert killed == {"workers": 5, "retriever": 5}
    assert not list(orders.iterdir())
    for named, groups in finished:
        assert [[episode.id for episode in group] for group in groups] == [names for _, names in named]
        for (question, _), group in zip(named, groups, strict=True):
            assert all(episode.question == question for episode in group)
            assert [(episode.failure, episode.answer) for episode in group] == [("", "there")] * SIZE
            assert all(len(episode.searches) == 2 for episode in group)
    assert pool.counters["rollout/restarts"] >= 5
    assert done[-1] == GROUPS * SIZE
