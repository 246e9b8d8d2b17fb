"""When a service fails, one caller at a time finds out whether it is back."""

import asyncio

from retrievers.breaker import CircuitBreaker


class Service:
    """Fails (returns None) while it is down; counts its calls and how many were under way at once."""

    def __init__(self):
        self.up = True
        self.calls = self.now = self.most = 0

    async def __call__(self):
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.005)
        self.now -= 1
        return "answer" if self.up else None


def failed(outcome):
    return outcome is None


def test_calls_pass_at_once_while_the_service_answers():
    async def run():
        service, breaker = Service(), CircuitBreaker(threshold=3, pause_seconds=60)
        assert await asyncio.gather(*(breaker.run(service, failed) for _ in range(8))) == ["answer"] * 8
        assert service.most == 8

    asyncio.run(run())


def test_an_open_breaker_lets_one_caller_try_and_closes_for_all_at_its_success():
    async def run():
        service, breaker = Service(), CircuitBreaker(threshold=3, pause_seconds=0.02)
        service.up = False
        await asyncio.gather(*(breaker.run(service, failed) for _ in range(3)))
        assert breaker.is_open
        service.most = 0
        waiting = [asyncio.create_task(breaker.run(service, failed)) for _ in range(6)]
        await asyncio.sleep(0.05)
        assert service.most == 1
        service.up = True
        outcomes = await asyncio.gather(*waiting)
        assert outcomes[-1] == "answer"
        assert not breaker.is_open
        # Those that were tried while it was down have failed, and nobody was tried twice.
        assert service.calls == 3 + 6

    asyncio.run(run())


def test_single_failures_do_not_open_it():
    async def run():
        service, breaker = Service(), CircuitBreaker(threshold=2)
        for up in (False, True) * 3:
            service.up = up
            await breaker.run(service, failed)
            assert not breaker.is_open

    asyncio.run(run())
