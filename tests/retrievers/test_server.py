import asyncio
import json
import logging

import httpx
import pytest
from fake_retriever import FakeRetriever, OddRetriever, ReadingRetriever
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers.base import RetrieverError
from retrievers.service.process import RetrieverStartingError
from retrievers.service.server import make_app
from retrievers.stages.cache import CachedRetriever, RecordingRetriever, ReplayRetriever


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def send(retriever, method="POST", path="/retrieve", *, body=None, content=None, headers=None, **bounds):
    async def run():
        async with client_of(make_app(retriever, **bounds)) as client:
            return await client.request(method, path, json=body, content=content, headers=headers)

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


def test_a_topk_of_three_point_zero_is_three():
    assert len(send(FakeRetriever(), body={"queries": "x", "topk": 3.0}).json()["result"][0]) == 3


def test_no_queries_have_no_results():
    assert send(FakeRetriever(), body={"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"queries": ["x"] * 3}, "3 queries; at most 2"),
        ({"queries": ["x"], "topk": 0}, "between 1 and 5"),
        ({"queries": ["x"], "topk": 6}, "between 1 and 5"),
        ({"queries": ["x"], "topk": "3"}, "topk"),
        ({"queries": ["x"], "topk": 2.5}, "topk"),
        ({"queries": ["x"], "topk": 1e300}, "between 1 and 5"),
        ({"queries": ["x"], "topk": True}, "topk"),
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


def test_health_asks_the_retriever_itself_and_not_what_is_remembered_of_it(tmp_path):
    inner, file = FakeRetriever(), tmp_path / "run.sqlite"
    for wrapped in (CachedRetriever(inner, tmp_path, "a"), RecordingRetriever(inner, file, "a")):
        inner.error = None
        assert send(wrapped, "GET", "/health").json() == {"status": "ok"}
        inner.error = "gone"
        assert send(wrapped, "GET", "/health").json() == {"status": "failing", "detail": "gone"}
    assert send(ReplayRetriever(file), "GET", "/health").json() == {"status": "ok"}


def test_health_searches_once_a_second_at_most_however_many_ask():
    async def run():
        retriever = FakeRetriever()
        async with client_of(make_app(retriever)) as client:
            answers = await asyncio.gather(*(client.get("/health") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(retriever.calls) == 1

    asyncio.run(run())


def test_a_retriever_that_starts_is_told_from_one_that_failed():
    class Starting:
        async def search(self, queries, k):
            raise RetrieverStartingError("its process died")

    response = send(Starting(), body={"queries": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert send(Starting(), "GET", "/health").json() == {"status": "starting", "detail": "its process died"}
    retriever = FakeRetriever()
    retriever.error = "gone"
    response = send(retriever, body={"queries": "x"})
    assert (response.status_code, "retry-after" in response.headers) == (503, False)
    assert send(retriever, "GET", "/health").json() == {"status": "failing", "detail": "gone"}


def test_whole_documents_are_read_where_the_retriever_has_them():
    document = {"id": "a/\x00b", "contents": '"a/\x00b"\nwhole'}
    assert send(ReadingRetriever(), path="/read", body={"id": "a/\x00b"}).json() == {"document": document}
    assert send(ReadingRetriever(), path="/read", body={"id": "none"}).json() == {"document": None}
    assert send(ReadingRetriever(), path="/read", body={"id": 7}).status_code == 422
    assert send(FakeRetriever(), path="/read", body={"id": "a"}).status_code == 404


def test_without_the_token_nothing_but_health_is_answered():
    for path, method in [("/retrieve", "POST"), ("/read", "POST"), ("/metrics", "GET"), ("/openapi.json", "GET")]:
        for authorization in (None, "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2"):
            retriever = ReadingRetriever()
            headers = {} if authorization is None else {"Authorization": authorization}
            response = send(retriever, method, path, content=b"{}", headers=headers, token="secret")
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            assert retriever.calls == []
    assert send(FakeRetriever(), "GET", "/health", token="secret").status_code == 200
    right = {"Authorization": "bearer secret"}
    assert send(FakeRetriever(), body={"queries": "x"}, headers=right, token="secret").status_code == 200
    for token in ("", " ", "a\nb", "é"):
        with pytest.raises(RetrieverError, match="token must be printable"):
            make_app(FakeRetriever(), token=token)


def test_a_body_that_comes_too_slowly_is_a_408_that_closes_the_connection():
    async def slow():
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    response = send(FakeRetriever(), content=slow(), body_seconds=0.1)
    assert (response.status_code, response.headers["connection"]) == (408, "close")


def test_beyond_the_bound_requests_are_told_when_to_come_back_and_the_others_are_served():
    async def run():
        async with client_of(make_app(OddRetriever(), max_waiting=4)) as client:
            tasks = [client.post("/retrieve", json={"queries": "sleep 0.2"}) for _ in range(10)]
            answers = await asyncio.gather(*tasks, client.get("/health"))
            assert answers.pop().status_code == 200
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 6
            assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 429} == {"1"}
            # Places come free again.
            assert (await client.post("/retrieve", json={"queries": "x"})).status_code == 200

    asyncio.run(run())


def test_metrics_count_requests_queries_and_failures():
    async def run():
        async with client_of(make_app(OddRetriever())) as client:
            await client.post("/retrieve", json={"queries": ["x", "y"]})
            await client.post("/retrieve", json={"queries": ["error"]})
            await client.post("/retrieve", json={})
            await client.get("/no/such/path")
            return await client.get("/metrics")

    response = asyncio.run(run())
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert lines['retrievers_requests_total{path="/retrieve",status="200"}'] == "1.0"
    assert lines['retrievers_requests_total{path="/retrieve",status="503"}'] == "1.0"
    assert lines['retrievers_requests_total{path="/retrieve",status="422"}'] == "1.0"
    assert lines['retrievers_requests_total{path="other",status="404"}'] == "1.0"
    assert lines['retrievers_request_seconds_count{path="/retrieve"}'] == "3.0"
    assert lines["retrievers_queries_total"] == "3.0"
    assert lines["retrievers_failures_total"] == "1.0"
    # The one that asks.
    assert lines["retrievers_in_flight"] == "1.0"


def test_a_request_is_logged_as_one_json_line_without_its_queries(caplog):
    with caplog.at_level(logging.INFO, "retrievers.requests"):
        response = send(FakeRetriever(), body={"queries": ["private"], "topk": 2}, headers={"X-Request-ID": "run-7.a"})
        other = send(FakeRetriever(), path="/x%0Ay", headers={"X-Request-ID": "a b"})
    first, second = (json.loads(record.message) for record in caplog.records)
    wanted = {"request": "run-7.a", "method": "POST", "path": "/retrieve", "status": 200, "queries": 1, "k": 2}
    assert first.items() >= wanted.items()
    assert 0 <= first["seconds"] < 5
    assert "private" not in caplog.text
    assert response.headers["x-request-id"] == "run-7.a"
    assert (second["status"], second["request"]) == (404, other.headers["x-request-id"])
    assert second["request"] != "a b"


def test_requests_are_not_logged_unless_asked_for(caplog):
    send(FakeRetriever(), body={"queries": "x"})
    assert caplog.records == []


def test_broken_text_in_passages_reaches_the_client_as_replacement_characters():
    response = send(OddRetriever(), body={"queries": "surrogate"})
    assert response.json()["result"] == [[{"id": "\ufffd", "contents": "half \ufffd of a pair \x00\x1b"}]]


@pytest.mark.parametrize(("query", "reason"), [("nan", "not a finite number"), ("few", "0 lists of hits for 1")])
def test_an_answer_that_cannot_be_right_is_a_503(query, reason):
    response = send(OddRetriever(), body={"queries": query, "return_scores": True})
    assert response.status_code == 503
    assert reason in response.json()["detail"]


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=30).map(lambda text: json.dumps({"queries": text}).encode()))
def test_no_body_whatever_breaks_the_service(content):
    for path in ("/retrieve", "/read"):
        assert send(ReadingRetriever(), path=path, content=content).status_code in (200, 422)


@pytest.mark.parametrize("query", ["\x00\x01\x1b[31m", "\u202e\ufeff\uffff", "a\r\nb", "🙂" * 1000, ""])
def test_odd_characters_in_queries_arrive_as_they_are(query):
    retriever = FakeRetriever()
    assert send(retriever, body={"queries": [query]}).status_code == 200
    assert retriever.calls == [([query], 3)]
