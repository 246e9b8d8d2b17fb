import asyncio
import json

import httpx
import pytest
from fake_retriever import FakeRetriever

from retrievers import remote
from retrievers.base import RetrieverError
from retrievers.remote import HttpRetriever
from retrievers.server import make_app

URL = "http://test/retrieve"
GOOD = {"result": [[{"document": {"id": "a", "contents": "c"}, "score": 2}]]}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_BACKOFF_SECONDS", 0.001)


def ask(handler, queries=("x",), k=1, **options):
    async def run():
        transport = handler if isinstance(handler, httpx.AsyncBaseTransport) else httpx.MockTransport(handler)
        retriever = HttpRetriever(URL, transport=transport, **options)
        try:
            return await retriever.search(list(queries), k)
        finally:
            await retriever.close()

    return asyncio.run(run())


def test_the_client_and_the_server_understand_each_other():
    retriever = FakeRetriever()
    found = ask(httpx.ASGITransport(make_app(retriever)), ["x", "y"], 2)
    assert found == asyncio.run(FakeRetriever().search(["x", "y"], 2))


def test_a_lone_surrogate_reaches_the_server_as_a_replacement_character():
    retriever = FakeRetriever()
    ask(httpx.ASGITransport(make_app(retriever)), ["\ud800 x"], 1)
    assert retriever.calls == [(["� x"], 1)]


def test_the_request_is_search_r1s():
    def handler(request):
        assert json.loads(request.content) == {"queries": ["x"], "topk": 1, "return_scores": True}
        return httpx.Response(200, json=GOOD)

    (hit,) = ask(handler)[0]
    assert (hit.id, hit.contents, hit.score) == ("a", "c", 2.0)
    assert isinstance(hit.score, float)


def test_no_queries_need_no_server():
    def handler(request):
        raise AssertionError("nothing may be sent")

    assert ask(handler, []) == []


@pytest.mark.parametrize("trouble", [429, 500, 503, httpx.ConnectError("refused"), httpx.ReadError("cut")])
def test_passing_trouble_is_tried_again(trouble):
    seen = []

    def handler(request):
        seen.append(request)
        if len(seen) < 3:
            if isinstance(trouble, int):
                return httpx.Response(trouble)
            raise trouble
        return httpx.Response(200, json=GOOD)

    assert ask(handler, retries=2)[0][0].id == "a"
    assert len(seen) == 3


def test_lasting_trouble_ends_in_an_error_with_url_attempts_and_reason():
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(503, text="index closed")

    with pytest.raises(RetrieverError, match=r"http://test/retrieve .* 3 attempts.*503 index closed"):
        ask(handler, retries=2)
    assert len(seen) == 3


def test_a_refused_request_is_not_tried_again():
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(422, text="topk too large")

    with pytest.raises(RetrieverError, match="422 topk too large"):
        ask(handler, retries=5)
    assert len(seen) == 1


def test_an_attempt_ends_at_its_deadline():
    async def handler(request):
        await asyncio.sleep(60)

    with pytest.raises(RetrieverError, match=r"2 attempts.*within 0.02 s"):
        ask(handler, timeout_seconds=0.02, retries=1)


def test_a_caller_that_gives_up_is_not_kept():
    async def handler(request):
        await asyncio.sleep(60)

    async def run():
        retriever = HttpRetriever(URL, transport=httpx.MockTransport(handler))
        async with asyncio.timeout(0.05):
            await retriever.search(["x"], 1)

    with pytest.raises(TimeoutError):
        asyncio.run(run())


@pytest.mark.parametrize(
    "payload",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"result": []}',
        b'{"result": [[], []]}',
        b'{"result": ["a"]}',
        b'{"result": [["a"]]}',
        b'{"result": [[{"id": "a", "contents": "c"}]]}',
        b'{"result": [[{"document": {"contents": "c"}, "score": 1}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": null}, "score": 1}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": "1"}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": NaN}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": 1},'
        b' {"document": {"id": "b", "contents": "c"}, "score": 1}]]}',
    ],
)
def test_an_answer_in_another_format_is_an_error_and_not_tried_again(payload):
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(200, content=payload)

    with pytest.raises(RetrieverError, match="does not speak"):
        ask(handler)
    assert len(seen) == 1


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host/x", "http://", "http://host:port/"])
def test_a_url_that_cannot_work_is_refused_at_once(url):
    with pytest.raises(RetrieverError, match="URL"):
        HttpRetriever(url)
