"""Serves a retriever over HTTP in the wire format of Search-R1's retrieval server; see `retrievers.clients.wire`."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from retrievers.base import Hit, Reader, Retriever, RetrieverError, clean_text, read
from retrievers.service import api
from retrievers.service.connections import bounded
from retrievers.service.limits import (
    REQUEST_LOG,
    RequestLimits,
    RequestLimitsMiddleware,
    answer_error,
    answer_json,
    record_of,
)
from retrievers.service.prometheus import CONTENT_TYPE
from retrievers.service.served import ServedRetriever

_Model = TypeVar("_Model", bound=BaseModel)


def make_app(
    retriever: Retriever,
    *,
    default_k: int = 3,
    max_queries: int = 256,
    max_k: int = 100,
    max_body_bytes: int = 1 << 20,
    timeout_seconds: float = 30.0,
    about: Mapping[str, object] | None = None,
    token: str | None = None,
    body_seconds: float = 10.0,
    max_waiting: int = 256,
) -> FastAPI:
    """Make the web application.

    It answers `POST /retrieve`, `POST /read` where the retriever reads whole documents, `GET /health`, which proves
    itself by a search, `GET /metrics` for Prometheus and `GET /openapi.json`. Errors are `{"detail": why}` with status
    401 (token), 408 (body too slow), 413 (body too large), 422 (request not valid or beyond a bound), 429 (too many
    wait), 503 (the retriever failed or starts) or 504 (it was too slow).

    Args:
        retriever: what searches. `serve` enters and leaves it, if it is an asynchronous context manager.
        default_k: hits for each query where the request does not say.
        max_queries: of one request.
        max_k: largest `topk`.
        max_body_bytes: largest request body.
        timeout_seconds: for one request's search.
        about: added to the answer of `/health`, such as the hash of the corpus.
        token: what clients must send as `Authorization: Bearer …`, except for `/health`; None lets everybody in.
        body_seconds: within which a request's body must come.
        max_waiting: POST requests that may wait for their answers together.

    Raises:
        RetrieverError: if the token is empty or cannot stand in a header, or `default_k` is beyond `max_k`.
    """
    if not 1 <= default_k <= max_k:
        raise RetrieverError(f"default_k is {default_k} and must be between 1 and max_k, {max_k}")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise RetrieverError("the token must be printable ASCII and not empty; check it for line breaks")
    served = ServedRetriever(retriever, timeout_seconds)
    app = FastAPI(title="Retrieval in Search-R1's format", docs_url=None, redoc_url=None)
    app.state.retriever = retriever
    limits = RequestLimits(token, max_body_bytes, body_seconds, max_waiting)
    paths = {"/retrieve", "/read", "/health", "/metrics"}
    app.add_middleware(
        RequestLimitsMiddleware, limits=limits, metrics=served.metrics, paths=paths, open_paths={"/health"}
    )
    app.exception_handler(HTTPException)(_fail)
    _add_search(app, served, default_k, max_queries, max_k, secured=token is not None)
    if isinstance(retriever, Reader):
        _add_read(app, served, retriever, secured=token is not None)
    _add_status(app, served, about or {}, secured=token is not None)
    return app


async def _fail(request: Request, error: HTTPException) -> Response:
    return answer_error(error)


def _add_search(
    app: FastAPI, served: ServedRetriever, default_k: int, max_queries: int, max_k: int, *, secured: bool
) -> None:
    @app.post("/retrieve", **api.retrieve_route(max_queries, max_k, secured=secured))
    async def retrieve(request: Request) -> Response:
        ask = _parse(api.Ask, await request.body())
        queries = [ask.queries] if isinstance(ask.queries, str) else ask.queries
        k = default_k if ask.topk is None else ask.topk
        if len(queries) > max_queries:
            raise HTTPException(422, f"{len(queries)} queries; at most {max_queries} are taken in one request")
        if not 1 <= k <= max_k:
            raise HTTPException(422, f"topk is {k} and must be between 1 and {max_k}")
        record = record_of(request.scope)
        record.queries, record.k = len(queries), k
        rows = await served.search(queries, k) if queries else []
        return _answer({"result": [[_wire(hit, ask.return_scores) for hit in row] for row in rows]})


def _add_read(app: FastAPI, served: ServedRetriever, reader: Reader, *, secured: bool) -> None:
    @app.post("/read", **api.read_route(secured=secured))
    async def read_document(request: Request) -> Response:
        ask = _parse(api.ReadAsk, await request.body())
        found = await served.run(lambda: read(reader, ask.id))
        return _answer({"document": None if found is None else _wire(found, False)})


def _add_status(app: FastAPI, served: ServedRetriever, about: Mapping[str, object], *, secured: bool) -> None:
    @app.get("/health", **api.health_route())
    async def health() -> Response:
        status, reason = await served.health()
        return answer_json({**about, "status": status, **reason}, 200 if status == "ok" else 503)

    @app.get("/metrics", **api.metrics_route(secured=secured))
    async def metrics() -> Response:
        return Response(served.metrics.render(), media_type=CONTENT_TYPE)


def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    header_seconds: float = 10.0,
    write_seconds: float = 30.0,
    max_connections: int = 512,
    log_requests: bool = False,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve what `make_app` made until SIGINT or SIGTERM.

    Args:
        app: from `make_app`.
        host: give another one than this only with a token, or in a trusted network.
        port: 0 takes a free one.
        header_seconds: within which a request's headers must come.
        write_seconds: for which a client may leave an answer unread.
        max_connections: at once; more are cut off.
        log_requests: write one JSON object a request to stderr.
        on_ready: called with the service's URL when it can be asked.

    Raises:
        RetrieverError: if nothing can listen there, or the retriever does not start.
    """
    if log_requests:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        REQUEST_LOG.addHandler(handler)
        REQUEST_LOG.setLevel(logging.INFO)
        REQUEST_LOG.propagate = False
    config = uvicorn.Config(
        app,
        http=bounded(header_seconds, write_seconds, max_connections),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Longer than clients keep a connection, or they would meet one that is just being closed.
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
    )
    # uvicorn has ended in order when it passes the interruption on.
    with (
        _listener(host, port) as listener,
        suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
    ):
        runner.run(_serve(app, uvicorn.Server(config), listener, on_ready))


async def _serve(
    app: FastAPI, server: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]
) -> None:
    retriever = app.state.retriever
    async with retriever if isinstance(retriever, AbstractAsyncContextManager) else nullcontext():
        listener.listen(1024)
        host, port = listener.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve")
        await server.serve([listener])


def _listener(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RetrieverError(f"cannot listen on {host}:{port}: {error.strerror}; choose another") from error
    return listener


def _parse(model: type[_Model], body: bytes) -> _Model:
    """Read a body. Raises HTTPException of status 422 if it is invalid."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        reasons = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in reasons[:5]]
        raise HTTPException(422, "; ".join(lines)) from error


def _answer(payload: dict[str, Any]) -> Response:
    """Write an answer. Raises HTTPException of status 503 if a score cannot be written."""
    try:
        return answer_json(payload)
    except ValueError as error:
        raise HTTPException(503, "the retriever gave a score that is not a finite number") from error


def _wire(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = {"id": clean_text(hit.id), "contents": clean_text(hit.contents)}
    return {"document": document, "score": hit.score} if with_score else document
