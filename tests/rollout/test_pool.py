"""Groups come back whole and once each, whatever happens to the workers that run them; in virtual time."""

import asyncio
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrl.types import EnvironmentFailure, Question, check_failures

SIZE = 2


def requests(count, size=SIZE):
    return [(Question(f"q{i}", f"q{i}", ("there",)), [f"{i}/{j}" for j in range(size)]) for i in range(count)]


def ids_of(asked):
    return [names for _, names in asked]


def ids(groups):
    return [[episode.id for episode in group] for group in groups]


def versions(groups):
    return {version for group in groups for episode in group for version in episode.adapter_versions}


def test_groups_come_back_in_order_and_every_worker_takes_part(rollouts):
    run, done = rollouts(), []
    groups = run.pool.sample(requests(12), 1.0, done.append)
    assert ids(groups) == ids_of(requests(12))
    assert all(episode.answer == "there" and episode.reward == 1.0 for group in groups for episode in group)
    assert done == list(range(SIZE, 12 * SIZE + 1, SIZE))
    assert run.pool.counters == {"rollout/restarts": 0.0, "rollout/retried_groups": 0.0}
    # Three turns of a second, 24 episodes, 8 places.
    assert run.ray.monotonic() == pytest.approx(9.0)


@pytest.mark.parametrize("size", [1, 5, 8, 16, 64])
def test_places_stay_in_use_while_groups_wait_for_their_longest_episode(rollouts, size):
    """An episode is up to nine times as long as another; counted until every episode has begun."""
    run = rollouts(workers=1, places=32)
    lengths = {f"{i}/{j}": 1 + (7 * i + 3 * j) % 9 for i in range(128) for j in range(size)}
    asked = requests(max(4, 4 * 32 // size), size)
    episodes = sum(len(names) for _, names in asked)
    begun, use = set(), SimpleNamespace(seconds=0.0, now=0, last=0.0, end=0.0)

    def count(change):
        now = run.ray.monotonic()
        use.seconds += use.now * (now - use.last) if len(begun) < episodes else 0.0
        use.now, use.last = use.now + change, now

    agent = run.actors[0].instance._agent
    play = agent.run

    async def counted(question, name, **options):
        count(1)
        begun.add(name)
        use.end = run.ray.monotonic() if len(begun) == episodes and not use.end else use.end
        run.script.turn_seconds = lengths[name]
        try:
            return await play(question, name, **options)
        finally:
            count(-1)

    agent.run = counted
    run.pool.sample(asked, 1.0)
    assert use.seconds / (32 * use.end) >= 0.8


@pytest.mark.parametrize("what", ["kill", "die", "hang", "cut"])
def test_a_worker_that_fails_is_brought_back_with_its_adapter_and_its_groups_run_again(rollouts, what):
    run = rollouts(workers=1)
    run.pool.publish(7, {"adapter": b"weights"})
    run.script.orders["q2"] = [what]
    groups = run.pool.sample(requests(6), 1.0)
    assert ids(groups) == ids_of(requests(6))
    assert versions(groups) == {7}
    assert run.pool.counters["rollout/restarts"] == 1
    assert run.pool.counters["rollout/retried_groups"] >= 1
    assert run.actors[0].lives == 2


def test_the_others_go_on_while_one_worker_is_brought_back(rollouts):
    run = rollouts(workers=2)
    for i in (0, 3, 6, 9):
        run.script.orders[f"q{i}"] = ["kill"]
    groups = run.pool.sample(requests(20), 1.0)
    assert ids(groups) == ids_of(requests(20))


def test_a_group_that_kills_every_worker_counts_as_failed_and_the_rest_do_not(rollouts):
    run = rollouts(workers=2, places=1)
    run.script.orders["q1"] = ["kill"] * 3
    groups = run.pool.sample(requests(4), 1.0)
    assert [[episode.valid for episode in group] for group in groups] == [
        [True] * 2,
        [False] * 2,
        [True] * 2,
        [True] * 2,
    ]
    assert "its worker failed every time: its process died" in groups[1][0].failure


def test_too_many_deaths_end_the_run_and_say_how_often_and_why(rollouts):
    run = rollouts(workers=1, places=1, max_failures=1)
    run.script.orders["q0"] = ["kill"] * 9
    with pytest.raises(
        EnvironmentFailure, match=r"died or hung 2 times within 600 s, more than rollout\.max_failures 1"
    ):
        run.pool.sample(requests(2), 1.0)


def test_deaths_that_lie_further_apart_than_the_window_do_not_end_the_run(rollouts):
    run = rollouts(workers=1, max_failures=1, window_seconds=50.0)
    run.script.turn_seconds = 20.0
    for _ in range(4):
        run.script.orders["q0"] = ["kill"]
        assert ids(run.pool.sample(requests(1), 1.0)) == ids_of(requests(1))
    assert run.pool.counters["rollout/restarts"] == 4


def test_a_worker_that_cannot_start_again_ends_the_run(rollouts):
    run = rollouts(workers=1, max_failures=2)
    run.script.orders["q0"], run.script.no_start = ["kill"], True
    with pytest.raises(EnvironmentFailure, match="died or hung 3 times"):
        run.pool.sample(requests(1), 1.0)


def test_what_a_workers_code_raises_fails_its_group_with_the_traceback_and_stops_the_run_by_its_share(rollouts):
    run = rollouts(workers=1)
    broken = run.actors[0].instance
    rollout = broken.rollout

    async def buggy(question, *arguments):
        if question.id != "q0":
            raise KeyError(f"no {question.id}")
        return await rollout(question, *arguments)

    broken.rollout = buggy
    groups = run.pool.sample(requests(3), 1.0)
    assert ids(groups) == ids_of(requests(3))
    assert [episode.valid for group in groups for episode in group] == [True, True, False, False, False, False]
    assert "KeyError: 'no q1'" in groups[1][0].failure
    assert "in buggy" in groups[1][0].failure
    assert run.pool.counters["rollout/restarts"] == 0
    with pytest.raises(EnvironmentFailure, match="KeyError: 'no q1'"):
        check_failures([episode for group in groups for episode in group], 0.5)


def test_a_worker_that_died_unseen_is_brought_back_by_the_next_adapter_and_counted(rollouts):
    run = rollouts(workers=2)
    run.actors[0].die()
    run.pool.publish(3, {"adapter": b"weights"})
    assert run.pool.counters["rollout/restarts"] == 1
    assert versions(run.pool.sample(requests(6), 1.0)) == {3}


def test_a_death_that_publishing_finds_first_is_no_second_one_for_the_episodes_it_ended(rollouts):
    run, groups = rollouts(workers=1), {}
    stream = run.pool.stream(requests(4), temperature=1.0)
    groups.update([next(stream)])
    run.actors[0].die()
    run.pool.publish(2, {"adapter": b"weights"})
    groups.update(stream)
    assert ids(groups[i] for i in range(4)) == ids_of(requests(4))
    assert run.pool.counters["rollout/restarts"] == 1
    assert run.actors[0].lives == 2


def test_a_worker_out_of_reach_is_ended_and_no_episode_runs_beside_its_second_run(rollouts):
    run = rollouts(workers=2)
    run.script.orders["q0"] = ["lose"]
    groups = run.pool.sample(requests(8), 1.0)
    assert ids(groups) == ids_of(requests(8))
    assert all(episode.valid for group in groups for episode in group)
    assert max(run.script.most_running.values()) == SIZE
    assert sorted(actor.lives for actor in run.actors) == [1, 2]
    assert run.pool.counters["rollout/restarts"] == 1


def test_a_worker_whose_loop_is_stuck_is_killed(rollouts, monkeypatch):
    run = rollouts(workers=1)
    stuck = run.actors[0].instance

    async def never(*arguments):
        await asyncio.sleep(1e9)

    # It answers no call at all.
    stuck.rollout = stuck.prepare = never
    assert ids(run.pool.sample(requests(3), 1.0)) == ids_of(requests(3))
    assert run.actors[0].lives == 2


def test_a_worker_that_comes_back_loads_the_model_that_was_published_last_and_no_copy_stays(
    rollouts, tmp_path, monkeypatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    run = rollouts(workers=2)
    for version in (1, 2):
        weights = np.full(8, version, np.uint8)
        run.pool.publish(version, {"config.json": np.zeros(2, np.uint8), "model.safetensors": weights})
    run.actors[0].die()
    assert versions(run.pool.sample(requests(6), 1.0)) == {2}
    assert run.pool.counters["rollout/restarts"] == 1
    for actor, loaded in zip(run.actors, ([2], [1, 2]), strict=True):
        models = actor.instance._engine._engine.models
        assert [model["model.safetensors"] for model in models] == [bytes([version] * 8) for version in loaded]
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


def test_an_older_adapter_than_the_newest_is_refused(rollouts):
    run = rollouts()
    run.pool.publish(5, {"adapter": b"weights"})
    with pytest.raises(ValueError, match="version 4 is older than version 5"):
        run.pool.publish(4, {"adapter": b"weights"})


def test_a_late_repetition_of_an_older_adapter_changes_nothing(rollouts):
    run = rollouts(workers=1)
    run.pool.publish(5, {"adapter": b"weights"})
    run.ray.get(run.actors[0].prepare.remote(4, {"adapter": b"weights"}))
    assert versions(run.pool.sample(requests(2), 1.0)) == {5}


def test_what_each_worker_does_is_told_while_nothing_gets_done(rollouts):
    run, told = rollouts(workers=1, places=2, episode_seconds=100.0), []
    run.script.orders["q0"] = ["hang"]
    run.script.turn_seconds = 1.0
    run.script.orders["q1"] = ["hang"]
    run.pool.sample(requests(4), 1.0, on_stall=told.append)
    assert "worker 0 running 2 group(s), 4 episodes; 2 group(s) wait for a place" in told[0]


def test_a_group_with_more_episodes_than_places_is_given_the_time_for_all_of_them(rollouts):
    run = rollouts(workers=1, places=1, episode_seconds=30.0, grace_seconds=1.0)
    run.script.turn_seconds = 9.0
    (asked,) = requests(1, 6)
    (group,) = run.pool.sample([asked], 1.0)
    assert ids([group]) == [asked[1]]
    assert all(episode.valid for episode in group)
    assert run.pool.counters["rollout/restarts"] == 0


def test_a_stream_yields_groups_as_they_get_done_and_takes_more_while_it_is_read(rollouts):
    run = rollouts(workers=1, places=4)
    run.script.orders["q0"] = ["hang"]
    stream = run.pool.stream(requests(2), temperature=1.0)
    index, group = next(stream)
    assert (index, ids([group])) == (1, [["1/0", "1/1"]])
    stream.add(requests(4)[2:])
    assert stream.unfinished == 3
    assert [next(stream)[0], next(stream)[0]] == [2, 3]
    assert next(stream)[0] == 0
    assert next(stream, None) is None
    stream.add(requests(5)[4:])
    assert [index for index, _ in stream] == [4]


def test_a_stream_hands_out_no_more_than_two_rounds_of_places(rollouts):
    run = rollouts(workers=2, places=4)
    stream = run.pool.stream(requests(100), temperature=1.0)
    next(stream)
    assert sum(worker.load for worker in run.pool._supervisor.workers) <= 2 * 2 * 4
    assert stream.unfinished == 99


def test_a_closed_stream_gives_its_places_to_the_next(rollouts):
    run = rollouts(workers=1, places=4)
    run.script.orders["q0"] = ["hang"]
    run.script.orders["q1"] = ["hang"]
    stream = run.pool.stream(requests(20), temperature=1.0)
    next(stream)
    stream.close()
    assert next(stream, None) is None
    started, begun = run.ray.monotonic(), run.script.begun
    groups = run.pool.sample(requests(30)[28:], 1.0)
    assert ids(groups) == [["28/0", "28/1"], ["29/0", "29/1"]]
    assert run.ray.monotonic() - started == pytest.approx(3.0)
    assert run.script.begun - begun == 3 * 4
    assert run.pool.counters["rollout/restarts"] == 0


def test_no_worker_seems_to_hang_because_its_rewards_take_the_time_that_they_have(rollouts):
    class Slow:
        async def score(self, trajectory):
            await asyncio.sleep(200.0)
            return trajectory.with_reward(0.5)

    run = rollouts(workers=1, reward_seconds=200.0)
    run.actors[0].instance._rewards = Slow()
    groups = run.pool.sample(requests(3), 1.0)
    assert [[episode.reward for episode in group] for group in groups] == [[0.5] * 2] * 3
    assert run.pool.counters["rollout/restarts"] == 0


def test_no_worker_seems_to_hang_because_a_stream_is_read_slowly(rollouts):
    run = rollouts(workers=3)
    stream, found = run.pool.stream(requests(6), temperature=1.0), []
    for index, _ in stream:
        found.append(index)
        run.ray.wait([], timeout=10_000.0)
    assert sorted(found) == list(range(6))
    assert run.pool.counters["rollout/restarts"] == 0


def test_workers_that_came_back_between_two_streams_are_taken_as_they_are(rollouts, monkeypatch):
    run = rollouts(workers=3)
    prepare = type(run.actors[0].instance).prepare

    async def slowly(worker, *arguments):
        await asyncio.sleep(20.0)
        return await prepare(worker, *arguments)

    monkeypatch.setattr(type(run.actors[0].instance), "prepare", slowly)
    for killer in ("q0", "q1"):
        run.script.orders[killer] = ["kill"]
    stream = run.pool.stream(requests(3), temperature=1.0)
    assert next(stream)[0] == 2
    stream.close()
    run.ray.wait([], timeout=10_000.0)
    run.pool.sample(requests(9)[3:], 1.0)
    assert run.pool.counters["rollout/restarts"] == 2


def test_each_result_is_fetched_once(rollouts):
    run = rollouts()
    run.script.orders["q2"] = ["die"]
    run.ray.gets.clear()
    run.pool.sample(requests(12), 1.0)
    assert set(run.ray.gets.values()) == {1}


trouble = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(["kill", "die", "hang", "lose", "cut", ValueError("odd")])),
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    trouble=trouble, workers=st.integers(1, 3), places=st.integers(1, 6), sizes=st.lists(st.integers(1, 5), max_size=12)
)
@pytest.mark.slow
def test_every_request_is_answered_once_with_its_own_episodes(rollouts, trouble, workers, places, sizes):
    run = rollouts(workers=workers, places=places, max_failures=100)
    run.script.turn_seconds = lambda rng: rng.uniform(0.1, 5.0)
    for number, order in trouble:
        run.script.orders[f"q{number}"].append(order)
    asked = [(question, names[:size]) for (question, names), size in zip(requests(12, 5), sizes, strict=False)]
    groups = run.pool.sample(asked, 1.0)
    assert ids(groups) == ids_of(asked)
    for (question, names), group in zip(asked, groups, strict=True):
        assert all(episode.question == question for episode in group)
        assert run.script.most_running[question.id] <= len(names)
    assert all(worker.load == 0 for worker in run.pool._supervisor.workers)
