"""A step's questions become whole groups in order, each episode gets its own advantage, and failures are counted apart."""

import dataclasses
import json

import numpy as np
import pytest
from fakes import make_episode
from samplers import QUESTIONS, failed, sampler

from agentrl.advantages import ESTIMATORS
from agentrl.types import End, EnvironmentFailure, GroupError


def rewarded(*rewards):
    return lambda question, name, number: make_episode(name, question, reward=rewards[number])


def test_the_next_questions_are_asked_once_each_with_a_whole_group():
    sample, pool, batches, done = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    batch = sample(4)
    assert pool.requests == [(QUESTIONS[0], ["3/0/0", "3/0/1"]), (QUESTIONS[1], ["3/1/0", "3/1/1"])]
    assert pool.temperature == 0.9
    assert [episode.id for episode in batch.trajectories] == ["3/0/0", "3/0/1", "3/1/0", "3/1/1"]
    assert batches == [(3, tuple(batch.trajectories[:2])), (3, tuple(batch.trajectories[2:]))]
    assert done == [0, 2, 4]
    assert batch.metrics["questions/used"] == 2


def test_a_step_goes_on_where_the_one_before_ended_also_after_a_resume():
    make = rewarded(*[0.0, 1.0] * 6)
    sample, pool, _, _ = sampler(make)
    first, second = sample(4), sample(4)
    assert [question.id for question, _ in pool.requests] == ["q0", "q1", "q2", "q3"]
    resumed, pool, _, _ = sampler(make, history=[first.metrics, second.metrics])
    assert resumed(4).metrics["questions/used"] == 6
    assert [question.id for question, _ in pool.requests] == ["q0", "q1"]
    assert pool.requests[0][1] == ["3/4/0", "3/4/1"]


def test_a_question_that_comes_twice_makes_two_groups_of_distinct_episodes():
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0), order=[QUESTIONS[0]] * 2)
    batch = sample(4)
    assert len(pool.requests) == 2
    assert len({episode.id for episode in batch.trajectories}) == 4


def test_episodes_that_are_no_whole_groups_are_refused():
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    with pytest.raises(RuntimeError, match="3 episodes are not whole groups of 2"):
        sample(3)
    assert pool.requests == []


def test_advantages_belong_to_their_episodes():
    sample, _, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    batch = sample(4)
    assert len(batch.advantages) == len(batch.trajectories)
    assert [advantage > 0 for advantage in batch.advantages] == [
        episode.reward == 1.0 for episode in batch.trajectories
    ]
    assert batch.advantages[0] == -batch.advantages[1] == batch.advantages[3] == -batch.advantages[2] != 0


def test_episodes_are_compared_within_their_own_group_alone():
    sample, _, _, _ = sampler(rewarded(1.0, 1.0, 1.0, 0.0))
    assert sample(4).advantages[:2] == [0.0, 0.0]


def test_episodes_are_compared_with_those_that_searched_as_often():
    def make(question, name, number):
        return make_episode(
            name, question, searches=number % 2, reward=[0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0][number]
        )

    sample, _, _, _ = sampler(make, size=4, estimator="stratified")
    batch = sample(8)
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
    batch = sample(4)
    assert batch.advantages[1] == 0.0
    assert [advantage > 0 for advantage in batch.advantages] == [True, False, False, True]
    assert batch.metrics["reward/mean"] == pytest.approx(2 / 3)
    assert batch.metrics["ends/environment_failure"] == 0.25
    causes = {name: value for name, value in batch.metrics.items() if name.startswith("failures/")}
    assert causes.pop("failures/retriever") == 1.0
    assert set(causes.values()) == {0.0}
    assert batch.metrics["advantages/excluded"] == 1.0
    assert batch.metrics["episodes"] == 4.0
    assert batch.metrics["strata/0/share"] == 1.0


def test_a_group_of_failures_alone_leaves_the_others_as_they_are():
    def make(question, name, number):
        return failed(name, question) if number < 2 else make_episode(name, question, reward=number - 2.0)

    sample, _, _, _ = sampler(make)
    batch = sample(4)
    assert batch.advantages[:2] == [0.0, 0.0]
    assert batch.metrics["groups/reward_varies"] == 1.0


