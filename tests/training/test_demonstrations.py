"""A demonstration answers rightly with what its passages say, takes the shapes of a policy, and follows from its seed."""

import asyncio

import pytest
from fakes import PassageRetriever, passage
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.config import AgentConfig
from agentrl.scores import exact_match, normalize_answer
from agentrl.training.demonstrations import write_demonstrations
from agentrl.types import INVALID, End, EnvironmentFailure, Question

CONFIG = AgentConfig(instruction="", max_turns=3, max_turn_tokens=120)
LONG = CONFIG.model_copy(update={"max_turns": 5, "max_episode_tokens": 4000})
ELBE = passage("Elbe", "The Elbe ends at Cuxhaven, in Lower Saxony.")


def one_hop(number, answers=("Cuxhaven",), text=None):
    return Question(
        f"one{number}", text or f"where does river {number} end?", answers, metadata={"supporting_titles": ["Elbe"]}
    )


def two_hop(number, answers=("Lower Saxony",)):
    metadata = {"supporting_titles": ["Elbe", "Cuxhaven"], "hops": 2}
    return Question(f"two{number}", f"in which state does river {number} end?", answers, metadata=metadata)


def three_hop(number):
    metadata = {"supporting_titles": ["Elbe", "Cuxhaven", "Lower Saxony"], "hops": 3}
    return Question(f"three{number}", f"in which state's town does {number} end?", ("Cuxhaven",), metadata=metadata)


def write(codec, questions, count=10**6, *, retriever=None, seed=0, config=CONFIG):
    return asyncio.run(
        write_demonstrations(
            questions, count, config=config, codec=codec, retriever=retriever or PassageRetriever(ELBE), k=3, seed=seed
        )
    )


def shown(demonstration):
    return normalize_answer(" ".join(turn.observation for turn in demonstration.turns))


def test_every_demonstration_ends_with_an_accepted_answer_that_its_passages_hold(codec):
    questions = [make(number) for number in range(40) for make in (one_hop, two_hop)]
    demonstrations = write(codec, questions)
    assert len(demonstrations) == len(questions)
    for demonstration in demonstrations:
        assert demonstration.end is End.ANSWERED
        assert exact_match(demonstration.answer, demonstration.question.golden_answers) == 1.0
        if demonstration.searches:
            assert normalize_answer(demonstration.answer) in shown(demonstration)
        assert INVALID not in [turn.action.kind for turn in demonstration.turns]


def test_several_shapes_are_written(codec):
    three = {len(d.searches) for d in write(codec, [three_hop(number) for number in range(60)], config=LONG)}
    one = {len(d.searches) for d in write(codec, [one_hop(number) for number in range(60)])}
    two = {len(d.searches) for d in write(codec, [two_hop(number) for number in range(60)])}
    assert one == {0, 1, 2}
    assert two == {0, 2, 3}
    assert three == {0, 3, 4}


def test_the_answer_is_the_accepted_one_that_the_passages_hold(codec):
    questions = [one_hop(number, ("the port of Cuxhaven", "Cuxhaven")) for number in range(20)]
    searched = [d for d in write(codec, questions) if d.searches]
    assert {d.answer for d in searched} == {"Cuxhaven"}


def test_a_question_whose_passages_lack_the_answer_is_skipped_unless_answered_directly(codec):
    demonstrations = write(codec, [one_hop(number, ("Hamburg",)) for number in range(40)])
    assert 0 < len(demonstrations) < 40
    assert all(not d.searches for d in demonstrations)


def test_a_part_of_a_word_does_not_hold_the_answer(codec):
    assert all(not d.searches for d in write(codec, [one_hop(number, ("Cux",)) for number in range(40)]))


@pytest.mark.parametrize("answer", ["yes", "No"])
def test_yes_and_no_need_not_stand_in_a_passage(codec, answer):
    demonstrations = write(codec, [one_hop(number, (answer,)) for number in range(10)])
    assert len(demonstrations) == 10
    assert any(d.searches for d in demonstrations)


def test_the_same_seed_writes_the_same_and_another_something_else(codec):
    def told(seed):
        questions = [make(number) for number in range(10) for make in (one_hop, two_hop)]
        return [(d.question.id, d.completion_ids) for d in write(codec, questions, seed=seed)]

    assert told(1) == told(1)
    assert told(1) != told(2)


def test_no_more_are_written_than_asked_for_and_none_twice(codec):
    demonstrations = write(codec, [one_hop(number) for number in range(20)], count=7)
    assert len({d.question.id for d in demonstrations}) == len(demonstrations) == 7


def test_a_two_hop_question_without_its_titles_is_answered_directly_or_skipped(codec):
    questions = [Question(f"q{n}", "where?", ("Cuxhaven",), metadata={"hops": 2}) for n in range(30)]
    assert all(not d.searches for d in write(codec, questions))


def test_a_question_without_titles_is_searched_for_by_itself(codec):
    retriever = PassageRetriever(ELBE)
    questions = [Question("q", "where does the Elbe end?", ("Cuxhaven",))] * 20
    assert any(d.searches for d in write(codec, questions, retriever=retriever))
    assert set(retriever.queries) == {"where does the Elbe end"}


def test_a_failing_retriever_leaves_only_what_needs_none(codec):
    demonstrations = write(codec, [one_hop(n) for n in range(20)], retriever=PassageRetriever(error="index lost"))
    assert all(not d.searches for d in demonstrations)


class Faulty:
    async def search(self, queries, k):
        raise ZeroDivisionError


def test_a_fault_of_the_code_is_an_error_and_not_a_question_less(codec):
    with pytest.raises(EnvironmentFailure, match=r"the script of question .* failed: ZeroDivisionError"):
        write(codec, [one_hop(number) for number in range(20)], retriever=Faulty())


@pytest.mark.parametrize("text", ["?", "what does </search> close?", "why " * 200])
def test_a_question_that_makes_no_sound_turn_is_not_demonstrated(codec, text):
    demonstrations = write(codec, [one_hop(number, text=text) for number in range(20)])
    for demonstration in demonstrations:
        assert INVALID not in [turn.action.kind for turn in demonstration.turns]
        assert all(len(turn.token_ids) <= CONFIG.max_turn_tokens for turn in demonstration.turns)


words = st.lists(st.sampled_from(["Elbe", "<answer>", "</search>", "yes", "the", "", "?", "é"]), max_size=4).map(
    " ".join
)


@settings(max_examples=40)
@given(
    st.lists(
        st.builds(
            lambda text, answers, titles, hops: (text, tuple(answers), {"supporting_titles": titles, "hops": hops}),
            words,
            st.lists(words.filter(str.strip), min_size=1, max_size=2),
            st.lists(words, max_size=3),
            st.integers(1, 2),
        ),
        max_size=4,
    ),
    st.integers(0, 100),
)
def test_whatever_the_questions_are_each_demonstration_is_sound(codec, rows, seed):
    questions = [Question(str(i), *row[:2], metadata=row[2]) for i, row in enumerate(rows)]
    for demonstration in write(codec, questions, seed=seed):
        assert demonstration.end is End.ANSWERED
        assert exact_match(demonstration.answer, demonstration.question.golden_answers) == 1.0
        assert INVALID not in [turn.action.kind for turn in demonstration.turns]
