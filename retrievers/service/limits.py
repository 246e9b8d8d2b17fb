"""Middleware that refuses a request with a wrong token, a large or slow body, or no free place, and counts and logs all."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrievers.base import clean_text
from retrievers.service.prometheus import Metrics

REQUEST_LOG = logging.getLogger("retrievers.requests")
"""One JSON object a request, at level INFO. Queries themselves are not in it."""

_RECORD = "retrievers.record"
_CLIENT_GONE = 499
# More of a refused body may be on its way.
_CLOSE = {"Connection": "close"}


@dataclass(slots=True)
class Record:
    """What is logged of a request; the endpoints add `queries` and `k`."""

    id: str
    began: float = field(default_factory=time.monotonic)
    status: int = 500
    queries: int | None = None
    k: int | None = None


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The bounds of a request.

    Attributes:
        token: what `Authorization: Bearer` must say, except at the open paths; None lets everybody in.
        max_body_bytes: largest body.
        body_seconds: for a body to arrive, counted from the end of the headers.
        max_waiting: POST requests that may wait for their answers at the same time; more get status 429.
    """

    token: str | None = None
    max_body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    max_waiting: int = 256


def record_of(scope: Scope) -> Record:
    """The record of the request that `scope` belongs to."""
    return scope[_RECORD]


def answer_json(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer. Raises ValueError if a number in it is not finite."""
    body = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers, "application/json")


def answer_error(error: HTTPException) -> Response:
    """The answer to a request that fails: `{"detail": why}`."""
    return answer_json({"detail": clean_text(error.detail)}, error.status_code, dict(error.headers or {}))


class RequestLimitsMiddleware:
    """Enforces `RequestLimits`, counts and logs every request, and gives it an id (`X-Request-ID`)."""

    def __init__(
        self, app: ASGIApp, limits: RequestLimits, metrics: Metrics, paths: Collection[str], open_paths: Collection[str]
    ) -> None:
        """`paths` are counted by name, all others together; `open_paths` need no token."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._paths, self._open_paths = paths, open_paths
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = scope[_RECORD] = Record(_request_id(headers.get(b"x-request-id", b"")))

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._handle(scope, receive, noted, headers)
        finally:
            self._note(scope, record)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        try:
            self._check_token(scope["path"], headers.get(b"authorization", b""))
            body = await self._read_body(headers.get(b"content-length", b"0"), receive)
            if body is None:
                record_of(scope).status = _CLIENT_GONE
                return
            if scope["method"] == "POST" and self._waiting >= self._limits.max_waiting:
                what = f"{self._waiting} requests are waiting already; come back later"
                raise HTTPException(429, what, {"Retry-After": "1"})
        except HTTPException as error:
            await answer_error(error)(scope, receive, send)
            return

        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        self._waiting += 1
        self._metrics.in_flight.set(self._waiting)
        try:
            await self._app(scope, replay, send)
        finally:
            self._waiting -= 1
            self._metrics.in_flight.set(self._waiting)

    def _check_token(self, path: str, authorization: bytes) -> None:
        if self._limits.token is None or path in self._open_paths:
            return
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._limits.token.encode()):
            what = "send the service's token as `Authorization: Bearer …`"
            raise HTTPException(401, what, {"WWW-Authenticate": "Bearer"} | _CLOSE)

    async def _read_body(self, announced: bytes, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away. Raises HTTPException if it is too large or too slow."""
        most = self._limits.max_body_bytes
        too_large = HTTPException(413, f"the request's body is larger than {most} bytes", _CLOSE)
        if announced.isdigit() and int(announced[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            what = f"the request's body did not come within {self._limits.body_seconds:g} s"
            raise HTTPException(408, what, _CLOSE) from error

    def _note(self, scope: Scope, record: Record) -> None:
        seconds = time.monotonic() - record.began
        path = scope["path"]
        self._metrics.answered(path if path in self._paths else "other", record.status, seconds)
        if REQUEST_LOG.isEnabledFor(logging.INFO):
            line = {
                "time": time.time(),
                "request": record.id,
                "method": scope["method"],
                "path": path,
                "status": record.status,
                "seconds": round(seconds, 6),
                "queries": record.queries,
                "k": record.k,
            }
            REQUEST_LOG.info("%s", json.dumps(line))


def _request_id(given: bytes) -> str:
    """The client's own id, where it is one that a log can hold; else a new one."""
    return given.decode() if re.fullmatch(rb"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