def test_too_many_failures_stop_the_run_with_the_first_and_are_recorded():
    def make(question, name, number):
        return failed(name, question, f"failure {number}") if number else make_episode(name, question, reward=1.0)

    sample, _, batches, _ = sampler(make)
    with pytest.raises(EnvironmentFailure, match=r"3 of 4 episodes failed .*max_failed_share 0\.5 .*: failure 1$"):
        sample(4)
    assert [len(episodes) for _, episodes in batches] == [2, 2]


def test_a_step_without_one_sound_episode_stops_whatever_share_is_allowed():
    sample, _, _, _ = sampler(lambda question, name, number: failed(name, question), most=0.99)
    with pytest.raises(EnvironmentFailure, match="4 of 4 episodes failed"):
        sample(4)


def test_an_episode_that_comes_twice_is_refused():
    sample, _, _, _ = sampler(lambda question, name, number: make_episode("same", question, reward=0.0))
    with pytest.raises(GroupError, match="holds episode same more than once"):
        sample(4)


def test_an_episode_of_another_question_is_refused():
    sample, _, _, _ = sampler(lambda question, name, number: make_episode(name, QUESTIONS[3], reward=0.0))
    with pytest.raises(GroupError, match="group of question 'q0': episode 3/0/0 answers another question, 'q3'"):
        sample(4)


def test_a_group_of_the_wrong_size_is_refused():
    sample, pool, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0))
    pool.play = lambda question, names: [make_episode(names[0], question, reward=0.0)]
    with pytest.raises(GroupError, match="expected 2 episodes"):
        sample(4)


def test_a_schedule_follows_the_steps_of_the_run_and_is_recorded():
    def make(question, name, number):
        return make_episode(name, question, searches=number % 2, reward=float(number % 2))

    options = {"alpha": {"start": 1.0, "end": 0.0, "shape": "step", "at": 0.5}}
    for step, alpha in ((5, 1.0), (6, 0.0)):
        sample, _, _, _ = sampler(make, step=step, estimator="stratified", options=options)
        batch = sample(4)
        assert batch.metrics["advantages/option/alpha"] == alpha
        assert any(batch.advantages) == (alpha == 0.0)


def test_a_progress_rule_resumes_from_the_metrics_of_the_steps_before():
    options = {"alpha": {"rule": "progress", "window": 1, "patience": 1, "least": 1, "stride": 0.5}}
    make = rewarded(*[0.0, 1.0] * 20)
    whole, _, _, _ = sampler(make, estimator="stratified", options=options)
    history = [whole(4).metrics for _ in range(4)]
    assert [metrics["advantages/option/alpha"] for metrics in history] == [1.0, 1.0, 0.5, 0.0]
    resumed, _, _, _ = sampler(make, estimator="stratified", options=options, history=history[:2])
    assert resumed(4).metrics["advantages/option/alpha"] == 0.5


@pytest.mark.parametrize("window", [2, 20])
def test_a_learnt_baseline_resumes_from_the_metrics_of_the_steps_before(window):
    def make(question, name, number):
        _, position, place = map(int, name.split("/"))
        return make_episode(name, question, searches=place % 3, reward=float((position * place) % 7 > 2))

    def run(count, history=()):
        settings = {"estimator": "value_baseline", "options": {"window": window}, "max_strata": 2}
        sample, _, _, _ = sampler(make, size=8, history=history, **settings)
        batches = [sample(16, step=len(history) + step) for step in range(1, count + 1)]
        return [batch.advantages for batch in batches], [batch.metrics for batch in batches]

    def learnt(metrics):
        return {name: value for name, value in metrics.items() if not name.split("/")[0].startswith(("sec", "tokens_"))}

    advantages, metrics = run(5)
    # As a run folder gives them back.
    resumed_advantages, resumed_metrics = run(2, history=[json.loads(json.dumps(line)) for line in metrics[:3]])
    assert resumed_advantages == advantages[3:]
    assert [learnt(line) for line in resumed_metrics] == [learnt(line) for line in metrics[3:]]
    assert {"estimator/r2", "estimator/strata/0/rollouts", "estimator/strata/1+/rollouts"} <= metrics[0].keys()
    fresh, _ = run(1)
    assert fresh[0] == advantages[0]
    forgotten, _ = run(1, history=[learnt(line) | {"estimator/strata/0/rollouts": 0.0} for line in metrics[:3]])
    assert forgotten[0] != advantages[3]


