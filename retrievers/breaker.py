"""A circuit breaker: when a service fails, one caller at a time finds out whether it is back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class CircuitBreaker:
    """Shared by the callers of one service, on one event loop.

    After `threshold` failures in a row, whoever made them, it opens: one caller waits for about `pause_seconds` and tries,
    the others wait for its outcome. The first success closes it for all.
    """

    def __init__(self, threshold: int = 5, pause_seconds: float = 1.0) -> None:
        self._threshold, self._pause_seconds = threshold, pause_seconds
        self._failures = 0
        self._probe = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._failures >= self._threshold

    async def run(self, attempt: Callable[[], Awaitable[T]], has_failed: Callable[[T], bool]) -> T:
        """Return what `attempt` returns, once it is allowed to run; an exception of it counts as neither."""
        if self.is_open:
            async with self._probe:
                if self.is_open:
                    await asyncio.sleep(self._pause_seconds * random.uniform(0.5, 1.5))
                    return await self._count(attempt, has_failed)
        return await self._count(attempt, has_failed)

    async def _count(self, attempt: Callable[[], Awaitable[T]], has_failed: Callable[[T], bool]) -> T:
        outcome = await attempt()
        self._failures = self._failures + 1 if has_failed(outcome) else 0
        return outcome
