"""Calls a service until it answers: attempts, growing pauses, and a circuit breaker shared by all callers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from retrievers.base import RetrieverError

T = TypeVar("T")

_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_LONGEST_ASKED_SECONDS = 60.0


class AttemptFailed(Exception):
    """An attempt got no answer, and another one may.

    Attributes:
        pause_seconds: the pause that the service asked for; 0 if it asked for none.
        busy: whether the service works and has too much to do, which is no failure of it.
    """

    def __init__(self, reason: str, pause_seconds: float = 0.0, *, busy: bool = False) -> None:
        super().__init__(reason)
        self.pause_seconds, self.busy = pause_seconds, busy


class Retrying:
    """Makes attempts at calls of one service, on one event loop.

    The pauses between the attempts of one call double from 0.25 s up to 8 s. Each is shortened at random by up to half, so
    that many callers do not come back at once. Where the service asks for a pause, that one is kept, and lengthened at
    random by up to a fifth.
    """

    def __init__(self, name: str, retries: int, error: Callable[[str], Exception] = RetrieverError) -> None:
        """Nothing is called yet.

        Args:
            name: of the service, for messages.
            retries: attempts after the first.
            error: makes the exception of a message, where a call is given up.

        Raises:
            Exception: what `error` makes, if `retries` is negative.
        """
        if retries < 0:
            raise error(f"{name}: retries is {retries} and must not be negative")
        self._name, self._attempts, self._error = name, retries + 1, error
        self._breaker = CircuitBreaker(name, error)

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns; as long as it raises `AttemptFailed`, it is called again.

        Raises:
            Exception: what `error` makes, if no attempt succeeded, or the service asks for a pause of more than a minute.
        """
        for number in range(1, self._attempts + 1):
            try:
                return await self._breaker.run(attempt)
            except AttemptFailed as failure:
                # `from None`: the message says it all, and `error` may have taken a key out of it.
                if failure.pause_seconds > _LONGEST_ASKED_SECONDS:
                    asked = f"asks to come back in {failure.pause_seconds:.0f} s"
                    raise self._error(f"{self._name} {asked}: {failure}") from None
                if number == self._attempts:
                    tried = f"gave no answer in {number} attempts; the last one"
                    raise self._error(f"{self._name} {tried}: {failure}") from None
                await asyncio.sleep(_pause(number, failure.pause_seconds))
        raise AssertionError("the last attempt returns or raises")


def _pause(number: int, asked: float) -> float:
    """Seconds to wait after attempt `number`, counted from 1."""
    if asked:
        return asked * random.uniform(1.0, 1.2)
    return min(_PAUSE_SECONDS * 2 ** (number - 1), _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


class CircuitBreaker:
    """Stops calls to a service that fails, and lets one caller at a time find out whether it works again.

    `threshold` failures in a row, whoever's calls they were, open the breaker. Then one caller waits for about
    `pause_seconds` and tries, and the others wait for the outcome. The first success closes the breaker for all. Once
    failures have gone on for `patience_seconds`, the others fail at once instead of waiting.
    """

    def __init__(
        self,
        name: str,
        error: Callable[[str], Exception] = RetrieverError,
        *,
        threshold: int = 5,
        pause_seconds: float = 1.0,
        patience_seconds: float = 60.0,
    ) -> None:
        """For `name` and `error` see `Retrying`."""
        self._name, self._error, self._threshold = name, error, threshold
        self._pause_seconds, self._patience_seconds = pause_seconds, patience_seconds
        self._failures = 0
        self._first_failure = self._last_failure = 0.0
        self._turn = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._failures >= self._threshold

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns, once it may run.

        An `AttemptFailed` of a service that is not busy is a failure. Any other exception of `attempt` says nothing about
        the service, and is neither a failure nor a success.

        Raises:
            Exception: what `error` makes, if failures have gone on for too long and another caller has just tried.
        """
        if not self.is_open:
            return await self._count(attempt)
        async with self._turn:
            # The caller before may have closed it.
            if self.is_open:
                self._check_patience()
                await asyncio.sleep(self._pause_seconds * random.uniform(0.5, 1.5))
                return await self._count(attempt)
        return await self._count(attempt)

    def _check_patience(self) -> None:
        now = asyncio.get_running_loop().time()
        failing = now - self._first_failure
        if failing > self._patience_seconds and now - self._last_failure < self._pause_seconds:
            raise self._error(f"{self._name} has failed for {failing:.0f} s, {self._failures} times in a row")

    async def _count(self, attempt: Callable[[], Awaitable[T]]) -> T:
        try:
            outcome = await attempt()
        except AttemptFailed as failure:
            if failure.busy:
                self._failures = 0
            else:
                self._last_failure = asyncio.get_running_loop().time()
                if not self._failures:
                    self._first_failure = self._last_failure
                self._failures += 1
            raise
        self._failures = 0
        return outcome
