"""What one rollout worker does: places, scores, deaths, adapters and its end; in virtual time."""

import asyncio

import pytest
from scripted import make_config
from virtual_ray import ProcessExit

from agentrl.config import RewardConfig
from agentrl.rewards import RewardError, Rewards
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EngineDied, EnvironmentFailure, FailureCause, Question
from retrievers.base import RetrieverError

QUESTION = Question("q0", "q0", ("there",))


class Unreachable:
    async def __aenter__(self):
        raise RetrieverError("nobody listens")

    async def __aexit__(self, *exception):
        raise AssertionError("it was never entered")


class Connected:
    opened = 0

    async def __aenter__(self):
        Connected.opened += 1

    async def __aexit__(self, *exception):
        Connected.opened -= 1

    async def search(self, queries, k):
        return [[] for _ in queries]


@pytest.fixture
def started(rollouts):
    """A worker that is prepared, and a function that waits for its calls."""
    run = rollouts(workers=1, places=3)
    return run.actors[0].instance, run, run.ray.loop.run_until_complete


def names(count):
    return [f"0/{i}" for i in range(count)]


def test_episodes_come_back_in_order_with_their_rewards(started):
    worker, _, wait = started
    trajectories = wait(worker.rollout(QUESTION, names(5), 1.0))
    assert [t.id for t in trajectories] == names(5)
    assert [(t.answer, t.reward) for t in trajectories] == [("there", 1.0)] * 5
    (wrong,) = wait(worker.rollout(Question("q1", "q1", ("here",)), ["1/0"], 1.0))
    assert wrong.reward == 0.0


def test_an_episode_that_is_too_long_earns_less(started, monkeypatch):
    worker, _, wait = started
    (plain,) = wait(worker.rollout(QUESTION, ["0/0"], 1.0))
    most = {"limit": 2 * plain.model_tokens, "cache": 2 * plain.model_tokens}
    rewards = Rewards([RewardConfig(), RewardConfig(kind="length", options=most)], 1.0)
    monkeypatch.setattr(worker, "_rewards", rewards)
    (shorter,) = wait(worker.rollout(QUESTION, ["0/0"], 1.0))
    assert (plain.reward, shorter.reward) == (1.0, 0.5)
    assert shorter.reward_parts == {"exact_match": 1.0, "length": -0.5}


def test_episodes_that_are_not_to_be_rewarded_have_no_reward(started):
    worker, _, wait = started
    (trajectory,) = wait(worker.rollout(QUESTION, ["0/0"], 1.0, False))
    assert (trajectory.answer, trajectory.reward, trajectory.reward_parts) == ("there", None, {})


def test_all_groups_together_run_no_more_episodes_than_places_and_leave_none_empty(started):
    worker, run, wait = started
    run.script.turn_seconds = lambda rng: rng.uniform(0.5, 2.0)
    play, now, most = worker._agent.run, 0, []

    async def counted(*arguments, **options):
        nonlocal now
        now += 1
        most.append(now)
        try:
            return await play(*arguments, **options)
        finally:
            now -= 1

    worker._agent.run = counted

    async def groups():
        await asyncio.gather(*(worker.rollout(QUESTION, [f"{g}/{i}" for i in range(4)], 1.0) for g in range(5)))

    wait(groups())
    assert len(most) == 20
    # Each of those that waited began when one of three had ended.
    assert most[2:] == [3] * 18


def test_an_episodes_time_begins_with_its_place(started):
    worker, run, wait = started
    run.script.turn_seconds = 0.9 * worker._config.rollout.episode_timeout_seconds / 3
    trajectories = wait(worker.rollout(QUESTION, names(12), 1.0))
    assert all(t.valid and t.answer == "there" for t in trajectories)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RewardError("mine:f raised (mine.py:3)"), FailureCause.CODE),
        (EnvironmentFailure("no verdict"), FailureCause.REWARD),
    ],
)
def test_a_reward_that_fails_costs_its_episode_alone_and_says_why(started, monkeypatch, error, cause):
    worker, _, wait = started

    class FailsOnce:
        async def score(self, trajectory):
            if trajectory.id == "0/1":
                raise error
            return trajectory.with_reward(0.5)

    monkeypatch.setattr(worker, "_rewards", FailsOnce())
    good, bad, other = wait(worker.rollout(QUESTION, names(3), 1.0))
    assert (good.reward, other.reward) == (0.5, 0.5)
    assert (bad.valid, bad.reward, bad.cause) == (False, None, cause)
    assert bad.failure.splitlines()[0] == f"the reward failed: {error}"
    assert ("Traceback" in bad.failure) == (cause is FailureCause.CODE)
    assert len(bad.turns) == 3


