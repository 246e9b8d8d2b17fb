"""Connections of the retrieval service: uvicorn's, with a deadline for headers and for reading answers, and a bound."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedConnection(H11Protocol):
    """Cuts off a client that takes too long to send its headers or to take its answer, and clients beyond the bound.

    uvicorn itself waits for ever in all three cases; its h11 protocol bounds the size of headers, its httptools one does
    not.

    Attributes:
        header_seconds: from connecting, or from the first byte of a later request, to the end of the headers.
        write_seconds: for which the client may leave more unread than the socket's buffer takes.
        max_connections: of the process.
    """

    header_seconds = 10.0
    write_seconds = 30.0
    max_connections = 512

    _deadlines: dict[str, asyncio.TimerHandle]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadlines = {}
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._cut_off_after(self.header_seconds, "header")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request may have begun in the packet that ended this one.
        if self.conn.trailing_data[0]:
            self._await_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_off_after(self.write_seconds, "write")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._spare("write")

    def connection_lost(self, exc: Exception | None) -> None:
        self._spare("header")
        self._spare("write")
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._spare("header")
        elif "header" not in self._deadlines:
            self._cut_off_after(self.header_seconds, "header")

    def _cut_off_after(self, seconds: float, why: str) -> None:
        self._deadlines[why] = self.loop.call_later(seconds, self.transport.abort)

    def _spare(self, why: str) -> None:
        if why in self._deadlines:
            self._deadlines.pop(why).cancel()


def bounded(header_seconds: float, write_seconds: float, max_connections: int) -> type[BoundedConnection]:
    """`BoundedConnection` with these bounds, as a class, which is what uvicorn takes."""
    bounds = {"header_seconds": header_seconds, "write_seconds": write_seconds, "max_connections": max_connections}
    return type("BoundedConnection", (BoundedConnection,), bounds)
