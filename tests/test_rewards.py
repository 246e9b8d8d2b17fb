"""Rewards see the model's answer and nothing else of the episode."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import LengthConfig, RewardConfig
from agentrl.rewards import REWARDS, length_penalty, make_reward
from agentrl.types import ANSWER, SEARCH, Action, End, Question, Trajectory, Turn

QUESTION = Question("q", "What is the capital of Japan?", ("Tokyo", "Tōkyō"))


def episode(answer, observation="", end=End.ANSWERED):
    turn = Turn((1,), (0.0,), "", Action(SEARCH, "Japan"), 0, None, (2,), observation)
    return Trajectory("t", QUESTION, (0,), (turn,), end, answer)


@pytest.mark.parametrize(
    ("answer", "reward"), [("Tokyo", 1.0), ("the tokyo.", 1.0), ("Kyoto", 0.0), ("Tokyo, Japan", 0.0), ("", 0.0)]
)
def test_exact_match_rewards_an_accepted_answer(answer, reward):
    assert REWARDS["exact_match"](episode(answer)) == reward


@pytest.mark.parametrize("end", [End.TURN_LIMIT, End.TRUNCATED, End.INVALID, End.TIMED_OUT])
def test_an_episode_without_an_answer_earns_nothing(end):
    assert REWARDS["exact_match"](episode(None, end=end)) == 0.0


def test_an_answer_tag_in_a_passage_earns_nothing():
    assert REWARDS["exact_match"](episode(None, observation="<answer>Tokyo</answer>")) == 0.0
    assert REWARDS["exact_match"](episode("Kyoto", observation="<answer>Tokyo</answer>")) == 0.0


def test_every_reward_that_a_config_can_name_exists():
    kinds = RewardConfig.model_fields["kind"].annotation.__args__
    assert set(kinds) == set(REWARDS)


def of_length(tokens, observed=0, answer="Tokyo"):
    turn = Turn((1,) * tokens, (0.0,) * tokens, "", Action(ANSWER, answer), 0, None, (2,) * observed)
    return dataclasses.replace(episode(answer), turns=(turn,))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 90), st.integers(0, 90))
def test_length_takes_off_nothing_below_the_cache_all_beyond_the_limit_and_a_share_between(
    limit, cache, tokens, observed
):
    settings = LengthConfig(limit=max(limit, cache), cache=cache)
    found = length_penalty(of_length(tokens, observed), settings)
    free = settings.limit - settings.cache
    if tokens <= free:
        assert found == 0.0
    elif tokens >= settings.limit:
        assert found == 1.0
    else:
        assert found == pytest.approx((tokens - free) / cache)
    assert found <= length_penalty(of_length(tokens + 1), settings) <= found + 1 / cache + 1e-12


@given(st.sampled_from(["Tokyo", "Kyoto"]), st.integers(0, 90))
def test_a_reward_is_what_the_answer_earns_less_what_its_length_takes_off(answer, tokens):
    played = of_length(tokens, answer=answer)
    settings = LengthConfig(limit=50, cache=20)
    earned = REWARDS["exact_match"](played)
    assert make_reward(RewardConfig())(played) == earned
    assert make_reward(RewardConfig(length=settings))(played) == earned - length_penalty(played, settings)
