"""A retriever behind HTTP, in the wire format of Search-R1's retrieval server or in one that the user defines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from retrievers.base import CannotReadError, Hit, RetrieverError, clean_text
from retrievers.clients.http import Answer, HttpCaller
from retrievers.clients.wire import SearchR1, WireFormat, document_hit
from retrievers.secrets import all_from_environment, from_environment, public_url, redacting

_Result = TypeVar("_Result")

_SHA256 = re.compile("[0-9a-f]{64}")


class HttpRetriever:
    """Asks a server; see `HttpCaller` for deadlines, retries and pooling. Use it on one event loop only."""

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 30.0,
        retries: int = 6,
        *,
        token: str | None = None,
        token_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        headers_env: Mapping[str, str] | None = None,
        wire: WireFormat | None = None,
        read_url: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Remember the server; nothing is sent yet.

        Args:
            url: of the search, such as http://127.0.0.1:8000/retrieve.
            timeout_seconds: deadline of one attempt, from connecting to the last byte of the answer.
            retries: attempts after the first; six outlive the restart of a server's process.
            token: sent as `Authorization: Bearer …`.
            token_env: the environment variable that holds the token, in place of `token`.
            headers: sent with every request.
            headers_env: headers whose values are keys, each with the environment variable that holds it.
            wire: the server's format, where it is not Search-R1's; see `retrievers.clients.wire`.
            read_url: of reading documents; by default `read` beside the search, where this project's servers have it.
            transport: replaces the network, for tests.

        Raises:
            RetrieverError: if an argument is invalid.
        """
        self._url = checked_url(url)
        self._read_url = checked_url(read_url) if read_url is not None else str(httpx.URL(url).join("read"))
        self._wire = wire or SearchR1()
        if token_env is not None:
            token = from_environment(token_env, "token_env")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise RetrieverError("the token must be printable ASCII; check it for line breaks")
        keys = all_from_environment(headers_env or {}, "headers_env")
        sent = dict(headers or {}) | keys | ({"Authorization": f"Bearer {token}"} if token is not None else {})
        secrets = [*keys.values(), token or ""]
        self._name, self._error = public_url(url), redacting(secrets)
        self._caller = HttpCaller(url, timeout_seconds, retries, headers=sent, secrets=secrets, transport=transport)

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if no attempt succeeded, the server refused, or its answer is not of the wire format.
        """
        if not queries:
            return []
        body = self._parse(lambda: self._wire.request([clean_text(query) for query in queries], k))
        answer = await self._caller.call("POST", self._url, json=body)
        self._check(answer, "the search")
        rows = self._parse(lambda: self._wire.hits(answer.json(), len(queries), k))
        if len(rows) != len(queries):
            raise RetrieverError(
                f"{type(self._wire).__name__} read {len(rows)} lists of hits for {len(queries)} queries"
            )
        return rows

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            CannotReadError: if the server offers no documents.
            RetrieverError: if no attempt succeeded, the server refused, or its answer is of another format.
        """
        answer = await self._caller.call("POST", self._read_url, json={"id": clean_text(document_id)})
        if answer.status in (404, 405, 501):
            raise CannotReadError(f"{public_url(self._read_url)} offers no whole documents: status {answer.status}")
        self._check(answer, "reading")
        return self._parse(lambda: _document(answer.json()))

    async def close(self) -> None:
        """Close the connections."""
        await self._caller.close()

    async def describe_index(self) -> dict[str, str]:
        """What the server says at `health`, beside the search, of what it searches.

        Returns:
            `corpus_sha256`, the hash of the corpus, and `search_sha256`, of all that decides what is found, as far as the
            server tells them; servers other than this project's tell neither.

        Raises:
            RetrieverError: if no attempt got an answer.
        """
        answer = await self._caller.call("GET", str(httpx.URL(self._url).join("health")))
        try:
            about = answer.json()
        except ValueError:
            return {}
        told = about if isinstance(about, dict) else {}
        hashes = {name: str(told.get(name)) for name in ("corpus_sha256", "search_sha256")}
        return {name: value for name, value in hashes.items() if _SHA256.fullmatch(value)}

    def _check(self, answer: Answer, what: str) -> None:
        if answer.status == 401:
            raise self._error(f"{self._name} refused the token: status 401 {answer.text(200)}; give the server's own")
        if answer.status != 200:
            raise self._error(f"{self._name} refused {what}: status {answer.status} {answer.text(500)}")

    def _parse(self, parse: Callable[[], _Result]) -> _Result:
        try:
            return parse()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # A user's own format may well index into an answer that is not what it expects.
            name = "Search-R1's retrieval format" if isinstance(self._wire, SearchR1) else type(self._wire).__name__
            why = str(error) if isinstance(error, ValueError) else repr(error)
            raise self._error(f"{self._name} does not speak {name}: {why}") from error


def checked_url(url: str) -> str:
    """Return `url`. Raises RetrieverError if it is no HTTP URL."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise RetrieverError(
            f"{public_url(url)!r} is not a URL ({error}); write it as http://host:port/retrieve"
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RetrieverError(f"{public_url(url)!r} is not an HTTP URL; write it as http://host:port/retrieve")
    return url


def _document(payload: Any) -> Hit | None:
    if not isinstance(payload, dict) or "document" not in payload:
        raise ValueError("an answer to reading must be an object with 'document'")
    return None if payload["document"] is None else document_hit(payload["document"])
