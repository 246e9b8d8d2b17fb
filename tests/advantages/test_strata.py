"""What sorts episodes into strata, and what estimators with turns read off them."""

import dataclasses
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st

from agentrl.advantages import STRATIFIERS, AdvantageError, get_stratifier, label
from agentrl.advantages.episodes import anchors, episode_advantages, group_strata, length, presence
from agentrl.advantages.strata import OTHER, cap_strata
from agentrl.types import Action, End, FailureCause, Question, ToolCall, Trajectory, Turn


def turn(kind, passages=None, observation=""):
    """A turn whose call, if there are `passages`, was executed."""
    made = () if passages is None else (ToolCall(kind, {}, 0.01, tuple(passages), (1.0,) * len(passages)),)
    return Turn((1, 2), (-0.1, -0.2), "text", Action(kind, "x"), 0, made, (), observation)


def search(*passages, observation=""):
    return turn("search", passages, observation)


ANSWER = turn("answer")
WRITTEN = turn("search")
INVALID = turn("invalid")


def episode(*turns, answer="Lima", end=End.ANSWERED, gold=("p2",)):
    question = Question("q1", "?", ("Lima", "the city of Lima"), metadata={"gold_passage_ids": list(gold)})
    cause = FailureCause.RETRIEVER if end is End.ENVIRONMENT_FAILURE else None
    return Trajectory("e1", question, (5, 6), turns, end, answer=answer, cause=cause)


def key(name, *turns, **fields):
    return get_stratifier(name)([episode(*turns, **fields)])[0]


def test_searches_counts_only_those_that_were_executed():
    assert key("searches", ANSWER) == 0
    assert key("searches", search("p1"), search("p1"), WRITTEN, ANSWER) == 2
    assert get_stratifier()([episode(ANSWER), episode(search("p1"), ANSWER)]) == [0, 1]


def test_strata_by_tool_count_every_call_that_was_executed():
    turns = search("p1"), turn("open", ["whole"]), turn("sum", []), WRITTEN, search("p2"), ANSWER
    assert key("calls", *turns) == 4
    assert key("tools", *turns) == ("search", "open", "sum", "search")
    assert key("tool_set", *turns) == ("open", "search", "sum")
    assert (key("searches", *turns), key("calls", ANSWER), key("tools", ANSWER)) == (2, 0, ())


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
    opened, unopened = turn("open", ["whole"]), turn("open")
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


def test_the_question_set_is_a_stratum_of_whole_questions():
    named = dataclasses.replace(episode(ANSWER), question=Question("q", "?", ("x",), "nq"))
    assert get_stratifier("dataset")([named, episode(ANSWER)]) == ["nq", "unnamed"]


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
    assert key("agentrl.advantages.strata:searches", search("p1"), ANSWER) == 1


@pytest.mark.parametrize("name", ["serches", "no_such_module:f"])
def test_unknown_stratifier(name):
    for stratum in (name, ["searches", name], f"random_like:{name}"):
        with pytest.raises(AdvantageError, match=f"stratifier '{name}'"):
            get_stratifier(stratum)


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
    assert presence(shown) == [0.0, 1.0, 0.0]
    closed = dataclasses.replace(shown, question=Question("q", "?", ("the",)))
    assert presence(closed) == [0.0, 0.0, 0.0]


def of_turns(name, *earned, reward=0.0):
    """An episode whose observations hold the accepted answer, with what a reward gave each turn."""
    turns = [*(search("p1", observation="Lima") for _ in earned[1:]), ANSWER]
    return dataclasses.replace(episode(*turns), id=name).with_reward(reward, turn_rewards=earned or None)


def advantages_of(*episodes, **options):
    return episode_advantages(
        episodes, [0] * len(episodes), [0] * len(episodes), estimator="mt_grpo", scope="prompt", options=options
    ).values


def test_what_a_reward_gives_the_turns_takes_the_place_of_presence():
    given = [of_turns("a", 0.0, 9.0), of_turns("b", 1.0, 9.0), of_turns("c", 2.0, 9.0)]
    (low, _), (middle, _), (high, _) = advantages_of(*given)
    assert low < middle == 0.0 < high
    # All of them were shown the answer, which is what counts where no reward gives turns a value.
    plain = [dataclasses.replace(trajectory, turn_rewards=None) for trajectory in given]
    assert np.all(np.asarray(advantages_of(*plain)) == 0.0)


def test_episodes_with_and_without_values_for_turns_are_not_compared():
    with pytest.raises(
        AdvantageError, match="none to those of episode b; return Earned for every episode, or for none"
    ):
        advantages_of(of_turns("a", 0.0, 1.0), dataclasses.replace(of_turns("b", 0.0, 1.0), turn_rewards=None))


def test_a_failed_episode_needs_no_values_for_its_turns():
    failed = of_turns("c", 0.0, 1.0).failed(FailureCause.CODE, "broken")
    assert failed.turn_rewards is None
    (low, _), (high, _), (none, _) = advantages_of(of_turns("a", 0.0, 1.0), of_turns("b", 1.0, 1.0), failed)
    assert low < 0.0 < high
    assert none == 0.0