def test_strata_can_be_capped_and_made_of_several_stratifiers():
    def make(question, name, number):
        return make_episode(name, question, searches=number % 4, reward=0.0)

    sample, _, _, _ = sampler(make, size=4, max_strata=3)
    assert {name for name in sample(4).metrics if name.startswith("strata/") and name.endswith("/share")} == {
        "strata/0/share",
        "strata/1/share",
        "strata/2+/share",
    }
    sample, _, _, _ = sampler(make, size=4, stratum=["searches", "end"])
    assert "strata/3, answered/share" in sample(4).metrics


def test_random_strata_come_from_the_seed_and_are_the_same_after_a_resume():
    def make(question, name, number):
        # What an episode is depends on its name alone, as it does in a run that samples from a seed.
        place = int(name.rsplit("/", 1)[1])
        return make_episode(name, question, searches=place % 4, reward=float(place**2 % 11))

    def batches(count, history=(), stratum="random_like:searches", **settings):
        options = {"estimator": "stratified", "options": {"alpha": 1.0}, "stratum": stratum}
        sample, _, _, _ = sampler(make, size=8, history=history, **options, **settings)
        return [sample(16, step=len(history) + step) for step in range(1, count + 1)]

    whole = batches(3)
    (resumed,) = batches(1, history=[batch.metrics for batch in whole[:2]])
    assert resumed.advantages == whole[2].advantages
    groups = [tuple(batch.advantages[i : i + 8]) for batch in whole for i in (0, 8)]
    assert len(set(groups)) == 6
    assert batches(1, seed=1)[0].advantages != whole[0].advantages
    shares = [
        {name: value for name, value in batch.metrics.items() if name.startswith("strata/") and name.endswith("/share")}
        for batch in (whole[0], *batches(1, stratum="searches"))
    ]
    assert shares[0] == shares[1]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_every_estimator_gives_a_batch(estimator):
    def make(question, name, number):
        if number == 3:
            return failed(name, question)
        return make_episode(name, question, searches=number % 3, reward=[1.0, 0, 0.0, 1.0][number % 4])

    sample, _, _, _ = sampler(make, size=4, estimator=estimator)
    batch = sample(8)
    assert len(batch.advantages) == 8
    assert np.any(batch.advantages)
    assert not np.any(batch.advantages[3])
    assert batch.trained == [True] * 3 + [False] + [True] * 4
    if estimator in ("gigpo", "mt_grpo"):
        assert np.shape(batch.advantages) == (8, 3)


def test_staleness_counts_the_versions_since_a_turn_was_sampled():
    def make(question, name, number):
        made = make_episode(name, question, searches=1, reward=float(number % 2))
        turns = [
            dataclasses.replace(turn, adapter_version=version) for turn, version in zip(made.turns, (1, 2), strict=True)
        ]
        return dataclasses.replace(made, turns=tuple(turns))

    sample, _, _, _ = sampler(make, step=3)
    metrics = sample(4).metrics
    assert metrics["staleness/max"] == 1.0
    assert metrics["staleness/mean"] == 0.5


def versions(make, *by_turn):
    def made(question, name, number):
        episode = make(question, name, number)
        turns = [dataclasses.replace(t, adapter_version=v) for t, v in zip(episode.turns, by_turn, strict=True)]
        return dataclasses.replace(episode, turns=tuple(turns)) if number == 0 else episode

    return made


