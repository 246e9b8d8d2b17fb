import asyncio
import json

import httpx
import pytest
from fake_retriever import FakeRetriever

from retrievers.server import make_app


def send(retriever, method="POST", path="/retrieve", *, body=None, content=None, **bounds):
    async def run():
        app = make_app(retriever, **bounds)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, json=body, content=content)

    return asyncio.run(run())


def test_scores_come_as_search_r1_sends_them():
    response = send(FakeRetriever(), body={"queries": ["x", "y"], "topk": 1, "return_scores": True})
    assert response.json() == {
        "result": [
            [{"document": {"id": "x-0", "contents": '"x"\ntext 0'}, "score": 1.0}],
            [{"document": {"id": "y-0", "contents": '"y"\ntext 0'}, "score": 1.0}],
        ]
    }


def test_without_scores_the_documents_stand_alone():
    response = send(FakeRetriever(), body={"queries": ["x"], "topk": 1})
    assert response.json() == {"result": [[{"id": "x-0", "contents": '"x"\ntext 0'}]]}


def test_one_query_may_be_a_string_and_topk_may_be_null():
    retriever = FakeRetriever()
    assert len(send(retriever, body={"queries": "x", "topk": None}, default_k=4).json()["result"][0]) == 4
    assert retriever.calls == [(["x"], 4)]


def test_no_queries_have_no_results():
    assert send(FakeRetriever(), body={"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"queries": ["x"] * 3}, "3 queries; at most 2"),
        ({"queries": ["x"], "topk": 0}, "between 1 and 5"),
        ({"queries": ["x"], "topk": 6}, "between 1 and 5"),
        ({"queries": ["x"], "topk": "3"}, "topk"),
        ({"queries": [1]}, "queries"),
        ({"topk": 1}, "queries"),
    ],
)
def test_a_request_beyond_a_bound_is_refused_before_the_search(body, reason):
    retriever = FakeRetriever()
    response = send(retriever, body=body, max_queries=2, max_k=5)
    assert response.status_code == 422
    assert reason in response.json()["detail"]
    assert retriever.calls == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"queries": "\\ud800"}', b'{"queries": "x", "topk": NaN}'])
def test_a_body_that_is_no_valid_json_or_text_is_refused(content):
    assert send(FakeRetriever(), content=content).status_code in (400, 422)


def test_a_large_body_is_refused_even_when_it_comes_in_pieces_without_a_length():
    async def pieces():
        for _ in range(20):
            yield b" " * 100

    response = send(FakeRetriever(), content=pieces(), max_body_bytes=1000)
    assert response.status_code == 413
    body = json.dumps({"queries": "x" * 1000}).encode()
    assert send(FakeRetriever(), content=body, max_body_bytes=1000).status_code == 413


def test_a_failing_retriever_is_a_503_that_says_why():
    retriever = FakeRetriever()
    retriever.error = "the index is gone"
    response = send(retriever, body={"queries": "x"})
    assert (response.status_code, response.json()["detail"]) == (503, "the index is gone")


def test_a_slow_retriever_is_a_504():
    class Slow:
        async def search(self, queries, k):
            await asyncio.sleep(60)

    assert send(Slow(), body={"queries": "x"}, timeout_seconds=0.05).status_code == 504


def test_health_searches_and_tells_about_the_index():
    retriever = FakeRetriever()
    response = send(retriever, "GET", "/health", about={"documents": 7})
    assert response.json() == {"status": "ok", "documents": 7}
    retriever.error = "gone"
    assert send(retriever, "GET", "/health").status_code == 503
