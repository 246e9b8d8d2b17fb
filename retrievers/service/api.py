"""What the retrieval service takes and gives, and its description in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
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


class Refused(BaseModel):
    """Why a request was not served."""

    detail: str


def retrieve_route(max_queries: int, max_k: int, token: bool) -> dict[str, Any]:
    """What FastAPI is told of `POST /retrieve`."""
    schema = Ask.model_json_schema()
    schema["properties"]["queries"]["anyOf"][1]["maxItems"] = max_queries
    schema["properties"]["topk"]["anyOf"][0] |= {"minimum": 1, "maximum": max_k}
    return _post(schema, Found, [408, 413, 422, 429, 503, 504], token)


def read_route(token: bool) -> dict[str, Any]:
    """What FastAPI is told of `POST /read`."""
    return _post(ReadAsk.model_json_schema(), Read, [408, 413, 422, 429, 501, 503, 504], token)


def health_route() -> dict[str, Any]:
    """What FastAPI is told of `GET /health`."""
    return {"responses": {200: {"model": Health}, 503: {"model": Health, "description": "No search works now."}}}


def metrics_route(token: bool) -> dict[str, Any]:
    """What FastAPI is told of `GET /metrics`."""
    text = {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"responses": {200: text} | _refusals([], token), "openapi_extra": _secured(token)}


def describe(app: FastAPI, token: bool) -> None:
    """Give `app` its OpenAPI document, made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            if token:
                bearer = {"bearer": {"type": "http", "scheme": "bearer"}}
                app.openapi_schema.setdefault("components", {})["securitySchemes"] = bearer
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _post(schema: dict[str, Any], model: type[BaseModel], statuses: list[int], token: bool) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {
        "responses": {200: {"model": model}} | _refusals(statuses, token),
        "openapi_extra": {"requestBody": body} | _secured(token),
    }


def _refusals(statuses: list[int], token: bool) -> dict[int | str, dict[str, Any]]:
    listed = [401, *statuses] if token else statuses
    return {status: {"model": Refused, "description": _REASONS[status]} for status in listed}


def _secured(token: bool) -> dict[str, Any]:
    return {"security": [{"bearer": []}]} if token else {}
