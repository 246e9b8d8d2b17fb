"""Scores count the questions whose environment held, and say how many did not."""

import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st

from agentrl.evaluation.run import Evaluation, evaluate, score
from agentrl.scores import wilson
from agentrl.types import End, EnvironmentFailure, FailureCause, Question

CUXHAVEN = Question("nq:1", "where does the Elbe end", ("Cuxhaven",), dataset="nq")


def answered(name, answer, searches=0):
    return make_episode(name, CUXHAVEN, answer=answer, searches=searches)


def failed(name):
    return make_episode(name, CUXHAVEN, end=End.ENVIRONMENT_FAILURE, searches=3)


def unanswered(name, end):
    return make_episode(name, CUXHAVEN, end=end, searches=2)


def test_em_f1_searches_and_ends_are_means_over_the_set():
    episodes = [
        answered("a", "the Cuxhaven.", searches=1),
        answered("b", "Cuxhaven harbour", searches=3),
        answered("c", "Hamburg"),
        unanswered("d", End.TURN_LIMIT),
    ]
    result = score("nq", episodes)
    assert (result.dataset, result.n, result.failed) == ("nq", 4, 0)
    assert result.em == 0.25
    assert result.f1 == pytest.approx((1 + 2 / 3) / 4)
    assert result.searches == 1.5
    assert result.ends == {"answered": 0.75, "turn_limit": 0.25}
    assert (result.em_low, result.em_high) == wilson(1, 4)


def test_what_left_a_question_without_a_score_is_counted_by_cause():
    causes = [FailureCause.RETRIEVER, FailureCause.TIMEOUT, FailureCause.RETRIEVER]
    broken = [make_episode(str(i), CUXHAVEN, end=End.ENVIRONMENT_FAILURE, cause=c) for i, c in enumerate(causes)]
    result = score("nq", [answered("a", "Cuxhaven"), *broken, unanswered("long", End.PROMPT_TOO_LONG)])
    assert (result.n, result.failed) == (1, 4)
    assert result.causes == {"prompt_too_long": 1, "retriever": 2, "timeout": 1}
    assert Evaluation.from_dict(Evaluation((result,), ()).to_dict()).sets == (result,)


def test_failed_episodes_are_counted_apart_and_change_nothing_else():
    sound = [answered("a", "Cuxhaven"), answered("b", "Hamburg", searches=1)]
    with_failures = score("nq", [failed("x"), *sound, failed("y")])
    without = score("nq", sound)
    assert (with_failures.n, with_failures.failed) == (2, 2)
    assert (with_failures.em, with_failures.f1, with_failures.searches) == (without.em, without.f1, without.searches)
    assert with_failures.ends == {"answered": 1.0}


@pytest.mark.parametrize(("episodes", "failures"), [([], 0), ([failed("x")], 1)])
def test_a_set_without_sound_episodes_is_known_to_be_unknown(episodes, failures):
    result = score("nq", episodes)
    assert (result.n, result.failed, result.em, result.f1, result.searches) == (0, failures, 0.0, 0.0, 0.0)
    assert (result.em_low, result.em_high) == (0.0, 1.0)
    assert result.ends == {}


@given(st.lists(st.sampled_from(["Cuxhaven", "Hamburg", None, "failure"]), max_size=30))
def test_the_interval_holds_the_score_and_the_ends_sum_to_one(answers):
    episodes = [
        failed(str(i))
        if answer == "failure"
        else answered(str(i), answer)
        if answer
        else unanswered(str(i), End.TRUNCATED)
        for i, answer in enumerate(answers)
    ]
    result = score("nq", episodes)
    assert result.n + result.failed == len(answers)
    assert 0 <= result.em_low <= result.em + 1e-12
    assert result.em - 1e-12 <= result.em_high <= 1
    assert sum(result.ends.values()) == pytest.approx(1 if result.n else 0)
    assert result.em == result.f1


def test_evaluation_is_greedy_once_a_question_and_keeps_the_order_of_the_sets():
    questions = [Question(f"{d}:{i}", "?", ("gold",), dataset=d) for i in range(2) for d in ("nq", "hotpotqa")]
    asked = []

    class Pool:
        def sample(self, requests, temperature, on_done, on_stall, rewarded=True):
            asked.append((temperature, rewarded))
            on_done(len(requests))
            return [[make_episode(name, question, answer="gold")] for question, (name,) in requests]

    done = []
    result = evaluate(Pool(), questions, max_failed_share=0.5, on_done=done.append)
    assert asked == [(0.0, False)]
    assert [t.reward for t in result.trajectories] == [1.0] * 4
    assert done == [4]
    assert [(r.dataset, r.n, r.em) for r in result.sets] == [("nq", 2, 1.0), ("hotpotqa", 2, 1.0)]
    assert [t.id for t in result.trajectories] == [f"eval/{question.id}" for question in questions]
    assert [row["dataset"] for row in result.to_dict()["sets"]] == ["nq", "hotpotqa"]


def test_of_several_samples_a_question_has_their_mean_and_the_interval_is_over_questions():
    questions = [Question(f"nq:{i}", "?", ("gold",), dataset="nq") for i in range(3)]
    asked = []

    class Pool:
        def sample(self, requests, temperature, on_done, on_stall, rewarded):
            asked.append((temperature, [list(names) for _, names in requests]))
            groups = []
            for right, (question, names) in enumerate(requests):
                answers = ["gold"] * right + ["no"] * (2 - right)
                groups.append([make_episode(n, question, answer=a) for n, a in zip(names, answers, strict=True)])
            broken = make_episode("x", questions[1], end=End.ENVIRONMENT_FAILURE)
            groups[1][1] = broken
            return groups

    result = evaluate(Pool(), questions, max_failed_share=0.5, temperature=0.7, samples=2)
    assert asked == [(0.7, [[f"eval/nq:{i}/0", f"eval/nq:{i}/1"] for i in range(3)])]
    (scores,) = result.sets
    # 0 of 2, the one that did not fail, and 2 of 2.
    assert (scores.n, scores.failed, scores.em) == (3, 1, 2 / 3)
    assert (scores.em_low, scores.em_high) == wilson(2.0, 3)
    assert scores.causes == {"retriever": 1}
    assert len(result.trajectories) == 6


def test_an_evaluation_of_which_most_episodes_failed_is_an_error_and_no_score():
    questions = [Question(f"nq:{i}", "?", ("gold",), dataset="nq") for i in range(4)]

    class Pool:
        def sample(self, requests, temperature, on_done, on_stall, rewarded=True):
            end, failure = End.ENVIRONMENT_FAILURE, "the retriever is gone"
            return [[make_episode(name, question, end=end, failure=failure)] for question, (name,) in requests]

    with pytest.raises(EnvironmentFailure, match="the retriever is gone"):
        evaluate(Pool(), questions, max_failed_share=0.5)
