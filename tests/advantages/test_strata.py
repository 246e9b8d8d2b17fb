"""What sorts episodes into strata, and what estimators with turns read off them."""

import dataclasses

import numpy as np
import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st

from agentrl.advantages import STRATIFIERS, AdvantageError, get_stratifier, label
from agentrl.advantages.episodes import anchors, episode_strata, length, turn_rewards
from agentrl.advantages.strata import OTHER, cap_strata
from agentrl.types import Action, ActionKind, End, FailureCause, Question, SearchCall, Trajectory, Turn


def turn(kind, passages=None, observation=""):
    """A turn whose search, if there are `passages`, was executed."""
    search = None if passages is None else SearchCall("query", tuple(passages), (1.0,) * len(passages), 0.01)
    return Turn((1, 2), (-0.1, -0.2), "text", Action(kind, "x"), 0, search, (), observation)


def search(*passages, observation=""):
    return turn(ActionKind.SEARCH, passages, observation)


ANSWER = turn(ActionKind.ANSWER)
WRITTEN = turn(ActionKind.SEARCH)
INVALID = turn(ActionKind.INVALID)


def episode(*turns, answer="Lima", end=End.ANSWERED, gold=("p2",)):
    question = Question("q1", "?", ("Lima", "the city of Lima"), metadata={"gold_passage_ids": list(gold)})
    cause = FailureCause.RETRIEVER if end is End.ENVIRONMENT_FAILURE else None
    return Trajectory("e1", question, (5, 6), turns, end, answer=answer, cause=cause)


def key(name, *turns, **fields):
    return get_stratifier(name)(episode(*turns, **fields))


def test_searches_counts_only_those_that_were_executed():
    assert key("searches", ANSWER) == 0
    assert key("searches", search("p1"), search("p1"), WRITTEN, ANSWER) == 2
    assert get_stratifier() is STRATIFIERS["searches"]


def test_outcomes_tell_hits_gold_empty_and_repeated_apart():
    found = key(
        "outcomes", search("p1"), search("p1"), search(), search("p1", "p2"), search("p2"), search("p3"), ANSWER
    )
    assert found == ("hit", "repeated", "empty", "gold", "repeated", "hit")
    assert key("outcomes", search("p2"), gold=()) == ("hit",)
    assert key("outcomes", ANSWER) == ()


def test_effective_searches_brought_something_new():
    assert key("effective_searches", search("p1"), search("p1"), search(), search("p1", "p2"), ANSWER) == 2


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=3), max_size=6))
def test_effective_searches_are_at_most_the_passages_seen(results):
    made = [search(*dict.fromkeys(passages)) for passages in results]
    count = key("effective_searches", *made)
    assert count <= min(len(made), len({passage for passages in results for passage in passages}))


def test_placement_is_the_sequence_of_actions_that_happened():
    opened, unopened = turn(ActionKind.OPEN, observation="text"), turn(ActionKind.OPEN)
    assert key("placement", search("p1"), INVALID, opened, search("p2"), WRITTEN, unopened, ANSWER) == (
        "search",
        "invalid",
        "open",
        "search",
        "answer",
    )


def test_end_and_answered():
    assert key("end", WRITTEN, end=End.TURN_LIMIT, answer=None) == "turn_limit"
    assert key("answered", WRITTEN, end=End.TURN_LIMIT, answer=None) == "unanswered"
    assert key("answered", ANSWER) == "answered"


def test_several_stratifiers_give_a_tuple():
    assert key(["searches", "end"], search("p1"), ANSWER) == (1, "answered")
    assert label(key(["searches", "outcomes"], search("p1"), ANSWER)) == "1, (hit)"


@pytest.mark.parametrize("name", sorted(STRATIFIERS))
def test_every_stratifier_gives_a_hashable_key_with_a_label_of_one_line(name):
    for made in (make_episode("a"), make_episode("b", searches=3), make_episode("c", end=End.ENVIRONMENT_FAILURE)):
        found = STRATIFIERS[name](made)
        assert isinstance(hash(found), int)
        assert label(found)
        assert "\n" not in label(found)


