"""A step's questions become whole groups in order, each episode gets its own advantage, and failures are counted apart."""

import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import parse_config
from agentrl.training.sampling import StepSampler, batch_metrics
from agentrl.types import End, EnvironmentFailure, GroupError, Question

QUESTIONS = [Question(f"q{number}", f"question {number}", ("gold",)) for number in range(4)]


class FakePool:
    """Makes each episode by `make(question, name, number)`, where number counts the episodes of the call."""

    def __init__(self, make):
        self._make = make
        self.requests = []
        self.temperature = None

    def sample(self, requests, temperature, on_done):
        self.requests = [(question, list(names)) for question, names in requests]
        self.temperature = temperature
        groups, number = [], 0
        for question, names in requests:
            group = []
            for name in names:
                group.append(self._make(question, name, number))
                number += 1
            groups.append(group)
            on_done(number)
        return groups


def sampler(make, *, size=2, step=3, order=QUESTIONS, most=0.5, estimator="grpo"):
    config = parse_config(
        {
            "name": "x",
            "model": {"path": "m"},
            "rollout": {"group_size": size, "questions_per_step": 2, "max_failed_share": most},
            "agent": {"temperature": 0.9},
            "advantages": {"estimator": estimator},
            "training": {"steps": 9},
        },
        source="test",
    )
    pool, batches, done = FakePool(make), [], []
    sample = StepSampler(config, pool, order, lambda: step, lambda *batch: batches.append(batch), done.append)
    return sample, pool, batches, done


def rewarded(*rewards):
    return lambda question, name, number: make_episode(name, question, reward=rewards[number])


def failed(name, question=None, failure="index lost"):
    return make_episode(name, question, end=End.ENVIRONMENT_FAILURE, failure=failure)


def test_each_question_is_asked_once_with_a_whole_group_in_the_given_order():
    sample, pool, batches, done = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    batch = sample([2, 2, 0, 0])
    assert pool.requests == [(QUESTIONS[2], ["3/2/0", "3/2/1"]), (QUESTIONS[0], ["3/0/0", "3/0/1"])]
    assert pool.temperature == 0.9
    assert [episode.id for episode in batch.trajectories] == ["3/2/0", "3/2/1", "3/0/0", "3/0/1"]
    assert batches == [(3, batch.trajectories)]
    assert done == [0, 2, 4]


def test_a_question_that_comes_twice_makes_two_groups_of_distinct_episodes():
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0), order=[QUESTIONS[0]] * 2)
    batch = sample([0, 0, 1, 1])
    assert len(pool.requests) == 2
    assert len({episode.id for episode in batch.trajectories}) == 4


@pytest.mark.parametrize("positions", [[0, 1, 1, 0], [0, 0, 1], [0, 0, 0, 1]])
def test_rows_that_are_not_whole_groups_are_refused(positions):
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    with pytest.raises(RuntimeError, match="are not 2 times one question"):
        sample(positions)
    assert pool.requests == []


def test_advantages_belong_to_their_episodes():
    sample, _, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    batch = sample([2, 2, 0, 0])
    assert len(batch.advantages) == len(batch.trajectories)
    assert [advantage > 0 for advantage in batch.advantages] == [
        episode.reward == 1.0 for episode in batch.trajectories
    ]
    assert batch.advantages[0] == -batch.advantages[1] == batch.advantages[3] == -batch.advantages[2] != 0


def test_episodes_are_compared_within_their_own_group_alone():
    sample, _, _, _ = sampler(rewarded(1.0, 1.0, 1.0, 0.0))
    assert sample([0, 0, 1, 1]).advantages[:2] == [0.0, 0.0]


def test_episodes_are_compared_with_those_that_searched_as_often():
    def make(question, name, number):
        return make_episode(
            name, question, searches=number % 2, reward=[0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0][number]
        )

    sample, _, _, _ = sampler(make, size=4, estimator="stratified")
    batch = sample([0] * 4 + [1] * 4)
    # In the second group all that searched once were right and none that did not: nothing separates equals.
    assert batch.metrics["strata/0/share"] == batch.metrics["strata/1/share"] == 0.5
    within = batch.advantages[0], batch.advantages[2]
    assert within[0] < 0 < within[1]
    assert batch.advantages[1] == batch.advantages[3]


