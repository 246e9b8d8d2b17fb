"""A retriever behind HTTP that speaks the wire format of Search-R1's retrieval server.

Request: `{"queries": ["..."], "topk": 3, "return_scores": true}`. Answer:
`{"result": [[{"document": {"id": "...", "contents": "..."}, "score": 1.5}]]}`, a list of hits for each query.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence

import httpx

from retrievers.base import Hit, RetrieverError
from retrievers.breaker import CircuitBreaker

_CONNECTIONS = 16
_BACKOFF_SECONDS = 0.25
_LONGEST_BACKOFF_SECONDS = 8.0


class HttpRetriever:
    """Asks a server, and again after a while if it could not be reached, was too slow, too busy (429) or failed (5xx).

    The pauses double from 0.25 s up to 8 s, each shortened at random by up to half, so that many clients do not come
    back at once; after five failures in a row one search at a time finds out whether the server is back. Use it on one
    event loop only, where its connections live.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 30.0,
        retries: int = 3,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Remember the server; nothing is sent yet.

        Args:
            url: of the search, such as http://127.0.0.1:8000/retrieve.
            timeout_seconds: deadline of one attempt, from connecting to the last byte of the answer.
            retries: attempts after the first.
            transport: replaces the network, for tests.

        Raises:
            RetrieverError: if an argument is of no use.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise RetrieverError(f"{url!r} is not a URL ({error}); write it as http://host:port/retrieve") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise RetrieverError(f"{url!r} is not an HTTP URL; write it as http://host:port/retrieve")
        if timeout_seconds <= 0 or retries < 0:
            raise RetrieverError(f"timeout {timeout_seconds} must be positive and retries {retries} not negative")
        self._url, self._timeout_seconds, self._retries = url, timeout_seconds, retries
        # The deadline is ours: httpx's own limits start anew with every packet.
        limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
        self._client = httpx.AsyncClient(timeout=None, limits=limits, transport=transport)
        # httpx searches its whole queue at every answer; ours keeps that queue empty, and outside the deadline.
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._breaker = CircuitBreaker()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if no attempt succeeded, the server refused, or its answer is not the wire format.
        """
        if not queries:
            return []
        # Half of a surrogate pair cannot be sent as UTF-8.
        sent = [query.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for query in queries]
        payload = {"queries": sent, "topk": k, "return_scores": True}
        attempts = self._retries + 1
        for attempt in range(1, attempts + 1):
            outcome = await self._breaker.run(lambda: self._post(payload), lambda o: isinstance(o, str))
            if isinstance(outcome, httpx.Response):
                return self._parse(outcome, len(sent), k)
            if attempt < attempts:
                pause = min(_BACKOFF_SECONDS * 2 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        raise RetrieverError(f"{self._url} gave no answer in {attempts} attempts; the last one: {outcome}")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _post(self, payload: dict[str, object]) -> httpx.Response | str:
        """The answer of one attempt, or why it is worth another one. Raises RetrieverError if it is not."""
        try:
            async with self._free, asyncio.timeout(self._timeout_seconds):
                response = await self._client.post(self._url, json=payload)
        except TimeoutError:
            return f"no answer within {self._timeout_seconds} s"
        except httpx.TransportError as error:
            return f"{type(error).__name__} {error}"
        if response.status_code == 429 or response.status_code >= 500:
            return f"status {response.status_code} {response.text[:200]}"
        if response.status_code != 200:
            raise RetrieverError(f"{self._url} refused the search: status {response.status_code} {response.text[:500]}")
        return response

    def _parse(self, response: httpx.Response, count: int, k: int) -> list[list[Hit]]:
        """Turn an answer into `count` lists of at most `k` hits. Raises RetrieverError if it is anything else."""
        try:
            payload = response.json()
        except ValueError as error:
            raise self._bad(f"not JSON ({error}): {response.text[:200]!r}") from error
        rows = payload.get("result") if isinstance(payload, dict) else None
        if not isinstance(rows, list) or len(rows) != count:
            raise self._bad(f"'result' must be a list with one entry for each of the {count} queries")
        for row in rows:
            if not isinstance(row, list) or len(row) > k:
                raise self._bad(f"each entry of 'result' must be a list of at most {k} hits")
        return [[self._hit(item) for item in row] for row in rows]

    def _hit(self, item: object) -> Hit:
        document = item.get("document") if isinstance(item, dict) else None
        if not isinstance(item, dict) or not isinstance(document, dict):
            raise self._bad("a hit must be an object with 'document' and 'score'")
        name, contents, score = document.get("id"), document.get("contents"), item.get("score")
        if not isinstance(name, str) or not isinstance(contents, str):
            raise self._bad("a document must have the strings 'id' and 'contents'")
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise self._bad(f"the score of document {name!r} is {score!r} and must be a number")
        return Hit(name, contents, float(score))

    def _bad(self, what: str) -> RetrieverError:
        return RetrieverError(f"{self._url} does not speak Search-R1's retrieval format: {what}")