@pytest.mark.parametrize(("staleness", "left_out"), [(0, True), (1, True), (2, False)])
def test_an_episode_with_a_turn_older_than_the_bound_is_left_out_and_counted(staleness, left_out):
    def fresh(question, name, number):
        episode = make_episode(name, question, searches=1, reward=float(number % 2))
        return dataclasses.replace(
            episode, turns=tuple(dataclasses.replace(turn, adapter_version=4) for turn in episode.turns)
        )

    sample, _, batches, _ = sampler(versions(fresh, 2, 4), step=5, staleness=staleness)
    batch = sample(4)
    assert batch.trained == [not left_out, True, True, True]
    assert batch.metrics["failures/stale"] == float(left_out)
    assert batch.metrics["staleness/max"] == (0.0 if left_out else 2.0)
    assert (batch.advantages[0] == 0.0) == left_out
    if left_out:
        episode = batches[0][1][0]
        assert episode.reward is None
        assert episode.failure == f"its engine used weights of 2 steps before, and rollout.max_staleness is {staleness}"


def test_too_many_episodes_of_older_weights_stop_the_run():
    sample, _, _, _ = sampler(rewarded(0.0, 1.0, 1.0, 0.0), staleness=0)
    with pytest.raises(EnvironmentFailure, match=r"4 of 4 episodes failed \(stale 4\), .* weights of 2 steps before"):
        sample(4)


def test_strata_of_free_keys_are_capped_among_the_episodes_that_are_compared():
    """Over the whole step `c` is the most frequent key; a cap there would merge the two of q0 and give it a signal."""
    answers = {"q0": "abb", "q1": "ccc", "q2": "ccc", "q3": "ccd"}
    rewards = {"q0": [1.0, 0.0, 0.0], "q1": [0.0, 1.0, 1.0], "q2": [1.0, 0.0, 0.0], "q3": [1.0, 0.0, 0.0]}

    def make(question, name, number):
        place = int(name.rsplit("/", 1)[1])
        return make_episode(name, question, answer=answers[question.id][place], reward=rewards[question.id][place])

    sample, _, _, _ = sampler(
        make,
        size=3,
        wanted=3,
        estimator="stratified",
        options={"alpha": 1.0},
        stratum="test_sampling:by_answer",
        max_strata=2,
        selection={"enabled": True},
    )
    batch = sample(9)
    assert [episode.question.id for episode in batch.trajectories[::3]] == ["q1", "q2", "q3"]
    assert np.any(np.reshape(batch.advantages, (3, 3)), axis=1).all()
    assert {name for name in batch.metrics if name.startswith("strata/") and name.endswith("/rollouts")} == {
        f"strata/{key}/rollouts" for key in "abcd"
    }


def by_answer(trajectory):
    return trajectory.answer


def overlong(*ends):
    return lambda question, name, number: make_episode(name, question, reward=float(number % 2), end=ends[number])


ENDS = [End.ANSWERED, End.TURN_LIMIT, End.TRUNCATED, End.ANSWERED]


def test_an_overlong_episode_is_compared_and_not_trained_on_where_it_is_masked():
    batches = []
    for mask in (False, True):
        sample, _, _, _ = sampler(overlong(*ENDS), training={"mask_overlong": mask})
        batches.append(sample(4))
    plain, masked = batches
    assert masked.advantages == plain.advantages
    assert (plain.trained, masked.trained) == ([True] * 4, [True, False, False, True])
    assert masked.metrics["overlong/masked_share"] == masked.metrics["overlong/share"] == 0.5
    assert "overlong/masked_share" not in plain.metrics
    assert masked.metrics["tokens/trained"] == plain.metrics["tokens/trained"] / 2


def test_a_group_whose_overlong_episodes_alone_would_have_a_gradient_has_no_signal():
    ends = [End.TURN_LIMIT, End.TRUNCATED, End.ANSWERED, End.ANSWERED, End.TURN_LIMIT, End.ANSWERED]
    settings = {"training": {"mask_overlong": True}, "selection": {"enabled": True}}
    sample, _, _, _ = sampler(overlong(*ends), **settings)
    batch = sample(4)
    assert batch.metrics["selection/dropped_groups"] == 1
    assert [episode.question.id for episode in batch.trajectories] == ["q1", "q1", "q2", "q2"]
    assert batch.trained == [True, True, False, True]