def test_failed_episodes_have_no_advantage_and_stand_in_no_mean():
    def make(question, name, number):
        return (
            failed(name, question) if number == 1 else make_episode(name, question, reward=[1.0, 0, 0.0, 1.0][number])
        )

    sample, _, _, _ = sampler(make, size=4, most=0.5)
    batch = sample([0] * 4)
    assert batch.advantages[1] == 0.0
    assert [advantage > 0 for advantage in batch.advantages] == [True, False, False, True]
    assert batch.metrics["reward/mean"] == pytest.approx(2 / 3)
    assert batch.metrics["ends/environment_failure"] == 0.25
    assert batch.metrics["advantages/excluded"] == 1.0
    assert batch.metrics["episodes"] == 4.0
    assert batch.metrics["strata/0/share"] == 1.0


def test_a_group_of_failures_alone_leaves_the_others_as_they_are():
    def make(question, name, number):
        return failed(name, question) if number < 2 else make_episode(name, question, reward=number - 2.0)

    sample, _, _, _ = sampler(make)
    batch = sample([0, 0, 1, 1])
    assert batch.advantages[:2] == [0.0, 0.0]
    assert batch.metrics["groups/reward_varies"] == 1.0


def test_too_many_failures_stop_the_run_with_the_first_and_are_recorded():
    def make(question, name, number):
        return failed(name, question, f"failure {number}") if number else make_episode(name, question, reward=1.0)

    sample, _, batches, _ = sampler(make)
    with pytest.raises(EnvironmentFailure, match=r"3 of 4 episodes failed, .*max_failed_share 0\.5 .*: failure 1$"):
        sample([0, 0, 1, 1])
    assert len(batches) == 1


def test_a_step_without_one_sound_episode_stops_whatever_share_is_allowed():
    sample, _, _, _ = sampler(lambda question, name, number: failed(name, question), most=0.99)
    with pytest.raises(EnvironmentFailure, match="4 of 4 episodes failed"):
        sample([0, 0, 1, 1])


def test_an_episode_that_comes_twice_is_refused():
    sample, _, _, _ = sampler(lambda question, name, number: make_episode("same", question, reward=0.0))
    with pytest.raises(GroupError, match="holds episode same more than once"):
        sample([0, 0, 1, 1])


def test_an_episode_of_another_question_is_refused():
    sample, _, _, _ = sampler(lambda question, name, number: make_episode(name, QUESTIONS[3], reward=0.0))
    with pytest.raises(GroupError, match="group of question 'q0': episode 3/0/0 answers another question, 'q3'"):
        sample([0, 0, 1, 1])


def test_a_group_of_the_wrong_size_is_refused():
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    whole = pool.sample
    pool.sample = lambda *arguments: [group[:1] for group in whole(*arguments)]
    with pytest.raises(GroupError, match="expected 2 episodes"):
        sample([0, 0, 1, 1])


batches = st.lists(
    st.tuples(st.sampled_from(End), st.integers(0, 3), st.sampled_from([0.0, 1.0]), st.integers(0, 2)), min_size=1
).filter(lambda rows: any(end is not End.ENVIRONMENT_FAILURE for end, *_ in rows))


@given(batches)
def test_shares_sum_to_one_and_means_follow_from_the_strata(rows):
    episodes = [
        make_episode(str(i), end=end, searches=searches, reward=None if end is End.ENVIRONMENT_FAILURE else reward)
        for i, (end, searches, reward, _) in enumerate(rows)
    ]
    metrics = batch_metrics(episodes, [len(e.searches) for e in episodes], [group for *_, group in rows])
    shares = {name: value for name, value in metrics.items() if name.startswith("strata/") and name.endswith("/share")}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(value for name, value in metrics.items() if name.startswith("ends/")) == pytest.approx(1)
    mean = sum(share * metrics[name.replace("/share", "/reward")] for name, share in shares.items())
    assert metrics["reward/mean"] == pytest.approx(mean)
    assert metrics["tokens/model"] + metrics["tokens/environment"] == sum(len(e.completion_ids) for e in episodes)
    assert metrics["tokens/model"] == sum(map(sum, (e.action_mask for e in episodes)))
    assert 0 <= metrics["groups/reward_varies"] <= 1
