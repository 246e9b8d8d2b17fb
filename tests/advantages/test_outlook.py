"""What rollouts say before a run: pushes, and strata that can overtake the leading one."""

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agentrl.advantages.outlook import best_of, outlook

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=6)


@given(REWARDS, st.integers(1, 6))
def test_the_best_of_some_is_the_mean_over_all_choices(rewards, draws):
    draws = min(draws, len(rewards))
    expected = np.mean([max(chosen) for chosen in combinations(rewards, draws)])
    assert best_of(rewards, draws) == pytest.approx(expected)


def sampled(questions, first, second, seed=0, rollouts=8):
    """Rollouts of two strata: `first` and `second` are functions from (rng, question) to a reward."""
    rng = np.random.default_rng(seed)
    rewards, groups, strata = [], [], []
    for question in range(questions):
        for i in range(rollouts):
            strata.append(1 + i % 2)
            rewards.append(float((first, second)[i % 2](rng, question)))
            groups.append(question)
    return rewards, groups, strata


def test_a_stratum_that_fails_now_and_can_answer_more_questions_speaks_for_practice_first():
    # One search answers six questions in ten, always; two answer any question, four times in ten.
    found = outlook(*sampled(60, lambda rng, q: q % 10 < 6, lambda rng, q: rng.random() < 0.4))
    assert found.leader == 1
    assert found.overtaking == (2,)
    assert "1, then 0" in found.verdict
    second = found.strata[1]
    assert second.now.high < 0 < second.best.low
    assert second.pushes["grpo"] < 0


def test_a_stratum_that_is_better_already_speaks_for_grpo():
    found = outlook(*sampled(60, lambda rng, q: rng.random() < 0.2, lambda rng, q: rng.random() < 0.7))
    assert found.leader == 2
    assert found.overtaking == ()
    assert "grpo" in found.verdict
    assert found.strata[1].pushes["grpo"] > 0


def test_strata_that_are_alike_speak_for_no_rule():
    found = outlook(*sampled(200, lambda rng, q: rng.random() < 0.5, lambda rng, q: rng.random() < 0.5, rollouts=64))
    assert found.between_share < 0.1
    assert "hardly differ" in found.verdict


@given(st.integers(0, 1000), st.sampled_from([0.3, 0.8, 1.0]))
def test_pushes_add_up_to_nothing_and_a_blend_pushes_as_grpo_does_but_less(seed, alpha):
    rewards, groups, strata = sampled(20, lambda rng, q: rng.random() < 0.3, lambda rng, q: rng.random() < 0.6, seed)
    rules = {"grpo": ("grpo", {"eps": 0.0}), "blend": ("stratified", {"alpha": alpha, "eps": 0.0})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentrl.advantages.outlook.RULES", rules)
        found = outlook(rewards, groups, strata)
    for rule in rules:
        assert sum(stratum.pushes[rule] for stratum in found.strata) == pytest.approx(0.0, abs=1e-12)
    # T11: SAN sums to 0 in each stratum and says nothing about the choice of one.
    for stratum in found.strata:
        assert stratum.pushes["blend"] == pytest.approx((1 - alpha) * stratum.pushes["grpo"], abs=1e-12)


def test_the_push_is_the_gradient_of_the_log_share_of_a_softmax():
    rewards, strata = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 1, 1, 2]
    found = outlook(rewards, ["q"] * 6, strata)
    share = np.array([3, 2, 1]) / 6
    advantages = (np.array(rewards) - 0.5) / 0.5
    gradient = sum(a * (np.eye(3)[k] - share) for a, k in zip(advantages, strata, strict=True)) / 6
    assert [stratum.pushes["grpo"] for stratum in found.strata] == pytest.approx(gradient.tolist(), abs=1e-6)


def test_rollouts_that_do_not_count_change_nothing():
    rewards, groups, strata = sampled(20, lambda rng, q: rng.random() < 0.3, lambda rng, q: rng.random() < 0.6)
    failed = outlook([*rewards, 1.0], [*groups, 0], [*strata, 7], [*[True] * len(rewards), False])
    assert failed == outlook(rewards, groups, strata)


def test_one_stratum_has_no_outlook():
    assert outlook([0.0, 1.0], ["q"] * 2, [1, 1]) is None


def test_the_table_shows_strata_pushes_and_the_verdict():
    rewards, groups, strata = sampled(60, lambda rng, q: q % 10 < 6, lambda rng, q: rng.random() < 0.25)
    console = Console(file=io.StringIO(), width=80)
    console.print(outlook(rewards, groups, strata).table())
    text = console.file.getvalue()
    # Each stratum has one line, also where a terminal is narrow.
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["stratum", "1", "2"]
    assert "this speaks for" in " ".join(text.split())


def test_the_leader_is_the_stratum_that_beats_others_on_the_same_questions():
    # A answers the easy questions, in which C fails. Where both occur, B beats A; C is nowhere else.
    rewards, groups, strata = [], [], []
    for question in range(60):
        rewards += [1.0, 0.0, 0.0, 0.0]
        groups += [question] * 4
        strata += ["A", "C", "C", "C"]
    for question in range(60, 80):
        rewards += [0.0, 1.0, 1.0, 1.0]
        groups += [question] * 4
        strata += ["A", "B", "B", "B"]
    for question in range(80, 92):
        rewards += [1.0, 1.0, 0.0, 0.0]
        groups += [question] * 4
        strata += ["B", "B", "C", "C"]
    assert outlook(rewards, groups, strata).leader == "B"


def test_a_few_questions_speak_for_no_rule():
    found = outlook(*sampled(3, lambda rng, q: 0.0, lambda rng, q: rng.random() < 0.5))
    assert "too few" in found.verdict
