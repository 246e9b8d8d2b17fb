"""The per-token views of an episode line up, and a group that is not one cannot be made."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.types import (
    ANSWER,
    INVALID,
    SEARCH,
    TOO_LONG,
    Action,
    End,
    EnvironmentFailure,
    FailureCause,
    GroupError,
    Question,
    ToolCall,
    Trajectory,
    TrajectoryGroup,
    Turn,
    check_failures,
    count_failures,
)

QUESTION = Question("q", "?", ("!",))
OTHER = Question("other", "?", ("!",))


def turn(sampled=(1,), observed=(), calls=(), version=0):
    action = Action(SEARCH if calls else ANSWER, "x")
    return Turn(tuple(sampled), tuple(-0.5 for _ in sampled), "", action, version, calls, tuple(observed))


def episode(name, *turns, question=QUESTION, end=End.ANSWERED):
    return Trajectory(name, question, (9, 9), turns, end)


tokens = st.lists(st.integers(0, 99), max_size=5)
turns = st.lists(st.builds(turn, sampled=tokens, observed=tokens), max_size=5)


@given(turns)
def test_views_have_one_entry_per_token(parts):
    whole = episode("t", *parts)
    size = len(whole.completion_ids)
    assert len(whole.action_mask) == len(whole.logprobs) == len(whole.turn_index) == size
    assert (whole.model_tokens, whole.model_tokens + whole.environment_tokens) == (sum(whole.action_mask), size)


@given(turns)
def test_the_mask_picks_out_what_was_sampled_with_its_logprobs(parts):
    whole = episode("t", *parts)
    picked = [token for token, mine in zip(whole.completion_ids, whole.action_mask, strict=True) if mine]
    assert picked == [token for part in parts for token in part.token_ids]
    assert [value != 0.0 for value in whole.logprobs] == whole.action_mask


@given(turns)
def test_the_turn_index_gives_each_token_back_to_its_turn(parts):
    whole = episode("t", *parts)
    for index, part in enumerate(parts):
        mine = [token for token, i in zip(whole.completion_ids, whole.turn_index, strict=True) if i == index]
        assert mine == [*part.token_ids, *part.observation_ids]


def test_a_turn_needs_a_logprob_for_each_token():
    with pytest.raises(ValueError, match="2 token ids but 1 log-prob"):
        Turn((1, 2), (0.0,), "", Action(ANSWER, "x"), 0)


def test_only_executed_searches_count():
    call = ToolCall(SEARCH, {"query": "x"}, 0.01, ("p1",), (1.0,))
    whole = episode("t", turn(calls=(call,), version=3), turn(version=4))
    assert whole.searches == (call,)
    assert whole.adapter_versions == (3, 4)


def failed(name, cause, question=QUESTION, failure="gone"):
    return Trajectory(name, question, (9, 9), (), End.ENVIRONMENT_FAILURE, cause=cause, failure=failure)


def too_long(name, question=QUESTION):
    return Trajectory(name, question, (), (), End.PROMPT_TOO_LONG, failure=f"the prompt of {question.id} is too long")


def test_only_what_is_not_the_policys_doing_makes_an_episode_invalid():
    ends = {
        end: failed("t", FailureCause.ENGINE) if end is End.ENVIRONMENT_FAILURE else episode("t", end=end)
        for end in End
    }
    assert [end for end, made in ends.items() if not made.valid] == [End.PROMPT_TOO_LONG, End.ENVIRONMENT_FAILURE]


def test_an_episode_is_overlong_where_turns_tokens_or_time_ran_out():
    cut, wrong = (Turn((1,), (0.0,), "", Action(INVALID, reason), 0) for reason in (TOO_LONG, "no tag was closed"))
    found = {end for end in set(End) - {End.ENVIRONMENT_FAILURE} if episode("t", cut, wrong, end=end).overlong}
    assert found == {End.TURN_LIMIT, End.TRUNCATED, End.TIMED_OUT}
    assert episode("t", wrong, cut, end=End.INVALID).overlong
    assert not episode("t", cut, turn()).overlong
    assert not failed("t", FailureCause.TIMEOUT).overlong


@pytest.mark.parametrize("end", End)
def test_an_environment_failure_has_a_cause_and_nothing_else_has(end):
    wrong = None if end is End.ENVIRONMENT_FAILURE else FailureCause.CODE
    with pytest.raises(ValueError, match=r"episode t: end .* and cause .* do not go together"):
        Trajectory("t", QUESTION, (), (), end, cause=wrong)


@given(st.lists(st.sampled_from([None, *FailureCause])))
def test_every_failure_is_counted_once_under_its_cause(causes):
    made = [episode(str(i)) if cause is None else failed(str(i), cause) for i, cause in enumerate(causes)]
    counts = count_failures([*made, too_long("long")])
    assert counts == {cause: causes.count(cause) for cause in FailureCause}


def test_more_failures_than_allowed_are_an_error_that_counts_the_causes_and_quotes_the_first():
    made = [
        episode("a"),
        failed("b", FailureCause.TIMEOUT, OTHER, "too slow"),
        failed("c", FailureCause.RETRIEVER),
        failed("d", FailureCause.RETRIEVER),
    ]
    with pytest.raises(
        EnvironmentFailure,
        match=r"^3 of 4 episodes failed \(retriever 2, timeout 1\), .*max_failed_share 0\.5 .* question other: too slow$",
    ):
        check_failures(made, 0.5)
    check_failures(made, 0.75)


def test_prompts_that_are_too_long_are_no_failures_unless_nothing_else_is_left():
    check_failures([episode("a"), too_long("b"), too_long("c")], 0.0)
    with pytest.raises(
        EnvironmentFailure, match=r"none of 2 episodes can be used; .* question other: the prompt of other is too long"
    ):
        check_failures([too_long("b", OTHER), too_long("c")], 0.5)
    with pytest.raises(EnvironmentFailure, match="none of 2 episodes can be used"):
        check_failures([too_long("b"), failed("c", FailureCause.CODE)], 0.5)


def test_a_reward_makes_a_new_episode_and_leaves_the_old():
    before = episode("t", turn())
    assert (before.with_reward(1.0).reward, before.reward) == (1.0, None)


def test_a_group_of_distinct_episodes_of_one_question_is_made_and_pickles():
    group = TrajectoryGroup(QUESTION, (episode("a", turn()), episode("b", turn())), 2)
    assert pickle.loads(pickle.dumps(group)) == group


@pytest.mark.parametrize(
    ("episodes", "size", "message"),
    [
        ((), 0, "at least 2"),
        ((episode("a"),), 1, "at least 2"),
        ((episode("a"), episode("b")), 3, "expected 3 episodes"),
        ((episode("a"), episode("b"), episode("c")), 2, "expected 2 episodes"),
        ((episode("a"), episode("b", question=OTHER)), 2, "episode b answers another question, 'other'"),
        ((episode("a"), episode("b"), episode("a")), 3, "holds episode a more than once"),
    ],
)
def test_a_group_that_is_not_one_is_refused(episodes, size, message):
    with pytest.raises(GroupError, match=message):
        TrajectoryGroup(QUESTION, episodes, size)


@given(st.integers(2, 6), st.data())
def test_no_group_is_made_of_the_mistakes_that_mix_groups_up(size, data):
    """An id that two data sets share, a group of one, an episode that is there twice, one too few or too many."""
    sound = [episode(f"e{i}", turn()) for i in range(size)]
    assert TrajectoryGroup(QUESTION, tuple(sound), size).size == size
    place = data.draw(st.integers(0, size - 1))
    # Both data sets number their questions from 0, so the ids agree and the questions do not.
    elsewhere = Question(QUESTION.id, "asked in another data set", ("?",), "hotpotqa")
    stranger = [*sound[:place], episode("stranger", turn(), question=elsewhere), *sound[place + 1 :]]
    other = data.draw(st.integers(0, size - 1).filter(lambda i: i != place))
    twice = [*sound[:place], sound[other], *sound[place + 1 :]]
    for made, given_size, message in (
        (stranger, size, "answers another question"),
        (twice, size, f"holds episode {sound[other].id} more than once"),
        (sound[:1], 1, "at least 2"),
        (sound[:-1], size, f"expected {size} episodes"),
        ([*sound, episode("more", turn())], size, f"expected {size} episodes"),
    ):
        with pytest.raises(GroupError, match=message):
            TrajectoryGroup(QUESTION, tuple(made), given_size)
