"""A circuit breaker: when a service fails, one caller at a time finds out whether it is back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from retrievers.base import RetrieverError

T = TypeVar("T")


class CircuitBreaker:
    """Shared by the callers of one service, on one event loop.

    After `threshold` failures in a row, whoever made them, it opens: one caller waits for about `pause_seconds` and tries,
    the others wait for its outcome. The first success closes it for all. Where failures have gone on for more than
    `patience_seconds`, the others do not wait but fail, so that a service that is gone holds nobody up for long.
    """

    def __init__(
        self, name: str, threshold: int = 5, pause_seconds: float = 1.0, patience_seconds: float = 60.0
    ) -> None:
        """`name` is the service's, for messages."""
        self._name, self._threshold = name, threshold
        self._pause_seconds, self._patience_seconds = pause_seconds, patience_seconds
        self._failures = 0
        self._first_failure = self._last_failure = 0.0
        self._probe = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._failures >= self._threshold

    async def run(self, attempt: Callable[[], Awaitable[T]], has_failed: Callable[[T], bool]) -> T:
        """Return what `attempt` returns, once it is allowed to run; an exception of it counts as neither.

        Raises:
            RetrieverError: if the service is given up and another caller has just tried.
        """
        if self.is_open:
            async with self._probe:
                if self.is_open:
                    self._check_patience()
                    await asyncio.sleep(self._pause_seconds * random.uniform(0.5, 1.5))
                    return await self._count(attempt, has_failed)
        return await self._count(attempt, has_failed)

    def _check_patience(self) -> None:
        now = time.monotonic()
        failing = now - self._first_failure
        if failing > self._patience_seconds and now - self._last_failure < self._pause_seconds:
            raise RetrieverError(f"{self._name} has failed for {failing:.0f} s, {self._failures} times in a row")

    async def _count(self, attempt: Callable[[], Awaitable[T]], has_failed: Callable[[T], bool]) -> T:
        outcome = await attempt()
        if not has_failed(outcome):
            self._failures = 0
            return outcome
        self._last_failure = time.monotonic()
        if not self._failures:
            self._first_failure = self._last_failure
        self._failures += 1
        return outcome
