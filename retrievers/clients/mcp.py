"""A search tool of an MCP server as a retriever, by the official `mcp` package, over streamable HTTP or stdio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from retrievers.base import Hit, RetrieverError, check_search, clean_text, contents_id

_AT_ONCE = 8
_BACKOFF_SECONDS = 0.25
_LONGEST_BACKOFF_SECONDS = 8.0
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
        environment: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
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
            environment: variables for a stdio server, beside a few safe ones, such as its key.
            headers: for an HTTP server, such as its key.
            timeout_seconds: of one call.
            retries: attempts after the first, where the connection breaks or a call is too slow.
            connect_seconds: within which the server must have started and be connected.

        Raises:
            RetrieverError: if the `mcp` package is missing or an argument is of no use.
        """
        try:
            import mcp
        except ImportError as error:
            raise RetrieverError("MCP tools need the package mcp; install it: pip install 'mcp>=2'") from error
        if min(timeout_seconds, connect_seconds) <= 0 or retries < 0 or not server:
            raise RetrieverError(f"{server!r}: give a server, positive seconds and retries that are not negative")
        self._mcp, self._server, self._tool = mcp, server, tool
        self._query_argument, self._count_argument = query_argument, count_argument
        self._arguments, self._read_hits = dict(arguments or {}), read_hits
        self._environment, self._headers = dict(environment or {}), dict(headers or {})
        self._timeout_seconds, self._attempts, self._connect_seconds = timeout_seconds, retries + 1, connect_seconds
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> McpRetriever:
        """Connect. Raises RetrieverError if the server cannot be reached."""
        connection = await self._connected()
        if isinstance(connection, _Trouble):
            raise RetrieverError(f"the MCP server {self._server!r} cannot be used: {connection.what}")
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
        outcome: list[str] | _Trouble | None = None
        for attempt in range(self._attempts):
            if attempt:
                pause = min(_BACKOFF_SECONDS * 2 ** (attempt - 1), _LONGEST_BACKOFF_SECONDS)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            async with self._free:
                outcome = await self._call(arguments)
            if not isinstance(outcome, _Trouble):
                try:
                    return self._read_hits(outcome)[:k]
                except ValueError as error:
                    what = f"the answer of MCP tool {self._tool!r} cannot be read: {error}"
                    raise RetrieverError(what) from error
        assert isinstance(outcome, _Trouble)
        what = f"MCP tool {self._tool!r} of {self._server!r} gave no answer in {self._attempts} attempts"
        raise RetrieverError(f"{what}; the last one: {outcome.what}")

    async def _call(self, arguments: dict[str, Any]) -> list[str] | _Trouble:
        """The texts of one answer, or why it is worth another attempt. Raises RetrieverError if it is not."""
        connection = await self._connected()
        if isinstance(connection, _Trouble):
            return connection
        call = asyncio.create_task(connection.client.call_tool(self._tool, arguments))
        try:
            await asyncio.wait({call, connection.holder}, timeout=self._timeout_seconds, return_when="FIRST_COMPLETED")
        finally:
            if not call.done():
                call.cancel()
        if not call.done():
            broken = _Trouble(f"the connection broke: {_why(connection.holder)}")
            return broken if connection.holder.done() else _Trouble(f"no answer within {self._timeout_seconds:g} s")
        try:
            result = call.result()
        except asyncio.CancelledError:
            return _Trouble("the connection broke")
        except self._mcp.MCPError as error:
            if error.code == self._mcp.types.CONNECTION_CLOSED:
                # The holder does not always notice.
                connection.stop.set()
                return _Trouble("the connection broke")
            raise RetrieverError(f"MCP tool {self._tool!r} failed: {error.message}") from error
        except ValueError as error:
            raise RetrieverError(f"the answer of MCP tool {self._tool!r} is not of the protocol: {error}") from error
        texts = [block.text for block in result.content if block.type == "text"]
        if result.is_error:
            raise RetrieverError(f"MCP tool {self._tool!r} failed: {' '.join(texts)[:500]}")
        return texts

    async def _connected(self) -> _Connection | _Trouble:
        async with self._connecting:
            if self._connection is not None and self._connection.is_open:
                return self._connection
            await self.close()
            outcome = await _connect(self._client, self._connect_seconds)
            if isinstance(outcome, _Connection):
                self._connection = outcome
            return outcome

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """A connected client of the `mcp` package."""
        if isinstance(self._server, str):
            # These two come with the package.
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            async with (
                httpx2.AsyncClient(headers=self._headers, timeout=self._timeout_seconds) as http,
                self._mcp.Client(streamable_http_client(self._server, http_client=http)) as client,
            ):
                yield client
        else:
            command, *arguments = self._server
            stdio = self._mcp.StdioServerParameters(command=command, args=arguments, env=self._environment)
            async with self._mcp.Client(stdio) as client:
                yield client


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why an attempt is worth another one."""

    what: str


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
    make: Callable[[], AbstractAsyncContextManager[Any]], timeout_seconds: float
) -> _Connection | _Trouble:
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def hold() -> None:
        async with make() as client:
            ready.set_result(client)
            await stop.wait()

    holder = asyncio.create_task(hold())
    # Whoever waits looks at it; where nobody does, it is no news.
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
    return _Trouble(reason)


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
