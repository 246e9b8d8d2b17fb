"""Calls an HTTP service: pooled connections, a deadline, retries with growing pauses, a circuit breaker, bounded answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from retrievers.base import RetrieverError
from retrievers.clients.breaker import CircuitBreaker

MAX_ANSWER_BYTES = 64 << 20
"""An answer may be this large."""

_BACKOFF_SECONDS = 0.25
_LONGEST_BACKOFF_SECONDS = 8.0
_LONGEST_RETRY_AFTER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer that was not worth another attempt; `status` is below 500, or 501."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}): {self.text(200)!r}") from error

    def text(self, characters: int) -> str:
        return self.body[: 4 * characters].decode("utf-8", "replace")[:characters]


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why an attempt is worth another one. `busy` means that the service works; `pause` is what it asked for."""

    what: str
    pause: float = 0.0
    busy: bool = False


class HttpCaller:
    """Calls one service, and again after a while if it could not be reached, was too slow, too busy (429) or failed (5xx).

    The pauses double from 0.25 s up to 8 s, each shortened at random by up to half, so that many clients do not come
    back at once; a service that says by Retry-After when to come back is asked then. After five failures in a row one
    call at a time finds out whether the service is back. Use it on one event loop only, where its connections live.
    """

    def __init__(
        self,
        name: str,
        timeout_seconds: float,
        retries: int,
        *,
        headers: Mapping[str, str] | None = None,
        connections: int = 16,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            name: of the service, for messages.
            timeout_seconds: deadline of one attempt, from connecting to the last byte of the answer.
            retries: attempts after the first.
            headers: sent with every call.
            connections: calls under way at once; others wait for their turn, outside their deadline.
            transport: replaces the network, for tests.

        Raises:
            RetrieverError: if an argument is of no use.
        """
        if timeout_seconds <= 0 or retries < 0:
            raise RetrieverError(f"timeout {timeout_seconds} must be positive and retries {retries} not negative")
        self._name, self._timeout_seconds, self._attempts = name, timeout_seconds, retries + 1
        # The deadline is ours: httpx's own limits start anew with every packet.
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # A packed answer of a few bytes would be unpacked into gigabytes before its size could be seen.
        plain = httpx.Headers(headers)
        plain["Accept-Encoding"] = "identity"
        self._client = httpx.AsyncClient(timeout=None, limits=limits, headers=plain, transport=transport)
        # httpx searches its whole queue at every answer; ours keeps that queue empty, and outside the deadline.
        self._free = asyncio.Semaphore(connections)
        self._breaker = CircuitBreaker(name)

    async def call(self, method: str, url: str, **request: Any) -> Answer:
        """Send a request, with the arguments of `httpx.AsyncClient.request`, until there is an answer to it.

        Raises:
            RetrieverError: if no attempt succeeded.
        """
        outcome: Answer | _Trouble | None = None
        for attempt in range(1, self._attempts + 1):
            outcome = await self._breaker.run(lambda: self._attempt(method, url, request), _has_failed)
            if isinstance(outcome, Answer):
                return outcome
            if outcome.pause > _LONGEST_RETRY_AFTER_SECONDS:
                raise RetrieverError(f"{self._name} asks to come back in {outcome.pause:.0f} s: {outcome.what}")
            if attempt < self._attempts:
                pause = min(_BACKOFF_SECONDS * 2 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
                # Those that were told the same second shall not come back in the same instant.
                await asyncio.sleep(outcome.pause * random.uniform(1.0, 1.2) or pause)
        assert isinstance(outcome, _Trouble)
        raise RetrieverError(f"{self._name} gave no answer in {self._attempts} attempts; the last one: {outcome.what}")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _attempt(self, method: str, url: str, request: Mapping[str, Any]) -> Answer | _Trouble:
        """The answer of one attempt, or why it is worth another one. Raises RetrieverError if it is not."""
        if self._client.is_closed:
            raise RetrieverError(f"{self._name}: its client is closed")
        try:
            async with (
                self._free,
                asyncio.timeout(self._timeout_seconds),
                self._client.stream(method, url, **request) as response,
            ):
                body = await self._body(response)
        except TimeoutError:
            return _Trouble(f"no answer within {self._timeout_seconds} s")
        except (httpx.TransportError, httpx.DecodingError) as error:
            return _Trouble(f"{type(error).__name__} {error}")
        answer = Answer(response.status_code, body)
        if answer.status == 429 or (answer.status >= 500 and answer.status != 501):
            pause = _retry_after(response.headers.get("retry-after"))
            return _Trouble(f"status {answer.status} {answer.text(200)}", pause, answer.status == 429)
        return answer

    async def _body(self, response: httpx.Response) -> bytes:
        packed = response.headers.get("content-encoding", "identity")
        if packed.strip().lower() not in ("", "identity"):
            raise RetrieverError(
                f"{self._name} packed its answer ({packed}) though asked not to; turn its compression off"
            )
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise RetrieverError(f"{self._name} answered with more than {MAX_ANSWER_BYTES} bytes; ask for less")
        return bytes(body)


def _has_failed(outcome: Answer | _Trouble) -> bool:
    return isinstance(outcome, _Trouble) and not outcome.busy


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which is a number of them or a date; 0 where it is neither."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
