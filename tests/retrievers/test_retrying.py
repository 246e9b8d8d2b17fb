"""A call is tried again while that helps; when a service fails, one caller at a time finds out whether it is back."""

import asyncio

import pytest
import virtual_clock
from hypothesis import given
from hypothesis import strategies as st

from retrievers.base import RetrieverError
from retrievers.clients.retrying import AttemptFailed, CircuitBreaker, Retrying


class Service:
    """Fails while it is down; knows when it was called, and how many calls were under way at once."""

    def __init__(self, failure=None):
        self.up, self.failure = failure is None, failure or AttemptFailed("it is down")
        self.times = []
        self.now = self.most = 0

    async def __call__(self):
        self.times.append(asyncio.get_running_loop().time())
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.005)
        self.now -= 1
        if not self.up:
            raise self.failure
        return "answer"


def several(breaker, service, count):
    return asyncio.gather(*(breaker.run(service) for _ in range(count)), return_exceptions=True)


async def call(service, retries, **options):
    return await Retrying("it", retries, **options).call(service)


@given(st.integers(0, 9))
def test_the_pauses_double_up_to_eight_seconds_each_shortened_by_up_to_half(retries):
    service = Service(AttemptFailed("broken", busy=True))
    with pytest.raises(RetrieverError, match=rf"^it gave no answer in {retries + 1} attempts; the last one: broken$"):
        virtual_clock.run(call(service, retries))
    assert len(service.times) == retries + 1
    for number, (before, after) in enumerate(zip(service.times, service.times[1:], strict=False)):
        longest = min(0.25 * 2**number, 8.0)
        assert longest / 2 <= after - before - 0.005 <= longest + 1e-9


def test_a_pause_that_the_service_asks_for_is_kept():
    service = Service(AttemptFailed("wait", 30.0))
    with pytest.raises(RetrieverError, match="2 attempts"):
        virtual_clock.run(call(service, 1))
    assert 30.0 <= service.times[1] - service.times[0] - 0.005 <= 36.0
    impatient = Service(AttemptFailed("wait", 3600.0))
    with pytest.raises(RetrieverError, match=r"^it asks to come back in 3600 s: wait$"):
        virtual_clock.run(call(impatient, 5))
    assert len(impatient.times) == 1


def test_another_exception_is_not_tried_again_and_errors_are_of_the_callers_kind():
    service = Service(KeyError("a bug"))
    with pytest.raises(KeyError):
        virtual_clock.run(call(service, 5))
    assert len(service.times) == 1
    with pytest.raises(LookupError, match="it gave no answer in 1 attempts"):
        virtual_clock.run(call(Service(AttemptFailed("broken")), 0, error=LookupError))
    with pytest.raises(LookupError, match="retries is -1 and must not be negative"):
        Retrying("it", -1, LookupError)


def test_calls_pass_at_once_while_the_service_answers():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=3, pause_seconds=60)
        assert await several(breaker, service, 8) == ["answer"] * 8
        assert service.most == 8

    virtual_clock.run(run())


def test_an_open_breaker_lets_one_caller_try_and_closes_for_all_at_its_success():
    async def run():
        service, breaker = Service(AttemptFailed("it is down")), CircuitBreaker("it", threshold=3, pause_seconds=10)
        await several(breaker, service, 3)
        assert breaker.is_open
        service.most = 0
        waiting = asyncio.ensure_future(several(breaker, service, 6))
        await asyncio.sleep(31)
        assert service.most == 1
        service.up = True
        outcomes = await waiting
        assert outcomes[-1] == "answer"
        assert not breaker.is_open
        # Those that were tried while it was down have failed, and nobody was tried twice.
        assert len(service.times) == 3 + 6

    virtual_clock.run(run())


def test_single_failures_busy_services_and_other_exceptions_do_not_open_it():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=2)
        for failure in (AttemptFailed("down"), None, AttemptFailed("busy", busy=True), KeyError("a bug")) * 3:
            service.up, service.failure = failure is None, failure
            await several(breaker, service, 1)
            assert not breaker.is_open

    virtual_clock.run(run())


def test_a_service_that_is_gone_fails_those_who_wait_at_once_and_is_still_tried():
    async def run():
        service = Service(AttemptFailed("it is down"))
        breaker = CircuitBreaker("it", threshold=2, pause_seconds=1, patience_seconds=10)
        while asyncio.get_running_loop().time() < 20:
            await several(breaker, service, 1)
            await asyncio.sleep(0.1)
        tried, began = len(service.times), asyncio.get_running_loop().time()
        outcomes = await several(breaker, service, 50)
        assert asyncio.get_running_loop().time() - began < 2
        assert len(service.times) - tried <= 1
        refused = [outcome for outcome in outcomes if isinstance(outcome, RetrieverError)]
        assert len(refused) >= 49
        assert "it has failed for" in str(refused[0])
        await asyncio.sleep(1)
        service.up = True
        assert await breaker.run(service) == "answer"
        assert not breaker.is_open

    virtual_clock.run(run())
