"""A search tool of an MCP server as a retriever, by the official `mcp` package, over streamable HTTP or stdio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from retrievers.base import Hit, RetrieverError, check_search, clean_text, contents_id
from retrievers.clients.proxies import make_client, proxy_for, through
from retrievers.clients.retrying import AttemptFailed, Retrying
from retrievers.secrets import PublicUrls, all_from_environment, from_environment, hiding, public_url, redacting

# The HTTP client of `mcp`.
logging.getLogger("httpx2").addFilter(PublicUrls())

_AT_ONCE = 8
_CLOSE_SECONDS = 5.0


def hits_of_texts(texts: Sequence[str]) -> list[Hit]:
    """Each text of a tool's answer as one passage, whose id is made of its contents and whose score is one over its rank."""
    passages = [clean_text(text) for text in texts]
    return [Hit(contents_id(text), text, 1.0 / rank) for rank, text in enumerate(passages, 1) if text.strip()]


class McpRetriever:
    """Calls one tool for each query, at most eight at once, over one connection that is made anew when it breaks.

    An asynchronous context manager, on one event loop.
    """

    def __init__(
        self,
        server: str | Sequence[str],
        tool: str = "search",
        *,
        query_argument: str = "query",
        count_argument: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        read_hits: Callable[[Sequence[str]], list[Hit]] = hits_of_texts,
        environment: Sequence[str] = (),
        token_env: str | None = None,
        headers_env: Mapping[str, str] | None = None,
        parameters_env: Mapping[str, str] | None = None,
        timeout_seconds: float = 30.0,
        retries: int = 3,
        connect_seconds: float = 60.0,
    ) -> None:
        """Nothing is started or sent yet.

        Args:
            server: the URL of a server that speaks streamable HTTP, or the command and arguments of one that speaks stdio.
            tool: the tool's name.
            query_argument: the name of its argument that takes the query.
            count_argument: the name of the one that takes the number of hits, if it has one.
            arguments: others, sent with every call.
            read_hits: makes hits of the texts in an answer; may raise ValueError.
            environment: names of environment variables that a stdio server gets too, beside a few safe ones, such as the one
                with its key.
            token_env: the environment variable with the key that an HTTP server gets as `Authorization: Bearer …`.
            headers_env: headers for an HTTP server whose values are keys, each with the environment variable that holds it.
            parameters_env: parameters of an HTTP server's URL whose values are keys, likewise.
            timeout_seconds: of one call.
            retries: attempts after the first, where the connection breaks or a call is too slow.
            connect_seconds: within which the server must have started and be connected.

        Raises:
            RetrieverError: if the `mcp` package is missing, a key is not in its variable, or an argument is invalid.
        """
        try:
            import mcp
        except ImportError as error:
            raise RetrieverError("MCP tools need the package mcp; install it: pip install 'mcp>=2'") from error
        self._name = _name_of(server)
        if min(timeout_seconds, connect_seconds) <= 0 or not server:
            raise RetrieverError(f"MCP server {self._name!r}: give a server, and seconds that are positive")
        self._mcp, self._server, self._tool = mcp, server, tool
        self._query_argument, self._count_argument = query_argument, count_argument
        self._arguments, self._read_hits = dict(arguments or {}), read_hits
        self._environment = {name: from_environment(name, "environment") for name in environment}
        self._headers = all_from_environment(headers_env or {}, "headers_env")
        self._parameters = all_from_environment(parameters_env or {}, "parameters_env")
        keys = [*self._environment.values(), *self._headers.values(), *self._parameters.values()]
        if token_env is not None:
            keys.append(from_environment(token_env, "token_env"))
            self._headers["Authorization"] = f"Bearer {keys[-1]}"
        self._proxy = proxy_for(server) if isinstance(server, str) else None
        self._timeout_seconds, self._connect_seconds = timeout_seconds, connect_seconds
        self._hide, self._error = hiding(keys), redacting(keys)
        self._retrying = Retrying(f"MCP tool {tool!r} of {self._name!r}", retries, self._error)
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> McpRetriever:
        """Connect. Raises RetrieverError if the server cannot be reached."""
        try:
            await self._connected()
        except AttemptFailed as failure:
            raise self._error(f"the MCP server {self._name!r} cannot be used: {failure}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if the tool failed or gave something else than hits, or no attempt got an answer.
        """
        check_search(queries, k)
        return list(await asyncio.gather(*(self._search_one(clean_text(query), k) for query in queries)))

    async def close(self) -> None:
        """Close the connection, and stop a stdio server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _search_one(self, query: str, k: int) -> list[Hit]:
        arguments = {**self._arguments, self._query_argument: query}
        if self._count_argument is not None:
            arguments[self._count_argument] = k

        async def attempt() -> list[str]:
            async with self._free:
                return await self._call(arguments)

        texts = await self._retrying.call(attempt)
        try:
            return self._read_hits(texts)[:k]
        except ValueError as error:
            raise self._error(f"the answer of MCP tool {self._tool!r} cannot be read: {error}") from error

    async def _call(self, arguments: dict[str, Any]) -> list[str]:
        """The texts of one answer. Raises AttemptFailed if another attempt is worth it, else RetrieverError."""
        connection = await self._connected()
        call = asyncio.create_task(connection.client.call_tool(self._tool, arguments))
        try:
            await asyncio.wait({call, connection.holder}, timeout=self._timeout_seconds, return_when="FIRST_COMPLETED")
        finally:
            if not call.done():
                call.cancel()
        if not call.done():
            if connection.holder.done():
                raise AttemptFailed(f"the connection broke: {_why(connection.holder)}")
            raise AttemptFailed(f"no answer within {self._timeout_seconds:g} s")
        try:
            result = call.result()
        except asyncio.CancelledError:
            raise AttemptFailed("the connection broke") from None
        except self._mcp.MCPError as error:
            if error.code == self._mcp.types.CONNECTION_CLOSED:
                # The holder does not always notice.
                connection.stop.set()
                raise AttemptFailed("the connection broke") from error
            raise self._error(f"MCP tool {self._tool!r} failed: {error.message}") from None
        except ValueError as error:
            raise self._error(f"the answer of MCP tool {self._tool!r} is not of the protocol: {error}") from error
        texts = [block.text for block in result.content if block.type == "text"]
        if result.is_error:
            raise self._error(f"MCP tool {self._tool!r} failed: {self._hide(' '.join(texts))[:500]}")
        return texts

    async def _connected(self) -> _Connection:
        """The connection, made anew if it broke. Raises AttemptFailed if it cannot be made."""
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                await self.close()
                self._connection = await _connect(self._client, self._connect_seconds, through(self._proxy))
            return self._connection

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """A connected client of the `mcp` package."""
        if isinstance(self._server, str):
            # These two come with the package.
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            http = make_client(
                lambda: httpx2.AsyncClient(
                    headers=self._headers,
                    timeout=self._timeout_seconds,
                    proxy=self._proxy,
                    trust_env=False,
                    verify=httpx.create_ssl_context(),
                ),
                self._server,
                self._proxy,
            )
            url = str(httpx.URL(self._server).copy_merge_params(self._parameters))
            async with http, self._mcp.Client(streamable_http_client(url, http_client=http)) as client:
                yield client
        else:
            command, *arguments = self._server
            stdio = self._mcp.StdioServerParameters(command=command, args=arguments, env=self._environment)
            async with self._mcp.Client(stdio) as client:
                yield client


@dataclass(frozen=True, slots=True)
class _Connection:
    """A client, and the task that entered it and must leave it."""

    client: Any
    holder: asyncio.Task[None]
    stop: asyncio.Event

    @property
    def is_open(self) -> bool:
        return not self.stop.is_set() and not self.holder.done()

    async def close(self) -> None:
        self.stop.set()
        await asyncio.wait({self.holder}, timeout=_CLOSE_SECONDS)
        await _end(self.holder)


async def _connect(
    make: Callable[[], AbstractAsyncContextManager[Any]], timeout_seconds: float, how: str
) -> _Connection:
    """Enter what `make` makes. Raises AttemptFailed, whose reason ends with `how`, if that fails or takes too long."""
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def hold() -> None:
        async with make() as client:
            ready.set_result(client)
            await stop.wait()

    holder = asyncio.create_task(hold())
    # Its exception is looked at below; without this, asyncio would complain where the caller has given up.
    holder.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({holder, ready}, timeout=timeout_seconds, return_when="FIRST_COMPLETED")
    except asyncio.CancelledError:
        # Nobody else knows of it, and it would keep its server.
        await _end(holder)
        raise
    if ready.done():
        return _Connection(ready.result(), holder, stop)
    reason = f"it cannot be reached: {_why(holder)}" if holder.done() else f"no connection within {timeout_seconds:g} s"
    await _end(holder)
    raise AttemptFailed(reason + how)


def _name_of(server: str | Sequence[str]) -> str:
    """What messages call a server: its URL without a password or parameters, or its program without the arguments."""
    if isinstance(server, str):
        return public_url(server)
    return server[0] if server else ""


async def _end(holder: asyncio.Task[None]) -> None:
    holder.cancel()
    await asyncio.wait({holder})


def _why(holder: asyncio.Task[None]) -> str:
    """The first error in what ended a connection; anyio packs them into groups."""
    if not holder.done() or holder.cancelled():
        return "it was closed"
    error = holder.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "it was closed" if error is None else f"{type(error).__name__} {error}"
