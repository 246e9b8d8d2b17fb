"""The service does what its OpenAPI document says, whatever it is asked.

RETRIEVERS_FUZZ_SECONDS sets how long schemathesis asks; by default 15 s.
"""

import asyncio
import os

import httpx
import pytest
import schemathesis
from fake_retriever import FakeRetriever, OddRetriever, ReadingRetriever
from schemathesis.engine import Status, events, from_schema
from serving import served

from retrievers.base import CannotReadError
from retrievers.service.process import RetrieverStartingError
from retrievers.service.server import make_app

SECONDS = int(os.environ.get("RETRIEVERS_FUZZ_SECONDS", "15"))
TOKEN = {"Authorization": "Bearer secret"}


class Unable(FakeRetriever):
    async def search(self, queries, k):
        raise RetrieverStartingError("its process died")

    async def read(self, document_id):
        raise CannotReadError("it has no documents")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_no_request_gets_an_answer_that_is_not_documented():
    with served("fake_retriever:ReadingRetriever", app={"token": "secret"}) as service:
        schema = schemathesis.openapi.from_url(service.base + "/openapi.json", headers=TOKEN)
        schema.config.headers = TOKEN
        schema.config.max_time = SECONDS
        asked, problems = 0, []
        for event in from_schema(schema).execute():
            if isinstance(event, events.NonFatalError | events.FatalError):
                problems.append(repr(event)[:2000])
            elif isinstance(event, events.ScenarioFinished):
                record = event.recorder
                asked += len(record.interactions)
                for case_id, checks in record.checks.items():
                    failed = [check for check in checks if check.status is Status.FAILURE]
                    sent = record.interactions[case_id]
                    problems += [f"{check.name}: {sent.request.body!r} {sent.response!r}" for check in failed]
        assert problems == []
        assert asked >= 10
        assert httpx.get(service.base + "/health").json()["status"] == "ok"


async def slow_body():
    while True:
        yield b" "
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "path", "retriever", "request_", "bounds"),
    [
        (200, "/retrieve", OddRetriever, {"json": {"queries": ["x", "y"], "return_scores": True}}, {}),
        (200, "/retrieve", OddRetriever, {"json": {"queries": "x"}}, {}),
        (200, "/read", OddRetriever, {"json": {"id": "x"}}, {}),
        (200, "/read", OddRetriever, {"json": {"id": "none"}}, {}),
        (200, "/health", OddRetriever, {}, {"about": {"documents": 7}}),
        (200, "/metrics", OddRetriever, {}, {}),
        (401, "/retrieve", OddRetriever, {"headers": {"Authorization": "Bearer wrong"}}, {}),
        (401, "/read", OddRetriever, {"headers": {"Authorization": "Bearer wrong"}}, {}),
        (401, "/metrics", OddRetriever, {"headers": {"Authorization": "Bearer wrong"}}, {}),
        (408, "/retrieve", OddRetriever, {"content": slow_body}, {"body_seconds": 0.05}),
        (408, "/read", OddRetriever, {"content": slow_body}, {"body_seconds": 0.05}),
        (413, "/retrieve", OddRetriever, {"content": b" " * 100}, {"max_body_bytes": 50}),
        (413, "/read", OddRetriever, {"content": b" " * 100}, {"max_body_bytes": 50}),
        (422, "/retrieve", OddRetriever, {"json": {"queries": ["x"] * 3}}, {"max_queries": 2}),
        (422, "/read", OddRetriever, {"content": b"\xff"}, {}),
        (429, "/retrieve", OddRetriever, {"json": {"queries": "x"}}, {"max_waiting": 0}),
        (429, "/read", OddRetriever, {"json": {"id": "x"}}, {"max_waiting": 0}),
        (501, "/read", Unable, {"json": {"id": "x"}}, {}),
        (503, "/retrieve", Unable, {"json": {"queries": "x"}}, {}),
        (503, "/health", Unable, {}, {}),
        (504, "/retrieve", OddRetriever, {"json": {"queries": "sleep 9"}}, {"timeout_seconds": 0.05}),
    ],
)
def test_every_answer_that_can_be_provoked_is_documented(status, path, retriever, request_, bounds):
    app = make_app(retriever(), token="secret", **bounds)
    request = {key: value() if value is slow_body else value for key, value in request_.items()}
    request["headers"] = TOKEN | request.get("headers", {})

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request("POST" if path in ("/retrieve", "/read") else "GET", path, **request)

    response = asyncio.run(run())
    assert response.status_code == status
    operation = schemathesis.openapi.from_dict(app.openapi())[path][response.request.method]
    assert str(status) in operation.definition.raw["responses"]
    # A request that was streamed cannot be looked at afterwards.
    checked = httpx.Response(status, headers=response.headers, content=response.content)
    checked.request = httpx.Request(response.request.method, response.request.url)
    checked.elapsed = response.elapsed
    operation.validate_response(checked)


def test_what_is_not_there_is_not_documented():
    paths = make_app(FakeRetriever()).openapi()["paths"]
    assert set(paths) == {"/retrieve", "/health", "/metrics"}
    assert "401" not in paths["/retrieve"]["post"]["responses"]
    assert set(make_app(ReadingRetriever()).openapi()["paths"]) == {"/retrieve", "/read", "/health", "/metrics"}
