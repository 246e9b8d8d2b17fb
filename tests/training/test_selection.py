"""What a step picks and how much it asks for, whatever the order in which groups get done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.training.selection import Selection, SignalShare


def play(signal, wanted, most, expected, choose, watch=lambda selection, under_way: None):
    """Ask and answer until the step is whole; `choose` picks which of the groups under way gets done next, and `watch` sees
    what is under way while the step waits for it."""
    selection, under_way = Selection(wanted, most, expected), []
    while selection.done is None:
        count = selection.missing
        under_way += range(selection.asked, selection.asked + count)
        selection.ask(count)
        watch(selection, under_way)
        index = choose(under_way)
        under_way.remove(index)
        selection.add(index, signal[index])
    return selection


cases = st.tuples(
    st.lists(st.booleans(), min_size=40, max_size=40), st.integers(1, 8), st.integers(0, 32), st.floats(0, 1)
)


@given(cases, st.randoms(use_true_random=False))
def test_the_first_groups_with_a_signal_are_picked_in_the_order_of_their_questions(case, rng):
    signal, wanted, extra, expected = case
    selection = play(signal, wanted, wanted + extra, expected, rng.choice)
    done = selection.done
    assert done == signal[: len(done)]
    assert sum(done) == wanted or len(done) == wanted + extra
    assert sum(done[:-1]) < wanted
    assert len(done) <= selection.asked <= wanted + extra


@given(cases, st.randoms(use_true_random=False))
def test_a_step_waits_only_while_what_is_under_way_can_be_expected_to_fill_it(case, rng):
    signal, wanted, extra, expected = case

    def watch(selection, under_way):
        enough = selection.found + len(under_way) * max(expected, 0.25) >= wanted - 1e-5
        assert under_way
        assert enough or selection.asked == wanted + extra

    play(signal, wanted, wanted + extra, expected, rng.choice, watch)


@pytest.mark.parametrize(("expected", "first"), [(1.0, 8), (0.8, 10), (0.5, 16), (0.1, 32)])
def test_as_many_questions_are_asked_at_once_as_a_step_can_be_expected_to_need(expected, first):
    assert Selection(8, 100, expected).missing == first
    assert Selection(8, 12, expected).missing == min(first, 12)


def test_the_share_with_a_signal_is_that_of_the_last_eight_steps():
    share = SignalShare()
    assert share.value == 1.0
    share.observe({"reward/mean": 0.5})
    assert share.value == 1.0
    share.observe({"selection/sampled_groups": 10.0, "selection/dropped_groups": 10.0})
    assert share.value == 0.0
    for _ in range(8):
        share.observe({"selection/sampled_groups": 8.0, "selection/dropped_groups": 2.0})
    assert share.value == 0.75
