"""Batches are made in order, as far ahead as the bound on staleness allows, and no further."""

import threading
import time

import pytest

from agentrl.training.prefetch import Prefetch
from agentrl.types import EnvironmentFailure


class Maker:
    """Makes batches that record the version which was published when they were begun."""

    def __init__(self):
        self.version = 0
        self.begun = []
        self.now = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, step):
        self.now += 1
        assert self.now == 1, "two batches were made at once"
        self.begun.append((step, self.version))
        self.go.wait(10)
        if step == 99:
            raise EnvironmentFailure("the retriever is gone")
        self.now -= 1
        return f"batch {step}"


def publish(prefetch, maker, version):
    maker.version = version
    prefetch.published(version)


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_batch_is_begun_before_the_weights_that_its_bound_asks_for(staleness):
    maker = Maker()
    prefetch = Prefetch(maker, 1, 8, staleness)
    for step in range(1, 9):
        publish(prefetch, maker, step - 1)
        assert prefetch.take(step) == f"batch {step}"
    assert [step for step, _ in maker.begun] == list(range(1, 9))
    assert all(step - 1 - version <= staleness for step, version in maker.begun)


@pytest.mark.parametrize("staleness", [0, 2])
def test_batches_are_made_ahead_up_to_the_bound_while_the_trainer_trains(staleness):
    maker = Maker()
    prefetch = Prefetch(maker, 1, 8, staleness)
    publish(prefetch, maker, 0)
    assert until(lambda: len(maker.begun) == 1 + staleness)
    time.sleep(0.05)
    assert [step for step, _ in maker.begun] == list(range(1, 2 + staleness))


@pytest.mark.parametrize("staleness", [0, 3])
def test_nothing_is_begun_before_the_trainer_has_published_its_weights(staleness):
    maker = Maker()
    prefetch = Prefetch(maker, 1, 2, staleness)
    assert not until(lambda: maker.begun, seconds=0.1)
    publish(prefetch, maker, 0)
    assert prefetch.take(1) == "batch 1"


def test_a_resumed_run_goes_on_at_its_step_and_ends_at_the_last():
    maker = Maker()
    prefetch = Prefetch(maker, 5, 6, 10)
    publish(prefetch, maker, 4)
    assert prefetch.take(5) == "batch 5"
    assert prefetch.take(6) == "batch 6"
    assert [step for step, _ in maker.begun] == [5, 6]


def test_what_goes_wrong_is_raised_where_the_batch_is_taken_and_earlier_batches_are_kept():
    maker = Maker()
    prefetch = Prefetch(maker, 98, 100, 1)
    publish(prefetch, maker, 97)
    assert until(lambda: len(maker.begun) == 2)
    assert prefetch.take(98) == "batch 98"
    with pytest.raises(EnvironmentFailure, match="the retriever is gone"):
        prefetch.take(99)


def test_the_trainer_waits_for_a_batch_that_is_still_being_made():
    maker = Maker()
    maker.go.clear()
    prefetch = Prefetch(maker, 1, 1, 0)
    publish(prefetch, maker, 0)
    threading.Timer(0.05, maker.go.set).start()
    assert prefetch.take(1) == "batch 1"