def test_an_engine_that_dies_ends_every_group_that_it_runs_and_all_later_ones(started):
    worker, run, wait = started
    run.script.orders["q1"] = ["die"]

    async def both():
        groups = [worker.rollout(QUESTION, names(2), 1.0), worker.rollout(Question("q1", "q1", ("a",)), ["1/0"], 1.0)]
        return await asyncio.gather(*groups, return_exceptions=True)

    for outcome in (*wait(both()), wait(asyncio.wait_for(later(worker), 1e6))):
        assert isinstance(outcome, EngineDied)
        assert "the engine died" in str(outcome)


async def later(worker):
    (outcome,) = await asyncio.gather(worker.rollout(QUESTION, ["2/0"], 1.0), return_exceptions=True)
    return outcome


def test_a_worker_that_was_not_prepared_counts_as_dead(started):
    worker, run, wait = started
    fresh = run.script.make_worker(run.actors[0])
    with pytest.raises(EngineDied, match="made anew and not prepared"):
        wait(fresh.rollout(QUESTION, names(1), 1.0))
    assert fresh._process != worker._process


def test_only_a_newer_adapter_is_loaded(started):
    worker, _, wait = started
    for version in (2, 1, 2, None, 5, 4):
        wait(worker.prepare(version, {"adapter": b"weights"}))
    assert worker.scripted.versions == [2, 5]


def test_an_adapter_that_does_not_load_leaves_the_one_before(started):
    worker, _, wait = started
    wait(worker.prepare(1, {}))
    load = worker.scripted.load_adapter

    async def refuse(version, files):
        raise EnvironmentFailure("no room")

    worker.scripted.load_adapter = refuse
    with pytest.raises(EnvironmentFailure, match="no room"):
        wait(worker.prepare(2, {}))
    worker.scripted.load_adapter = load
    wait(worker.prepare(2, {}))
    assert worker.scripted.versions == [1, 2]


def test_closing_ends_engine_and_retriever_and_what_has_neither_can_be_closed(started, tmp_path, tokenizer):
    _, run, wait = started
    config = make_config(tmp_path, tokenizer, retriever={"kind": "object", "target": f"{__name__}:Connected"})
    run.script._config = config
    connected = run.script.make_worker(run.actors[0])
    wait(connected.prepare())
    assert Connected.opened == 1
    wait(connected.close())
    assert (Connected.opened, connected.scripted.closed) == (0, 1)
    wait(RolloutWorker(config, "", []).close())


def test_a_retriever_that_does_not_start_is_a_death_that_the_pool_can_count(tmp_path, tokenizer):
    config = make_config(tmp_path, tokenizer, retriever={"kind": "object", "target": f"{__name__}:Unreachable"})

    async def start():
        worker = RolloutWorker(config, "", [])
        try:
            await worker.prepare()
        finally:
            await worker.close()

    with pytest.raises(EngineDied, match="its retriever does not start: nobody listens"):
        asyncio.run(start())


def test_a_process_whose_engine_did_not_start_ends_itself_when_it_is_asked_again(started, monkeypatch):
    _, run, wait = started
    worker = run.script.make_worker(run.actors[0])

    def fail(model):
        raise EngineDied("no memory")

    monkeypatch.setattr(worker, "_make_engine", fail)
    with pytest.raises(EngineDied, match="no memory"):
        wait(worker.prepare())
    with pytest.raises(ProcessExit):
        wait(worker.prepare())


def test_a_process_that_was_given_up_ends_itself_when_it_is_asked_to_prepare(started):
    worker, _, wait = started
    process = wait(worker.prepare(1, {}, "another process"))
    with pytest.raises(ProcessExit):
        wait(worker.prepare(1, {}, process))
