"""Rewards see the model's answer and nothing else of the episode."""

import pytest

from agentrl.config import RewardConfig
from agentrl.rewards import REWARDS
from agentrl.types import Action, ActionKind, End, Question, Trajectory, Turn

QUESTION = Question("q", "What is the capital of Japan?", ("Tokyo", "Tōkyō"))


def episode(answer, observation="", end=End.ANSWERED):
    turn = Turn((1,), (0.0,), "", Action(ActionKind.SEARCH, "Japan"), 0, None, (2,), observation)
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
