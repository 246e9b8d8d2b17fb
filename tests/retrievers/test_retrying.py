"""A call is tried again while that helps; when a service fails, one caller at a time finds out whether it is back."""

import asyncio
import contextlib
import time

from retrievers.base import RetrieverError
from retrievers.clients.retrying import AttemptFailed, CircuitBreaker


class Service:
    """Fails while it is down; counts its calls and how many were under way at once."""

    def __init__(self):
        self.up = True
        self.calls = self.now = self.most = 0

    async def __call__(self):
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.005)
        self.now -= 1
        if not self.up:
            raise AttemptFailed("it is down")
        return "answer"


def test_calls_pass_at_once_while_the_service_answers():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=3, pause_seconds=60)
        assert await asyncio.gather(*(breaker.run(service) for _ in range(8))) == ["answer"] * 8
        assert service.most == 8

    asyncio.run(run())


def test_an_open_breaker_lets_one_caller_try_and_closes_for_all_at_its_success():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=3, pause_seconds=0.02)
        service.up = False
        await asyncio.gather(*(breaker.run(service) for _ in range(3)), return_exceptions=True)
        assert breaker.is_open
        service.most = 0
        waiting = [asyncio.create_task(breaker.run(service)) for _ in range(6)]
        await asyncio.sleep(0.05)
        assert service.most == 1
        service.up = True
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert outcomes[-1] == "answer"
        assert not breaker.is_open
        # Those that were tried while it was down have failed, and nobody was tried twice.
        assert service.calls == 3 + 6

    asyncio.run(run())


def test_single_failures_do_not_open_it():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=2)
        for up in (False, True) * 3:
            service.up = up
            with contextlib.suppress(AttemptFailed):
                await breaker.run(service)
            assert not breaker.is_open

    asyncio.run(run())


def test_a_service_that_is_gone_fails_those_who_wait_at_once_and_is_still_tried():
    async def run():
        service, breaker = Service(), CircuitBreaker("it", threshold=2, pause_seconds=0.1, patience_seconds=0.2)
        service.up = False
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            with contextlib.suppress(RetrieverError, AttemptFailed):
                await breaker.run(service)
            await asyncio.sleep(0.02)
        tried = service.calls
        outcomes = await asyncio.gather(*(breaker.run(service) for _ in range(50)), return_exceptions=True)
        # One of them may try, where the last attempt was long enough ago; a few, where this process is held up meanwhile.
        assert service.calls - tried < 5
        refused = [outcome for outcome in outcomes if isinstance(outcome, RetrieverError)]
        assert len(refused) > 45
        assert "it has failed for" in str(refused[0])
        await asyncio.sleep(0.1)
        service.up = True
        assert await breaker.run(service) == "answer"
        assert not breaker.is_open

    asyncio.run(run())
