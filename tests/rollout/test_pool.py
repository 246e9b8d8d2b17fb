"""Groups come back whole and once each, whatever happens to the workers that run them; on real Ray actors."""

import os
import signal
import time

import pytest
import ray
from fake_worker import Worker

from agentrl.rollout.pool import Limits, RolloutPool
from agentrl.types import EnvironmentFailure, Question

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("started_ray")]

SIZE = 2


@pytest.fixture
def make_pool(tmp_path):
    actors = []

    def make(workers=2, seconds=0.01, **limits):
        actor = ray.remote(Worker).options(max_restarts=-1, max_concurrency=100)
        actors.extend(actor.remote(str(tmp_path), seconds) for _ in range(workers))
        pids = ray.get([a.prepare.remote() for a in actors])
        settings = {"places": 4, "deadline_seconds": 10.0, "start_seconds": 60.0, **limits}
        return RolloutPool(actors, pids, Limits(**settings))

    yield make
    for actor in actors:
        ray.kill(actor)


def requests(count):
    return [(Question(f"q{i}", "?", ("a",)), [f"{i}/{j}" for j in range(SIZE)]) for i in range(count)]


def order(tmp_path, question, what):
    (tmp_path / f"{question}.{what}").touch()


def ids(groups):
    return [[episode.id for episode in group] for group in groups]


def test_groups_come_back_in_order_and_every_worker_takes_part(make_pool):
    pool, done = make_pool(seconds=0.1), []
    groups = pool.sample(requests(12), 1.0, done.append)
    assert ids(groups) == [names for _, names in requests(12)]
    assert done == list(range(SIZE, 12 * SIZE + 1, SIZE))
    assert pool.counters["rollout/restarts"] == 0


@pytest.mark.parametrize("what", ["kill", "die", "hang"])
def test_a_worker_that_fails_is_brought_back_with_its_adapter_and_its_groups_run_again(make_pool, tmp_path, what):
    pool = make_pool(workers=1)
    pool.publish(7, {"adapter": b"weights"})
    order(tmp_path, "q2", what)
    groups = pool.sample(requests(6), 1.0)
    assert ids(groups) == [names for _, names in requests(6)]
    assert {episode.reward for group in groups for episode in group} == {7.0}
    assert pool.counters["rollout/restarts"] == 1
    assert pool.counters["rollout/retried_groups"] >= 1


def test_the_others_go_on_while_one_worker_is_brought_back(make_pool, tmp_path):
    pool = make_pool(workers=2, seconds=0.05)
    for i in (0, 3, 6, 9):
        order(tmp_path, f"q{i}", "kill")
    groups = pool.sample(requests(20), 1.0)
    assert ids(groups) == [names for _, names in requests(20)]


def test_a_group_that_kills_every_worker_counts_as_failed_and_the_rest_do_not(make_pool, tmp_path):
    pool = make_pool(workers=2, places=1)
    order(tmp_path, "q1", "always-kill")
    groups = pool.sample(requests(4), 1.0)
    assert [[episode.valid for episode in group] for group in groups] == [
        [True] * 2,
        [False] * 2,
        [True] * 2,
        [True] * 2,
    ]
    assert "its worker failed every time: its process died" in groups[1][0].failure


def test_too_many_deaths_end_the_run_and_say_how_often_and_why(make_pool, tmp_path):
    pool = make_pool(workers=1, places=1, max_failures=1)
    order(tmp_path, "q0", "always-kill")
    with pytest.raises(
        EnvironmentFailure, match=r"died or hung 2 times within 600 s, more than rollout\.max_failures 1"
    ):
        pool.sample(requests(2), 1.0)


def test_a_worker_that_cannot_start_again_ends_the_run(make_pool, tmp_path):
    pool = make_pool(workers=1, max_failures=2)
    order(tmp_path, "q0", "kill")
    (tmp_path / "no-start").touch()
    with pytest.raises(EnvironmentFailure, match="died or hung 3 times"):
        pool.sample(requests(1), 1.0)


def test_an_error_in_the_code_is_no_death_and_is_raised_as_it_is(make_pool, tmp_path):
    pool = make_pool()
    order(tmp_path, "q1", "bug")
    with pytest.raises(ValueError, match="a bug"):
        pool.sample(requests(2), 1.0)


def test_a_worker_that_died_unseen_is_brought_back_by_the_next_adapter(make_pool):
    pool = make_pool(workers=2)
    os.kill(ray.get(pool._workers[0].actor.prepare.remote()), signal.SIGKILL)
    time.sleep(0.5)
    pool.publish(3, {"adapter": b"weights"})
    groups = pool.sample(requests(6), 1.0)
    assert {episode.reward for group in groups for episode in group} == {3.0}


def test_who_waits_for_whom_is_told_while_nothing_gets_done(make_pool, tmp_path, monkeypatch):
    monkeypatch.setattr("agentrl.rollout.pool._STALL_SECONDS", 1.0)
    pool, told = make_pool(workers=1, places=2, deadline_seconds=3.0), []
    order(tmp_path, "q0", "hang")
    pool.sample(requests(3), 1.0, on_stall=told.append)
    assert "worker 0 running 1 group(s), 2 episodes; 2 group(s) wait for a place" in told[0]


def test_a_group_with_more_episodes_than_places_is_given_the_time_for_all_of_them(make_pool):
    pool = make_pool(workers=1, seconds=2.5, places=1, deadline_seconds=1.5)
    group = (Question("q", "?", ("a",)), [f"0/{j}" for j in range(6)])
    assert ids(pool.sample([group], 1.0)) == [group[1]]
    assert pool.counters["rollout/restarts"] == 0
