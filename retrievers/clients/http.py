"""Calls an HTTP service: pooled connections, a deadline for each attempt, retries, bounded answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from retrievers.base import RetrieverError
from retrievers.clients.proxies import make_client, proxy_for, through
from retrievers.clients.retrying import AttemptFailed, Retrying
from retrievers.secrets import PublicUrls, hiding, public_url, redacting

MAX_ANSWER_BYTES = 64 << 20
"""An answer may be this large."""

logging.getLogger("httpx").addFilter(PublicUrls())


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. `status` is below 500, or 501: others are worth another attempt; `hide` takes keys out of texts."""

    status: int
    body: bytes
    hide: Callable[[str], str] = str

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}): {self.text(200)!r}") from error

    def text(self, characters: int) -> str:
        """The beginning of the body, for messages."""
        return self.hide(self.body.decode("utf-8", "replace"))[:characters]


class HttpCaller:
    """Calls one service, and again if it could not be reached, was too slow, too busy (429) or failed (5xx); see `Retrying`.

    A service that says by Retry-After when to come back is called then. Use it on one event loop only, where its
    connections live.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        retries: int,
        *,
        headers: Mapping[str, str] | None = None,
        secrets: Iterable[str] = (),
        connections: int = 16,
        error: Callable[[str], Exception] = RetrieverError,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the service, for messages, and to find the proxy to it.
            timeout_seconds: deadline of one attempt, from connecting to the last byte of the answer.
            retries: attempts after the first.
            headers: sent with every call.
            secrets: keys that are sent, which no message shows.
            connections: calls under way at once; others wait for their turn, outside their deadline.
            error: makes the exception of a message.
            transport: replaces the network, for tests.

        Raises:
            Exception: what `error` makes, if an argument is invalid.
        """
        if timeout_seconds <= 0:
            raise error(f"{public_url(url)}: the timeout is {timeout_seconds} s and must be positive")
        secrets = list(secrets)
        self._hide, error = hiding(secrets), redacting(secrets, error)
        self._name, self._timeout_seconds, self._error = public_url(url), timeout_seconds, error
        self._retrying = Retrying(self._name, retries, error)
        self._proxy = None if transport is not None else proxy_for(url)
        # The deadline is ours: httpx's own limits start anew with every packet.
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # A packed answer of a few bytes would be unpacked into gigabytes before its size could be seen.
        plain = httpx.Headers(headers)
        plain["Accept-Encoding"] = "identity"
        self._client = make_client(
            lambda: httpx.AsyncClient(
                timeout=None,
                limits=limits,
                headers=plain,
                transport=transport,
                proxy=self._proxy,
                trust_env=False,
                verify=httpx.create_ssl_context(),
            ),
            url,
            self._proxy,
            error,
        )
        # httpx searches its whole queue at every answer; ours keeps that queue empty, and outside the deadline.
        self._free = asyncio.Semaphore(connections)

    async def call(self, method: str, url: str, **request: Any) -> Answer:
        """Send a request, with the arguments of `httpx.AsyncClient.request`, until there is an answer to it.

        Raises:
            Exception: what `error` makes, if no attempt succeeded.
        """
        return await self._retrying.call(lambda: self._attempt(method, url, request))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _attempt(self, method: str, url: str, request: Mapping[str, Any]) -> Answer:
        """The answer of one attempt. Raises AttemptFailed if another one is worth it, else what `error` makes."""
        if self._client.is_closed:
            raise self._error(f"{self._name}: its client is closed")
        try:
            async with (
                self._free,
                asyncio.timeout(self._timeout_seconds),
                self._client.stream(method, url, **request) as response,
            ):
                body = await self._body(response)
        except TimeoutError as error:
            raise AttemptFailed(f"no answer within {self._timeout_seconds} s{through(self._proxy)}") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise AttemptFailed(f"{type(error).__name__} {error}{through(self._proxy)}") from error
        answer = Answer(response.status_code, body, self._hide)
        if answer.status == 429 or (answer.status >= 500 and answer.status != 501):
            pause = _retry_after(response.headers.get("retry-after"))
            reason = f"status {answer.status} {answer.text(200)}{through(self._proxy)}"
            raise AttemptFailed(reason, pause, busy=answer.status == 429)
        return answer

    async def _body(self, response: httpx.Response) -> bytes:
        packed = response.headers.get("content-encoding", "identity")
        if packed.strip().lower() not in ("", "identity"):
            raise self._error(
                f"{self._name} packed its answer ({packed}) though asked not to; turn its compression off"
            )
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise self._error(f"{self._name} answered with more than {MAX_ANSWER_BYTES} bytes; ask for less")
        return bytes(body)


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
