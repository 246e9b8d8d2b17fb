"""What the retrieval service takes and gives, and its description in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict

_REASONS = {
    401: "The service's token is missing or wrong.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    422: "The body is not valid, or beyond a bound.",
    429: "Too many requests wait already; Retry-After says when to come back.",
    501: "The retriever has no whole documents.",
    503: "The retriever failed, or is starting and Retry-After says when to come back.",
    504: "The retriever took too long.",
}

# Says so in the description; the middleware checks the token, before it reads the body.
_BEARER = [Depends(HTTPBearer(auto_error=False))]


def _whole(value: object) -> object:
    # To JSON Schema, which describes the body, 3.0 is an integer.
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Ask(BaseModel):
    """The body of `POST /retrieve`. Without `topk` the service's own default applies."""

    model_config = ConfigDict(strict=True)

    queries: str | list[str]
    topk: Annotated[int | None, BeforeValidator(_whole)] = None
    return_scores: bool = False


class ReadAsk(BaseModel):
    """The body of `POST /read`."""

    model_config = ConfigDict(strict=True)

    id: str


class Document(BaseModel):
    """A passage or a whole document. `contents` is `"Title"` in double quotes, a line break, then the text."""

    id: str
    contents: str


class ScoredDocument(BaseModel):
    """A hit, where the request asks for scores."""

    document: Document
    score: float


class Found(BaseModel):
    """A list for each query, best hit first."""

    result: list[list[ScoredDocument] | list[Document]]


class Read(BaseModel):
    """The document, or null if none has the id."""

    document: Document | None


class Health(BaseModel):
    """Whether a search works, and what is searched."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "starting", "failing"]


class Failed(BaseModel):
    """Why a request was not served."""

    detail: str


def retrieve_route(max_queries: int, max_k: int, *, secured: bool) -> dict[str, Any]:
    """What FastAPI is told of `POST /retrieve`."""
    schema = Ask.model_json_schema()
    schema["properties"]["queries"]["anyOf"][1]["maxItems"] = max_queries
    schema["properties"]["topk"]["anyOf"][0] |= {"minimum": 1, "maximum": max_k}
    return _post(schema, Found, [408, 413, 422, 429, 503, 504], secured)


def read_route(*, secured: bool) -> dict[str, Any]:
    """What FastAPI is told of `POST /read`."""
    return _post(ReadAsk.model_json_schema(), Read, [408, 413, 422, 429, 501, 503, 504], secured)


def health_route() -> dict[str, Any]:
    """What FastAPI is told of `GET /health`."""
    return {"responses": {200: {"model": Health}, 503: {"model": Health, "description": "No search works now."}}}


def metrics_route(*, secured: bool) -> dict[str, Any]:
    """What FastAPI is told of `GET /metrics`."""
    text = {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"responses": {200: text} | _errors([], secured), "dependencies": _BEARER if secured else []}


def _post(schema: dict[str, Any], model: type[BaseModel], statuses: list[int], secured: bool) -> dict[str, Any]:
    # The endpoints read the body themselves: FastAPI would answer one that is not JSON with other statuses.
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {
        "responses": {200: {"model": model}} | _errors(statuses, secured),
        "openapi_extra": {"requestBody": body},
        "dependencies": _BEARER if secured else [],
    }


def _errors(statuses: list[int], secured: bool) -> dict[int | str, dict[str, Any]]:
    listed = [401, *statuses] if secured else statuses
    return {status: {"model": Failed, "description": _REASONS[status]} for status in listed}
