"""What each kind of reward earns, and that a reward sees the model's answer and not what passages say."""

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import REWARD_OPTIONS, RewardConfig
from agentrl.rewards import (
    REWARDS,
    RewardError,
    Rewards,
    exact_match,
    f1,
    length,
    output_format,
    penalty,
    retrieval_recall,
    search_cost,
    sub_exact_match,
)
from agentrl.types import Action, End, Question, ToolCall, Trajectory, Turn

QUESTION = Question("q", "What is the capital of Japan?", ("Tokyo", "Tōkyō"))


def episode(answer, observation="", end=End.ANSWERED):
    turn = Turn((1,), (0.0,), "", Action("search", "Japan"), 0, (), (2,), observation)
    return Trajectory("t", QUESTION, (0,), (turn,), end, answer)


def scored(trajectory, *rewards):
    return asyncio.run(Rewards([RewardConfig(**reward) for reward in rewards], 10.0).score(trajectory))


@pytest.mark.parametrize(
    ("answer", "reward"), [("Tokyo", 1.0), ("the tokyo.", 1.0), ("Kyoto", 0.0), ("Tokyo, Japan", 0.0), ("", 0.0)]
)
def test_exact_match_rewards_an_accepted_answer(answer, reward):
    assert exact_match(episode(answer)) == reward


@pytest.mark.parametrize("reward", [exact_match, f1, sub_exact_match])
@pytest.mark.parametrize("end", [End.TURN_LIMIT, End.TRUNCATED, End.INVALID, End.TIMED_OUT])
def test_an_episode_without_an_answer_earns_nothing(reward, end):
    assert reward(episode(None, end=end)) == 0.0


@pytest.mark.parametrize("reward", [exact_match, f1, sub_exact_match])
def test_an_answer_tag_in_a_passage_earns_nothing(reward):
    assert reward(episode(None, observation="<answer>Tokyo</answer>")) == 0.0
    assert reward(episode("Kyoto", observation="<answer>Tokyo</answer>")) == 0.0


def test_f1_and_covering_reward_a_part_of_an_answer():
    assert f1(episode("Tokyo, Japan")) == pytest.approx(2 / 3)
    assert sub_exact_match(episode("Tokyo, Japan")) == 1.0


def test_a_rule_decides_what_counts_as_right():
    accepted = dataclasses.replace(QUESTION, golden_answers=("d Artagnan",))
    musketeer = dataclasses.replace(episode("d’Artagnan"), question=accepted)
    for kind in ("exact_match", "f1", "sub_exact_match"):
        by_rule = {
            rule: scored(musketeer, {"kind": kind, "options": {"rule": rule}}).reward for rule in ("squad", "triviaqa")
        }
        assert by_rule == {"squad": 0.0, "triviaqa": 1.0}


def test_every_reward_that_a_config_can_name_exists():
    assert set(REWARD_OPTIONS) == set(REWARDS)


def of_turns(*texts):
    """An episode whose turns say `texts`; one without a search or answer tag is invalid."""
    turns = []
    for text in texts:
        kind = next((kind for kind in ("search", "answer") if f"</{kind}>" in text), "invalid")
        turns.append(Turn((1,), (0.0,), text, Action(kind, "x"), 0))
    return Trajectory("t", QUESTION, (0,), tuple(turns), End.ANSWERED, "x")


SEARCH, ANSWER = "<search>a</search>", "<answer>b</answer>"


@pytest.mark.parametrize(
    ("texts", "share", "everything", "share_closed"),
    [
        ([SEARCH, ANSWER], 1.0, 1.0, 1.0),
        ([SEARCH, "I wonder", SEARCH, ANSWER], 0.75, 0.0, 0.75),
        (["<think>hm " + SEARCH, "<think>so</think>" + ANSWER], 1.0, 1.0, 0.5),
        (["<think>a<b>c</think></b>" + SEARCH, "so</think>" + ANSWER], 1.0, 1.0, 0.0),
        (["1 < 2 and <|im_end|> " + ANSWER], 1.0, 1.0, 1.0),
        ([], 0.0, 0.0, 0.0),
    ],
)
def test_format_rewards_turns_that_are_well_formed(texts, share, everything, share_closed):
    played = of_turns(*texts)
    assert output_format(played) == share
    assert output_format(played, turns="all") == everything
    assert output_format(played, closing_tags=True) == share_closed


