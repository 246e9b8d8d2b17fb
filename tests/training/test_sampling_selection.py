"""Groups without a learning signal are replaced by the next questions, in the questions' order."""

import random

import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st
from samplers import MANY, NAMES, QUESTIONS, failed, sampler

from agentrl.types import AgentRLError, GroupError


def by_question(rewards):
    """Rewards of the two episodes of each question, by its id."""
    return lambda question, name, number: make_episode(name, question, reward=rewards[question.id][number % 2])


SILENT_FIRST = {"q0": [0.0, 0.0], "q1": [0.0, 1.0], "q2": [1.0, 1.0], "q3": [1.0, 0.0]}


def test_without_selection_groups_without_signal_stay():
    sample, pool, _, _ = sampler(by_question(SILENT_FIRST))
    batch = sample(4)
    assert len(pool.requests) == 2
    assert batch.trained == [True] * 4
    assert batch.advantages[:2] == [0.0, 0.0]


def test_selection_replaces_groups_without_signal_by_the_next_questions():
    sample, pool, batches, done = sampler(by_question(SILENT_FIRST), selection={"enabled": True})
    batch = sample(4)
    assert [question.id for question, _ in pool.requests] == ["q0", "q1", "q2", "q3"]
    assert [episode.question.id for episode in batch.trajectories] == ["q1", "q1", "q3", "q3"]
    assert batch.trained == [True] * 4
    assert all(batch.advantages)
    assert batch.metrics["selection/sampled_groups"] == 4
    assert batch.metrics["selection/dropped_groups"] == 2
    assert batch.metrics["selection/unfilled_groups"] == 0
    # What is dropped is recorded and counted all the same.
    assert [episodes[0].question.id for _, episodes in batches] == ["q0", "q1", "q2", "q3"]
    assert batch.metrics["reward/mean"] == 0.5
    assert batch.metrics["episodes"] == 8
    assert done == [0, 0, 2, 2, 4]


def test_values_of_turns_alone_are_a_signal_to_an_estimator_that_compares_turns():
    def make(question, name, number):
        made = make_episode(name, question, searches=1)
        early = float(number % 2) if question.id == "q1" else 0.5
        return made.with_reward(0.0, turn_rewards=(early, 0.0))

    for estimator, kept in (("mt_grpo", ["q1"]), ("grpo", [])):
        selection = {"enabled": True, "max_extra": 1.0}
        sample, _, _, _ = sampler(make, wanted=2, estimator=estimator, selection=selection)
        batch = sample(4)
        trained = [t.question.id for t, trains in zip(batch.trajectories, batch.trained, strict=True) if trains]
        assert sorted(set(trained)) == kept


def test_selection_keeps_to_its_bound_and_does_not_train_on_what_fills_the_batch():
    rewards = {name: [0.0, 0.0] for name in SILENT_FIRST} | {"q1": [0.0, 1.0]}
    sample, pool, _, _ = sampler(by_question(rewards), selection={"enabled": True, "max_extra": 0.5})
    batch = sample(4)
    assert [question.id for question, _ in pool.requests] == ["q0", "q1", "q2"]
    assert [episode.question.id for episode in batch.trajectories] == ["q1", "q1", "q0", "q0"]
    assert batch.trained == [True, True, False, False]
    assert batch.metrics["selection/unfilled_groups"] == 1
    assert batch.metrics["tokens/trained"] == 2 * (2 + 2)


def test_selection_without_a_bound_stops_after_as_many_questions_as_there_are():
    rewards = {name: [1.0, 1.0] for name in SILENT_FIRST}
    sample, pool, _, _ = sampler(by_question(rewards), selection={"enabled": True, "max_extra": None})
    with pytest.raises(AgentRLError, match=r"6 questions gave 0 groups with a learning signal instead of 2"):
        sample(4)
    assert len(pool.requests) == 6


