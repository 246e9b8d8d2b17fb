"""The scores agree with SQuAD's and HotpotQA's scripts, and the interval with Wilson's formula."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentrl.scores import exact_match, f1, normalize_answer, wilson

words = st.text(alphabet="abc ", max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles!", "beatles"),
        ("an  apple\ta  day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("São Paulo", "são paulo"),
        ("+43", "43"),
        ("The A", ""),
    ],
)
def test_normalize_answer_follows_squad(text, expected):
    assert normalize_answer(text) == expected


@given(st.text())
def test_text_that_is_normalised_twice_changes_no_more_than_its_letters_case(text):
    once = normalize_answer(text)
    assume(once.lower() == once)
    assert normalize_answer(once) == once


def test_exact_match_accepts_any_of_the_answers():
    assert exact_match("the Eiffel tower.", ["Tour Eiffel", "Eiffel Tower"]) == 1.0
    assert exact_match("Eiffel", ["Tour Eiffel", "Eiffel Tower"]) == 0.0


def test_an_accepted_answer_that_normalises_to_nothing_is_no_free_point():
    assert exact_match("", ["+"]) == 0.0
    assert exact_match("the", ["A"]) == 0.0
    assert exact_match("+ ", ["+"]) == 1.0


def test_f1_is_the_best_over_the_answers():
    assert f1("Johann Goethe", ["Faust", "Johann Wolfgang von Goethe"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    assert f1("new new york", ["new york"]) == pytest.approx(0.8)


@pytest.mark.parametrize("closed", ["yes", "no", "noanswer"])
def test_closed_answers_match_nothing_but_themselves(closed):
    assert f1(closed, [closed]) == 1.0
    assert f1(f"{closed} indeed", [closed]) == 0.0
    assert f1(closed, [f"{closed} indeed"]) == 0.0


@given(words, st.lists(words, min_size=1, max_size=3))
def test_f1_is_a_share_and_never_below_exact_match(prediction, golds):
    assert 0.0 <= exact_match(prediction, golds) <= f1(prediction, golds) <= 1.0


@given(words, words)
def test_f1_is_symmetric(a, b):
    assert f1(a, [b]) == pytest.approx(f1(b, [a]))


@pytest.mark.parametrize("score", [exact_match, f1])
def test_no_accepted_answer_is_an_error(score):
    with pytest.raises(ValueError, match="no accepted answer"):
        score("x", [])


@pytest.mark.parametrize("n", [*range(1, 70), 100, 500, 2000])
def test_the_interval_of_none_begins_at_0_and_of_all_ends_at_1(n):
    assert wilson(0, n)[0] == 0.0
    assert wilson(n, n)[1] == 1.0


def test_wilson_gives_the_published_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0.0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1.0
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(pair):
    successes, n = pair
    share = successes / n
    for bound in wilson(successes, n):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, n)