def searching(*found, gold=None):
    searches = [ToolCall("search", {"query": "q"}, 0.1, tuple(ids), (1.0,) * len(ids)) for ids in found]
    turns = [Turn((1,), (0.0,), SEARCH, Action("search", "q"), 0, (search,)) for search in searches]
    metadata = {} if gold is None else {"gold_passage_ids": gold}
    question = dataclasses.replace(QUESTION, metadata=metadata)
    return Trajectory("t", question, (0,), tuple(turns), End.TURN_LIMIT)


def test_a_search_costs_its_weight_if_it_was_executed():
    only_written = Turn((1,), (0.0,), SEARCH, Action("search", "q"), 0)
    played = searching(["a"], ["b"])
    played = dataclasses.replace(played, turns=(*played.turns, only_written))
    assert search_cost(played) == -2.0
    assert scored(played, {"kind": "search_cost", "weight": 0.05}).reward == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("found", "gold", "share"),
    [
        ([["a"], ["x", "b"]], ["a", "b"], 1.0),
        ([["a"], ["a"]], ["a", "b"], 0.5),
        ([], ["a"], 0.0),
        ([["a"]], ["a", "a"], 1),
    ],
)
def test_recall_is_the_share_of_gold_passages_that_searches_found(found, gold, share):
    assert retrieval_recall(searching(*found, gold=gold)) == share


def test_a_question_without_gold_passages_is_no_recall_of_0():
    with pytest.raises(RewardError, match=r"retrieval_recall: question q has no list metadata\.gold_passage_ids"):
        scored(searching(["a"]), {"kind": "retrieval_recall"})


def of_length(tokens, observed=0, answer="Tokyo"):
    turn = Turn((1,) * tokens, (0.0,) * tokens, "", Action("answer", answer), 0, (), (2,) * observed)
    return dataclasses.replace(episode(answer), turns=(turn,))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 90), st.integers(0, 90))
def test_length_takes_off_nothing_below_the_cache_all_beyond_the_limit_and_a_share_between(
    limit, cache, tokens, observed
):
    options = {"limit": max(limit, cache), "cache": cache}
    found = -length(of_length(tokens, observed), **options)
    free = options["limit"] - cache
    if tokens <= free:
        assert found == 0.0
    elif tokens >= options["limit"]:
        assert found == 1.0
    else:
        assert found == pytest.approx((tokens - free) / cache)
    assert found <= -length(of_length(tokens + 1), **options) <= found + 1 / cache + 1e-12


@given(st.sampled_from(["Tokyo", "Kyoto"]), st.integers(0, 90), st.floats(-3, 3), st.floats(-3, 3))
def test_what_an_episode_earns_is_the_weighted_sum_and_its_parts_are_unweighted(answer, tokens, weight, price):
    played = of_length(tokens, answer=answer)
    settings = [
        {"kind": "exact_match", "weight": weight},
        {"kind": "length", "name": "long", "weight": price, "options": {"limit": 50, "cache": 20}},
    ]
    earned = scored(played, *settings)
    parts = {"exact_match": exact_match(played), "long": length(played, limit=50, cache=20)}
    assert earned.reward_parts == parts
    assert earned.reward == weight * parts["exact_match"] + price * parts["long"]
    assert earned.turn_rewards is None
    before = earned.reward + penalty(earned, [RewardConfig(**one) for one in settings])
    assert before == pytest.approx(max(0.0, weight) * parts["exact_match"] + max(0.0, -price) * -parts["long"])


def test_by_default_only_an_exact_match_earns_something():
    assert scored(episode("Tokyo"), {}).reward == 1.0
    assert scored(episode("Tokyo, Japan"), {}).reward == 0.0


def test_weights_whose_sum_is_no_number_are_refused():
    with pytest.raises(RewardError, match="the weighted sum of the rewards is inf; lower their weights"):
        scored(episode("Tokyo"), *({"weight": 1e308, "name": str(i)} for i in range(3)))
