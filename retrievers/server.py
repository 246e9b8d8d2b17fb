"""Serves a retriever over HTTP in the wire format of Search-R1's retrieval server; see `retrievers.remote`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrievers.base import Hit, Retriever, RetrieverError


class Ask(BaseModel):
    """The body of `POST /retrieve`. Without `topk` the server's own default applies."""

    model_config = ConfigDict(strict=True)

    queries: str | list[str]
    topk: int | None = None
    return_scores: bool = False


def make_app(
    retriever: Retriever,
    *,
    default_k: int = 3,
    max_queries: int = 256,
    max_k: int = 100,
    max_body_bytes: int = 1 << 20,
    timeout_seconds: float = 30.0,
    about: Mapping[str, object] | None = None,
) -> FastAPI:
    """Make the web application: `POST /retrieve`, and `GET /health`, which proves itself by a search.

    Errors are answered as 413 (body too large), 422 (request not valid or beyond a bound), 503 (the retriever failed)
    and 504 (it was too slow).

    Args:
        retriever: what searches.
        default_k: hits for each query where the request does not say.
        max_queries: of one request.
        max_k: largest `topk`.
        max_body_bytes: largest request body.
        timeout_seconds: for one request's search.
        about: added to the answer of `/health`, such as the hash of the corpus.
    """
    app = FastAPI(title="Search-R1 compatible retrieval")
    app.add_middleware(_BoundedBody, max_bytes=max_body_bytes)
    app.add_exception_handler(RequestValidationError, _explain)

    async def search(queries: list[str], k: int) -> list[list[Hit]]:
        try:
            async with asyncio.timeout(timeout_seconds):
                return await retriever.search(queries, k)
        except TimeoutError as error:
            raise HTTPException(504, f"the search took longer than {timeout_seconds} s") from error
        except RetrieverError as error:
            raise HTTPException(503, str(error)) from error

    @app.post("/retrieve")
    async def retrieve(ask: Ask) -> dict[str, list[list[dict[str, Any]]]]:
        queries = [ask.queries] if isinstance(ask.queries, str) else ask.queries
        k = default_k if ask.topk is None else ask.topk
        if len(queries) > max_queries:
            raise HTTPException(422, f"{len(queries)} queries; at most {max_queries} are taken in one request")
        if not 1 <= k <= max_k:
            raise HTTPException(422, f"topk is {k} and must be between 1 and {max_k}")
        rows = await search(queries, k) if queries else []
        return {"result": [[_wire(hit, ask.return_scores) for hit in row] for row in rows]}

    @app.get("/health")
    async def health() -> dict[str, object]:
        await search(["health"], 1)
        return {"status": "ok", **(about or {})}

    return app


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until interrupted. There are no passwords: choose another host than this one in trusted networks only."""
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _wire(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = {"id": hit.id, "contents": hit.contents}
    return {"document": document, "score": hit.score} if with_score else document


async def _explain(_: Request, error: Exception) -> JSONResponse:
    # FastAPI's own handler sends the whole input back, and fails where that is not valid Unicode.
    assert isinstance(error, RequestValidationError)
    reasons = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return JSONResponse({"detail": "; ".join(reasons[:5])}, status_code=422)


class _BoundedBody:
    """Stops reading a request's body at `max_bytes` and answers 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise HTTPException(413, f"the request's body is larger than {self._max_bytes} bytes")
            return message

        await self._app(scope, bounded, send)
