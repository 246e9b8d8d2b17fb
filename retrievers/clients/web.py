"""Web search as a retriever, with the user's own key; no provider is built in."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from retrievers.base import Hit, RetrieverError, check_search, clean_text, titled
from retrievers.clients.http import HttpCaller
from retrievers.clients.remote import checked_url

_AT_ONCE = 8


class WebSearch(ABC):
    """Searches the web one query at a time, at most eight at once. A subclass says how one query is searched."""

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if one of the searches could not be done.
        """
        check_search(queries, k)
        free = asyncio.Semaphore(_AT_ONCE)

        async def search_one(query: str) -> list[Hit]:
            async with free:
                return (await self.search_one(clean_text(query), k))[:k]

        return list(await asyncio.gather(*(search_one(query) for query in queries)))

    @abstractmethod
    async def search_one(self, query: str, k: int) -> list[Hit]:
        """Return the best hits of one query, best first.

        Raises:
            RetrieverError: if the search could not be done.
        """


@dataclass(frozen=True, slots=True)
class JsonApi:
    """A web search that answers with JSON, and where to find what in it.

    Attributes:
        url: of the search.
        method: GET sends the parameters in the URL, POST as a JSON object.
        query, count: the parameters' names; `count` may be None where the service takes none.
        parameters: sent besides, with every search.
        results: the way to the list of results through the answer's objects, such as "web.results".
        title, text, link: the names in one result. The link is the hit's id.
        key_variable: the environment variable that holds the user's key; None where none is needed.
        key_header: the header that the key is sent in.
        key_prefix: stands before the key there, such as "Bearer ".
    """

    url: str
    results: str
    method: Literal["GET", "POST"] = "GET"
    query: str = "q"
    count: str | None = "count"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    title: str = "title"
    text: str = "description"
    link: str = "url"
    key_variable: str | None = None
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "


class JsonWebSearch(WebSearch):
    """Asks a `JsonApi`. A hit's score is one over its rank. Use it on one event loop only."""

    def __init__(
        self,
        api: JsonApi | Mapping[str, Any],
        timeout_seconds: float = 30.0,
        retries: int = 3,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Read the user's key; nothing is sent yet. For `timeout_seconds` and `retries` see `HttpCaller`.

        Raises:
            RetrieverError: if the key is not in its environment variable, or an argument is of no use.
        """
        if isinstance(api, Mapping):
            try:
                api = JsonApi(**api)
            except TypeError as error:
                raise RetrieverError(f"the description of a web search is not one: {error}; see JsonApi") from error
        headers = {}
        if api.key_variable is not None:
            key = os.environ.get(api.key_variable, "")
            if not key:
                raise RetrieverError(
                    f"{api.url} needs a key; put yours into the environment variable {api.key_variable}"
                )
            if not (key.isascii() and key.isprintable()):
                raise RetrieverError(f"the key in {api.key_variable} must be printable ASCII; check it for line breaks")
            headers[api.key_header] = api.key_prefix + key
        self._api = api
        self._caller = HttpCaller(checked_url(api.url), timeout_seconds, retries, headers=headers, transport=transport)

    async def search_one(self, query: str, k: int) -> list[Hit]:
        """See `WebSearch.search_one`."""
        api = self._api
        parameters = {**api.parameters, api.query: query} | ({api.count: k} if api.count is not None else {})
        sent = {"params": parameters} if api.method == "GET" else {"json": parameters}
        answer = await self._caller.call(api.method, api.url, **sent)
        if answer.status != 200:
            raise RetrieverError(f"{api.url} refused the search: status {answer.status} {answer.text(500)}")
        try:
            return [self._hit(item, rank) for rank, item in enumerate(self._results(answer.json())[:k], 1)]
        except ValueError as error:
            raise RetrieverError(f"{api.url} does not answer as its JsonApi says: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._caller.close()

    def _results(self, payload: Any) -> list[Any]:
        for name in self._api.results.split("."):
            if not isinstance(payload, dict):
                raise ValueError(f"{self._api.results!r} leads to no list")
            # Services leave the list out where nothing was found.
            payload = payload.get(name, {})
        if payload == {}:
            return []
        if not isinstance(payload, list):
            raise ValueError(f"{self._api.results!r} leads to no list")
        return payload

    def _hit(self, item: Any, rank: int) -> Hit:
        if not isinstance(item, dict) or not isinstance(item.get(self._api.link), str):
            raise ValueError(f"a result has no {self._api.link!r}")
        title, text = (clean_text(str(item.get(name) or "")) for name in (self._api.title, self._api.text))
        return Hit(clean_text(item[self._api.link]), titled(title, text), 1.0 / rank)