def test_length_counts_the_models_tokens_and_is_never_zero():
    assert length(episode(search("p1", observation="long"), ANSWER)) == 4
    assert length(episode()) == 1


def test_a_cap_is_drawn_by_the_episodes_that_count():
    often = [episode(ANSWER)] * 2 + [episode(search("p1"), ANSWER)] * 2 + [episode(INVALID, ANSWER)]
    failed = [episode(search("p1"), search("p2"), end=End.ENVIRONMENT_FAILURE)] * 3
    placement = get_stratifier("placement")
    strata = group_strata([[*failed, *often]], placement, 3, "prompt")
    assert strata == placement([*failed, *often])


def broken(trajectory):
    raise KeyError("boom")


@pytest.mark.parametrize("name", ["test_strata:broken", "random_like:test_strata:broken"])
def test_a_stratifier_that_fails_is_named_with_its_line_and_the_episode(name):
    with pytest.raises(
        AdvantageError, match=rf"fails for episode e1 of question q1: KeyError: 'boom' \({__file__}:\d+\)"
    ):
        get_stratifier(name)([episode(ANSWER)])


GROUPS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([End.ANSWERED, End.INVALID, End.ENVIRONMENT_FAILURE]))),
    max_size=4,
)


def groups_of(drawn):
    return [
        [make_episode(f"7/{q}/{i}", searches=searches, end=end) for i, (searches, end) in enumerate(group)]
        for q, group in enumerate(drawn)
    ]


@given(
    GROUPS,
    st.integers(0, 3),
    st.none() | st.integers(2, 4),
    st.sampled_from(["prompt", "batch"]),
    st.sampled_from(["searches", "end", ["searches", "end"]]),
)
def test_random_strata_are_as_large_in_each_group_as_the_real_ones(drawn, seed, most, scope, name):
    groups = groups_of(drawn)
    alike = f"random_like:{name}" if isinstance(name, str) else [f"random_like:{part}" for part in name]
    real, dealt = (group_strata(groups, get_stratifier(stratum, seed), most, scope) for stratum in (name, alike))
    start = 0
    for group in groups:
        own = [i for i, one in enumerate(group, start) if one.valid]
        assert Counter(dealt[i] for i in own) == Counter(real[i] for i in own)
        assert {dealt[i] for i in range(start, start + len(group)) if i not in own} <= set(real)
        start += len(group)


@given(GROUPS, st.randoms(use_true_random=False))
def test_random_strata_do_not_depend_on_the_order_of_the_episodes_or_on_failed_ones(drawn, shuffle):
    stratifier = get_stratifier("random_like:searches", 5)
    for group in groups_of(drawn):
        before = {one.id: key for one, key in zip(group, stratifier(group), strict=True)}
        shuffled = shuffle.sample(group, len(group))
        assert {one.id: key for one, key in zip(shuffled, stratifier(shuffled), strict=True)} == before
        sound = [one for one in group if one.valid]
        assert stratifier(sound) == [before[one.id] for one in sound]


def test_random_strata_are_other_ones_for_another_step_question_or_seed():
    def dealt(prefix, seed=0):
        return tuple(get_stratifier("random_like:searches", seed)(eight(prefix)))

    def eight(prefix):
        return [make_episode(f"{prefix}/{i}", searches=i) for i in range(8)]

    assert dealt("3/0") == dealt("3/0")
    assert len({dealt("3/0"), dealt("4/0"), dealt("3/1"), dealt("3/0", seed=1), tuple(range(8))}) == 5


def test_random_strata_are_the_same_in_every_process():
    """Written down, because a run is resumed by another process, and perhaps by another version of Python."""
    episodes = [make_episode(f"3/0/{i}", searches=i) for i in range(8)]
    assert get_stratifier("random_like:searches", 0)(episodes) == DEALT


DEALT = [7, 1, 4, 3, 5, 2, 0, 6]


def test_every_order_of_random_strata_is_as_likely():
    stratifier, steps = get_stratifier("random_like:searches", 0), 6000
    found = Counter(
        tuple(stratifier([make_episode(f"{step}/0/{i}", searches=i) for i in range(3)])) for step in range(steps)
    )
    expected = steps / 6
    assert set(found) == set(permutations(range(3)))
    # Chi-square with 5 degrees of freedom is above 20.5 in one of a thousand sets of draws; these are always the same.
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 20.5


def test_random_parts_of_a_list_are_dealt_alike_and_others_stay():
    group = [make_episode(f"3/0/{i}", searches=i % 3, answer="x" if i % 3 else None) for i in range(8)]
    both = get_stratifier(["random_like:searches", "random_like:answered"])(group)
    assert set(both) == {(0, "unanswered"), (1, "answered"), (2, "answered")}
    one = get_stratifier(["random_like:searches", "answered"])(group)
    assert [key for _, key in one] == get_stratifier("answered")(group)
    assert [key for key, _ in one] == [key for key, _ in both] == get_stratifier("random_like:searches")(group)


@pytest.mark.parametrize("name", ["random_like", "random_like:", ["searches", "random_like:"]])
def test_random_strata_of_no_stratifier_are_refused(name):
    with pytest.raises(AdvantageError, match="needs a stratifier to take sizes from; write it as random_like:searches"):
        get_stratifier(name)
