"""Web search as a retriever, with the user's own key; no provider is built in."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import httpx

from retrievers.base import Hit, RetrieverError, check_search, clean_text, titled
from retrievers.clients.http import HttpCaller
from retrievers.clients.remote import checked_url
from retrievers.names import did_you_mean
from retrievers.secrets import all_from_environment, from_environment, public_url, redacting

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
        token_env: the environment variable with the key that is sent as `Authorization: Bearer …`.
        headers_env: headers whose values are keys, each with the environment variable that holds it, such as
            `{"X-Subscription-Token": "BRAVE_KEY"}`.
        parameters_env: parameters whose values are keys, likewise, such as `{"api_key": "SERPAPI_KEY"}`.
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
    token_env: str | None = None
    headers_env: Mapping[str, str] = field(default_factory=dict)
    parameters_env: Mapping[str, str] = field(default_factory=dict)


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
        """Read the keys; nothing is sent yet. For `timeout_seconds` and `retries` see `HttpCaller`.

        Raises:
            RetrieverError: if a key is not in its environment variable, or an argument is invalid.
        """
        if isinstance(api, Mapping):
            api = _described(api)
        headers = all_from_environment(api.headers_env, "headers_env")
        self._keys = all_from_environment(api.parameters_env, "parameters_env")
        secrets = [*headers.values(), *self._keys.values()]
        if api.token_env is not None:
            secrets.append(from_environment(api.token_env, "token_env"))
            headers["Authorization"] = f"Bearer {secrets[-1]}"
        self._api, self._name, self._error = api, public_url(api.url), redacting(secrets)
        self._caller = HttpCaller(
            checked_url(api.url), timeout_seconds, retries, headers=headers, secrets=secrets, transport=transport
        )

    async def search_one(self, query: str, k: int) -> list[Hit]:
        """See `WebSearch.search_one`."""
        api = self._api
        parameters = {**api.parameters, **self._keys, api.query: query} | (
            {api.count: k} if api.count is not None else {}
        )
        sent = {"params": parameters} if api.method == "GET" else {"json": parameters}
        answer = await self._caller.call(api.method, api.url, **sent)
        if answer.status != 200:
            raise self._error(f"{self._name} refused the search: status {answer.status} {answer.text(500)}")
        try:
            return [self._hit(item, rank) for rank, item in enumerate(self._results(answer.json())[:k], 1)]
        except ValueError as error:
            raise self._error(f"{self._name} does not answer as its JsonApi says: {error}") from error

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


def _described(options: Mapping[str, Any]) -> JsonApi:
    """The JsonApi that a config describes. Raises RetrieverError, without the values, if it describes none."""
    known = [known.name for known in fields(JsonApi)]
    for name in options:
        if name not in known:
            raise RetrieverError(f"a web search has no setting {name!r}{did_you_mean(str(name), known)}; see JsonApi")
    missing = [name for name in ("url", "results") if name not in options]
    if missing:
        raise RetrieverError(f"the description of a web search lacks {' and '.join(missing)}; see JsonApi")
    return JsonApi(**options)