def of_a_draw(seed):
    """Episodes whose reward depends on their question and the seed alone, and half of whose groups have no signal."""

    def make(question, name, number):
        rng = random.Random(f"{seed} {question.id}")
        rewards = rng.choice([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
        return make_episode(name, question, reward=rewards[int(name.rsplit("/", 1)[1])])

    return make


@pytest.mark.slow
@given(st.integers(0, 1000), st.randoms(use_true_random=False), st.sampled_from([0.5, 1.0, 2.0, None]))
def test_what_is_trained_on_does_not_depend_on_the_order_in_which_groups_get_done(seed, rng, most):
    selection = {"enabled": True, "max_extra": most}
    results = []
    for pick in (min, max, rng.choice):
        sample, _, batches, _ = sampler(of_a_draw(seed), order=MANY, pick=pick, wanted=4, selection=selection)
        steps = [sample(8, step) for step in (1, 2, 3)]
        for batch in steps:
            surplus = batch.metrics.pop("selection/surplus_groups")
            assert surplus >= 0
            assert [batch.metrics.pop(name) > 0 for name in ("seconds/rollout", "tokens_per_second/rollout")]
        results.append((steps, [(step, episodes) for step, episodes in batches]))
    assert results[0] == results[1] == results[2]


def test_a_step_begins_at_the_question_after_the_last_that_counts_and_gives_up_what_is_beyond():
    rewards = {name: [0.0, 0.0] for name in NAMES[:2]} | {name: [0.0, 1.0] for name in NAMES[2:]}
    sample, pool, batches, _ = sampler(by_question(rewards), order=MANY, wanted=2, selection={"enabled": True})
    first, second = sample(4, 1), sample(4, 2)
    assert [episode.question.id for episode in first.trajectories[::2]] == ["q2", "q3"]
    assert first.metrics["selection/surplus_groups"] == 0
    # Half of the groups of the first step had no signal, so the second asks for twice as many at once.
    assert [question.id for question, _ in pool.requests[4:]] == ["q4", "q5", "q6", "q7"]
    assert pool.given_up == ["q6", "q7"]
    assert second.metrics["selection/surplus_groups"] == 2
    assert second.metrics["questions/used"] == 6
    assert [episodes[0].question.id for step, episodes in batches if step == 2] == ["q4", "q5"]
    third = sample(4, 3)
    assert [episode.question.id for episode in third.trajectories[::2]] == ["q6", "q7"]


def test_a_resumed_run_asks_for_as_many_questions_at_once_as_an_unbroken_one():
    make = of_a_draw(7)
    whole, pool, _, _ = sampler(make, order=MANY, wanted=4, selection={"enabled": True})
    history = [whole(8, step).metrics for step in (1, 2, 3)]
    before = len(pool.requests)
    whole(8, 4)
    resumed, other, _, _ = sampler(make, order=MANY, wanted=4, selection={"enabled": True}, history=history)
    resumed(8, 4)
    assert other.requests == pool.requests[before:]


def test_more_questions_are_asked_before_the_slowest_group_is_done():
    rewards = {name: [0.0, 1.0] for name in NAMES} | {"q1": [0.0, 0.0], "q2": [0.0, 0.0]}
    waits_for_q0 = lambda under_way: max(under_way)  # noqa: E731
    sample, pool, _, _ = sampler(
        by_question(rewards), order=MANY, pick=waits_for_q0, wanted=3, selection={"enabled": True}
    )
    batch = sample(6)
    assert [episode.question.id for episode in batch.trajectories[::2]] == ["q0", "q3", "q4"]
    assert [question.id for question, _ in pool.requests] == ["q0", "q1", "q2", "q3", "q4"]


def test_a_group_of_failures_alone_has_no_signal():
    def make(question, name, number):
        return failed(name, question) if question.id == "q0" else make_episode(name, question, reward=number % 2 * 1.0)

    sample, _, _, _ = sampler(make, selection={"enabled": True})
    assert [episode.question.id for episode in sample(4).trajectories[::2]] == ["q1", "q2"]


def test_what_went_wrong_stays_in_the_record_also_beyond_a_question_that_is_not_done():
    def make(question, name, number):
        return make_episode(name, QUESTIONS[0] if question.id == "q1" else question, reward=0.0)

    order = iter([2, 1])
    sample, _, batches, _ = sampler(make, pick=lambda under_way: next(order), wanted=3)
    with pytest.raises(GroupError):
        sample(6)
    assert [[episode.question.id for episode in episodes] for _, episodes in batches] == [["q2", "q2"]]


def test_selection_asks_the_estimator_that_is_chosen():
    """A group whose strata are constant has a signal for GRPO and none for pure SAN."""

    def make(question, name, number):
        return make_episode(name, question, searches=number % 2, reward=float(number % 2))

    for estimator, dropped in (("grpo", 0), ("stratified", 4)):
        options = {} if estimator == "grpo" else {"alpha": 1.0}
        sample, _, _, _ = sampler(
            make, estimator=estimator, options=options, selection={"enabled": True, "max_extra": 1.0}
        )
        assert sample(4).metrics["selection/dropped_groups"] == dropped


def test_selection_is_about_rewards_and_not_about_terms_that_are_there_without_them():
    def make(question, name, number):
        return make_episode(name, question, searches=int(number % 4 == 0), reward=0.0)

    sample, _, _, _ = sampler(
        make, size=4, estimator="stratified", options={"alpha": 1.0, "balance": 0.5}, selection={"enabled": True}
    )
    batch = sample(8)
    assert batch.metrics["selection/dropped_groups"] == 6
    assert batch.trained == [False] * 8
