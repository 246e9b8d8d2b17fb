"""Questions of many callers are answered together, and each caller gets its own answers."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrievers.base import RetrieverError
from retrievers.batching import MicroBatches


class Doubler:
    """Answers twice the number; refuses a batch with a negative one, and breaks at 13."""

    def __init__(self, largest=4):
        self.pool = ThreadPoolExecutor(1)
        self.sizes = []
        self.gate = threading.Event()
        self.gate.set()
        self.batches = MicroBatches(self.pool.submit, self.answer, largest)

    def answer(self, numbers):
        self.gate.wait()
        self.sizes.append(len(numbers))
        if min(numbers) < 0:
            raise RetrieverError(f"{min(numbers)} is negative")
        if 13 in numbers:
            raise ZeroDivisionError("thirteen")
        return [2 * number for number in numbers]


@given(st.lists(st.lists(st.integers(0, 9), max_size=10), max_size=8))
def test_every_caller_gets_its_answers_in_order_and_no_batch_is_too_large(calls):
    async def run():
        doubler = Doubler()
        answers = await asyncio.gather(*(doubler.batches.ask(call) for call in calls))
        doubler.pool.shutdown()
        return doubler, answers

    doubler, answers = asyncio.run(run())
    assert answers == [[2 * number for number in call] for call in calls]
    assert max(doubler.sizes, default=0) <= 4
    assert doubler.batches.waiting == 0


def test_what_waits_while_the_worker_is_busy_shares_its_next_call():
    async def run():
        doubler = Doubler()
        doubler.gate.clear()
        first = asyncio.create_task(doubler.batches.ask([0]))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(doubler.batches.ask([number])) for number in range(1, 4)]
        await asyncio.sleep(0.05)
        doubler.gate.set()
        await asyncio.gather(first, *rest)
        return doubler.sizes

    assert asyncio.run(run()) == [1, 3]


def test_a_bad_question_fails_alone():
    async def run():
        doubler = Doubler()
        return await asyncio.gather(*(doubler.batches.ask([n]) for n in (1, -1, 2)), return_exceptions=True)

    first, bad, last = asyncio.run(run())
    assert (first, last) == ([2], [4])
    assert isinstance(bad, RetrieverError)
    assert "-1 is negative" in str(bad)


def test_once_one_question_failed_the_others_of_its_caller_are_not_tried():
    async def run():
        doubler = Doubler()
        with pytest.raises(RetrieverError, match="-1 is negative"):
            await doubler.batches.ask([-1, 1, 2])
        doubler.pool.shutdown()
        return doubler.sizes

    assert asyncio.run(run()) == [3, 1]


def test_a_defect_of_the_worker_reaches_its_callers_and_later_ones_are_answered():
    async def run():
        doubler = Doubler()
        with pytest.raises(RetrieverError, match="broke: ZeroDivisionError"):
            await doubler.batches.ask([13])
        return await doubler.batches.ask([1])

    assert asyncio.run(run()) == [2]


def test_questions_of_callers_that_gave_up_are_not_answered():
    async def run():
        doubler = Doubler()
        doubler.gate.clear()
        busy = asyncio.create_task(doubler.batches.ask([0]))
        await asyncio.sleep(0.05)
        given_up = asyncio.create_task(doubler.batches.ask([1, 2]))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        doubler.gate.set()
        assert await busy == [0]
        assert await doubler.batches.ask([3]) == [6]
        return doubler.sizes

    assert asyncio.run(run()) == [1, 1]
