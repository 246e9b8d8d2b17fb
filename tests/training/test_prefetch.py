"""Batches are made in order, as far ahead as the bound on staleness allows, and no further."""

import queue
import threading

import pytest

from agentrl.training.prefetch import Prefetch
from agentrl.types import EnvironmentFailure

SECONDS = 60


class Maker:
    """Makes batches while the test allows it, and records the newest version that was published when each was begun."""

    def __init__(self):
        self.version = None
        self.begun = queue.Queue()
        self.now = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, step):
        self.now += 1
        assert self.now == 1, "two batches were made at once"
        self.begun.put((step, self.version))
        assert self.go.wait(SECONDS)
        self.now -= 1
        if step == 99:
            raise EnvironmentFailure("the retriever is gone")
        return f"batch {step}"


def publish(prefetch, maker, version):
    maker.version = version
    prefetch.published(version)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_batch_is_begun_before_the_weights_that_its_bound_asks_for(staleness):
    maker = Maker()
    prefetch = Prefetch(maker, 1, 8, staleness)
    for step in range(1, 9):
        publish(prefetch, maker, step - 1)
        assert prefetch.take(step) == f"batch {step}"
    begun = [maker.begun.get_nowait() for _ in range(8)]
    assert [step for step, _ in begun] == list(range(1, 9))
    assert all(version is not None and step - 1 - version <= staleness for step, version in begun)


@pytest.mark.parametrize("staleness", [0, 2])
def test_batches_are_made_ahead_up_to_the_bound_while_the_trainer_trains(staleness):
    maker = Maker()
    prefetch = Prefetch(maker, 1, 8, staleness)
    publish(prefetch, maker, 0)
    assert [maker.begun.get(timeout=SECONDS) for _ in range(1 + staleness)] == [
        (step, 0) for step in range(1, 2 + staleness)
    ]
    # The next one, had it been begun too early, would have been begun with version 0.
    publish(prefetch, maker, 1)
    assert maker.begun.get(timeout=SECONDS) == (2 + staleness, 1)


def test_a_resumed_run_goes_on_at_its_step_and_ends_at_the_last():
    maker = Maker()
    prefetch = Prefetch(maker, 5, 6, 10)
    publish(prefetch, maker, 4)
    assert prefetch.take(5) == "batch 5"
    assert prefetch.take(6) == "batch 6"
    assert [maker.begun.get_nowait() for _ in range(2)] == [(5, 4), (6, 4)]


def test_what_goes_wrong_is_raised_where_the_batch_is_taken_and_earlier_batches_are_kept():
    maker = Maker()
    prefetch = Prefetch(maker, 98, 100, 1)
    publish(prefetch, maker, 97)
    with pytest.raises(EnvironmentFailure, match="the retriever is gone"):
        prefetch.take(99)
    assert prefetch.take(98) == "batch 98"


def test_the_trainer_waits_for_a_batch_that_is_still_being_made():
    maker = Maker()
    maker.go.clear()
    prefetch = Prefetch(maker, 1, 1, 0)
    publish(prefetch, maker, 0)
    taken = queue.Queue()
    taker = threading.Thread(target=lambda: taken.put(prefetch.take(1)))
    taker.start()
    assert maker.begun.get(timeout=SECONDS) == (1, 0)
    assert taken.empty()
    maker.go.set()
    assert taken.get(timeout=SECONDS) == "batch 1"


def test_who_waits_for_a_batch_can_be_told_that_none_will_come():
    maker = Maker()
    maker.go.clear()
    prefetch = Prefetch(maker, 1, 1, 0)
    publish(prefetch, maker, 0)
    assert maker.begun.get(timeout=SECONDS) == (1, 0)
    prefetch.fail(EnvironmentFailure("the run is stopped"))
    with pytest.raises(EnvironmentFailure, match="the run is stopped"):
        prefetch.take(1)
    maker.go.set()


def test_a_pause_waits_for_the_batch_under_way_and_no_other_begins_before_its_end():
    maker = Maker()
    maker.go.clear()
    prefetch = Prefetch(maker, 1, 3, 1)
    publish(prefetch, maker, 0)
    assert maker.begun.get(timeout=SECONDS) == (1, 0)
    paused, over, ended = threading.Event(), threading.Event(), threading.Event()

    def pause():
        with prefetch.paused():
            paused.set()
            assert over.wait(SECONDS)
            publish(prefetch, maker, 1)
        ended.set()

    threading.Thread(target=pause, daemon=True).start()
    assert not paused.is_set()
    maker.go.set()
    assert prefetch.take(1) == "batch 1"
    assert paused.wait(SECONDS)
    assert maker.begun.empty()
    over.set()
    assert ended.wait(SECONDS)
    # The second one could have begun with version 0, had it not been for the pause.
    assert [maker.begun.get(timeout=SECONDS) for _ in range(2)] == [(2, 1), (3, 1)]


def test_a_pause_ends_with_what_went_wrong():
    maker = Maker()
    prefetch = Prefetch(maker, 99, 100, 1)
    publish(prefetch, maker, 98)
    assert maker.begun.get(timeout=SECONDS) == (99, 98)
    with pytest.raises(EnvironmentFailure, match="the retriever is gone"):
        prefetch.take(99)
    with pytest.raises(EnvironmentFailure, match="the retriever is gone"), prefetch.paused():
        pytest.fail("there is nothing left to wait for")