def test_a_stratifier_by_import_path():
    assert get_stratifier("agentrl.advantages.strata:searches") is STRATIFIERS["searches"]


@pytest.mark.parametrize("name", ["serches", "no_such_module:f"])
def test_unknown_stratifier(name):
    with pytest.raises(AdvantageError, match=f"stratifier '{name}'"):
        get_stratifier(name)
    with pytest.raises(AdvantageError, match=f"stratifier '{name}'"):
        get_stratifier(["searches", name])


def test_a_stratum_of_no_stratifier_is_refused():
    with pytest.raises(AdvantageError, match="at least one stratifier"):
        get_stratifier([])


@pytest.mark.parametrize(
    ("key", "text"),
    [(2, "2"), ("late", "late"), ((1, "late"), "1, late"), (("a", ("b", "c")), "a, (b, c)"), ((), "none")],
)
def test_label(key, text):
    assert label(key) == text


def test_a_cap_on_counts_merges_those_from_the_last_on_whichever_are_there():
    capped = cap_strata([0, 1, 2, 3, 7], 3)
    assert capped == [0, 1, 2, 2, 2]
    assert [label(key) for key in capped] == ["0", "1", "2+", "2+", "2+"]
    assert [label(key) for key in cap_strata([0, 3], 3)] == ["0", "2+"]


def test_a_cap_takes_numpys_integers_for_counts():
    assert cap_strata([np.int64(0), np.int64(3), np.int64(5)], 3) == [0, 2, 2]


def test_a_cap_on_other_keys_keeps_the_most_frequent():
    keys = ["a", "a", "a", "b", "c", "b", "d"]
    assert cap_strata(keys, 3) == ["a", "a", "a", "b", OTHER, "b", OTHER]
    assert cap_strata(keys, 4) == keys
    assert cap_strata([("a",), ("b",), ("a",)], 2) == [("a",), ("b",), ("a",)]


@given(st.lists(st.sampled_from(["a", "b", ("c", 1), 3, 0, None, 2]), max_size=20), st.integers(2, 5))
def test_a_cap_holds_and_splits_no_stratum(keys, most):
    capped = cap_strata(keys, most)
    assert len(set(capped)) <= most
    assert all(capped[i] == capped[j] for i in range(len(keys)) for j in range(i) if keys[i] == keys[j])


def test_a_cap_below_two_is_refused():
    with pytest.raises(AdvantageError, match="at 2 or more, got 1"):
        cap_strata([0], 1)


def test_anchors_are_what_was_shown_before_each_turn():
    assert anchors(episode(search("p1", observation="one"), search("p2", observation="two"), ANSWER)) == [
        "",
        "one",
        "two",
    ]
    assert anchors(episode(ANSWER)) == [""]


def test_a_turn_earns_something_where_an_accepted_answer_was_shown():
    shown = episode(
        search("p1", observation="The Limassol coast"), search("p2", observation="… in the City of Lima."), ANSWER
    )
    assert turn_rewards(shown) == [0.0, 1.0, 0.0]
    closed = dataclasses.replace(shown, question=Question("q", "?", ("the",)))
    assert turn_rewards(closed) == [0.0, 0.0, 0.0]


def test_length_counts_the_models_tokens_and_is_never_zero():
    assert length(episode(search("p1", observation="long"), ANSWER)) == 4
    assert length(episode()) == 1


def test_a_cap_is_drawn_by_the_episodes_that_count():
    often = [episode(ANSWER)] * 2 + [episode(search("p1"), ANSWER)] * 2 + [episode(INVALID, ANSWER)]
    failed = [episode(search("p1"), search("p2"), end=End.ENVIRONMENT_FAILURE)] * 3
    placement = get_stratifier("placement")
    strata = episode_strata([*failed, *often], placement, 3)
    assert strata == [placement(one) for one in [*failed, *often]]


def test_a_stratifier_that_fails_is_named_with_its_line_and_the_episode():
    def broken(trajectory):
        raise KeyError("boom")

    with pytest.raises(
        AdvantageError, match=rf"fails for episode e1 of question q1: KeyError: 'boom' \({__file__}:\d+\)"
    ):
        episode_strata([episode(ANSWER)], broken, None)
