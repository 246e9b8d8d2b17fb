"""Engines of a shared card sleep while the trainer trains, and none wakes up behind its back; in virtual time."""

import asyncio

import pytest

from agentrl.types import EngineDied, EnvironmentFailure, Question


def requests(count, size=2):
    return [(Question(f"q{n}", f"q{n}", ("there",)), [f"{n}/{i}" for i in range(size)]) for n in range(count)]


def asleep(run):
    return [actor.instance.scripted.asleep for actor in run.actors]


def test_engines_sleep_until_they_are_woken_and_then_have_the_weights_of_before(rollouts):
    run = rollouts(workers=2)
    run.pool.publish(1, {"adapter": b"weights"})
    for _ in range(2):
        run.pool.sleep()
        assert asleep(run) == [True, True]
        run.pool.wake()
        assert asleep(run) == [False, False]
        groups = run.pool.sample(requests(3), 1.0)
        assert {turn.adapter_version for group in groups for episode in group for turn in episode.turns} == {1}
    assert run.pool.counters["rollout/restarts"] == 0


def test_a_pool_that_did_not_send_them_to_sleep_finds_engines_awake_once_it_publishes(rollouts):
    run = rollouts(workers=2)
    again, arguments = run.pool.__reduce__()
    again(*arguments).sleep()
    run.pool.publish(3, {"adapter": b"weights"})
    assert asleep(run) == [False, False]
    assert [actor.instance.scripted.versions for actor in run.actors] == [[3], [3]]


def test_a_worker_on_its_way_back_is_asleep_before_the_trainer_trains(rollouts, monkeypatch):
    run = rollouts(workers=2)
    prepare = type(run.actors[0].instance).prepare

    # Ray may carry out the call that brings the worker back behind one that was made later.
    seconds = iter([40.0])

    async def slowly(worker, *arguments):
        await asyncio.sleep(next(seconds, 1.0))
        return await prepare(worker, *arguments)

    monkeypatch.setattr(type(run.actors[0].instance), "prepare", slowly)
    run.script.orders["q0"] = ["kill"]
    run.pool.sample(requests(2), 1.0)
    assert run.pool.counters["rollout/restarts"] == 1
    run.pool.sleep()
    run.ray.wait([], timeout=1000.0)
    assert asleep(run) == [True, True]


def test_a_worker_that_dies_in_its_sleep_comes_back_when_it_is_woken(rollouts):
    run = rollouts(workers=2)
    run.pool.publish(4, {"adapter": b"weights"})
    run.pool.sleep()
    run.ray.kill(run.actors[0], no_restart=False)
    run.ray.wait([], timeout=1000.0)
    # Ray has made the process anew, and no engine in it has taken the trainer's memory.
    assert not hasattr(run.actors[0].instance, "scripted")
    run.pool.wake()
    assert asleep(run) == [False, False]
    assert run.actors[0].instance.scripted.versions == [4]
    assert run.pool.counters["rollout/restarts"] == 1


def test_an_engine_that_cannot_wake_is_made_anew(rollouts, monkeypatch):
    run = rollouts(workers=1)
    run.pool.sleep()

    async def fail():
        raise EngineDied("out of memory")

    monkeypatch.setattr(run.actors[0].instance.scripted, "wake", fail)
    run.pool.wake()
    assert asleep(run) == [False]
    assert run.actors[0].lives == 2


def test_engines_that_do_not_fall_asleep_in_time_are_named(rollouts, monkeypatch):
    run = rollouts(workers=2, start_seconds=50.0)

    async def never():
        await asyncio.sleep(1e9)

    monkeypatch.setattr(run.actors[1].instance.scripted, "sleep", never)
    with pytest.raises(EnvironmentFailure, match=r"worker\(s\) 1 did not fall asleep within 50 s"):
        run.pool.sleep()
