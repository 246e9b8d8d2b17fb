"""Web search through adapters: the user's key, the provider's names, and hits."""

import asyncio
import json

import httpx
import pytest

from retrievers.base import Hit, RetrieverError
from retrievers.clients import http as calling
from retrievers.clients.web import JsonApi, JsonWebSearch, WebSearch

GET = JsonApi("https://search.test/v1", results="web.results", count="n", key_variable="TEST_KEY", key_header="X-Key")
POST = JsonApi(
    "https://search.test/", results="organic", method="POST", text="snippet", link="link", count=None, key_variable=None
)


@pytest.fixture(autouse=True)
def _key_and_no_pauses(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "mine")
    monkeypatch.setattr(calling, "_BACKOFF_SECONDS", 0.001)


def ask(api, handler, queries=("x",), k=2, **options):
    async def run():
        search = JsonWebSearch(api, transport=httpx.MockTransport(handler), **options)
        try:
            return await search.search(list(queries), k)
        finally:
            await search.close()

    return asyncio.run(run())


def test_a_get_service_gets_query_count_and_key_and_its_results_become_hits():
    def handler(request):
        assert request.headers["x-key"] == "Bearer mine"
        assert dict(request.url.params) == {"q": "who is \ufffd?", "n": "2"}
        results = [
            {"title": 'A "b"\nc', "description": "text", "url": "https://a"},
            {"title": None, "url": "https://b"},
            {"url": "https://c"},
        ]
        return httpx.Response(200, json={"web": {"results": results}})

    assert ask(GET, handler, ["who is \ud800?"]) == [
        [Hit("https://a", '"A "b" c"\ntext', 1.0), Hit("https://b", '""\n', 0.5)]
    ]


def test_a_post_service_gets_json():
    def handler(request):
        assert json.loads(request.content) == {"q": "x"}
        return httpx.Response(200, json={"organic": [{"title": "A", "snippet": "b", "link": "u"}]})

    assert ask(POST, handler) == [[Hit("u", '"A"\nb', 1.0)]]


def test_a_service_may_be_described_in_a_config_file():
    described = {"url": "https://search.test/", "results": "organic", "link": "link", "text": "snippet"}
    answer = {"organic": [{"title": "A", "snippet": "b", "link": "u"}]}
    assert ask(described, lambda request: httpx.Response(200, json=answer)) == [[Hit("u", '"A"\nb', 1.0)]]
    for wrong in ({"url": "https://search.test/"}, described | {"key": "secret"}):
        with pytest.raises(RetrieverError, match="the description of a web search is not one"):
            JsonWebSearch(wrong)


def test_several_queries_keep_their_order_and_one_that_finds_nothing_has_no_hits():
    def handler(request):
        query = request.url.params["q"]
        return httpx.Response(200, json={"web": {"results": [{"url": query}]}} if query != "none" else {"web": {}})

    rows = ask(GET, handler, [f"q{i}" for i in range(20)] + ["none"])
    assert [[hit.id for hit in row] for row in rows] == [[f"q{i}"] for i in range(20)] + [[]]


def test_passing_trouble_is_tried_again_and_a_refusal_is_not():
    statuses = [500, 429, 200, 403]

    def handler(request):
        return httpx.Response(statuses.pop(0), json={"organic": []}, text=None)

    assert ask(POST, handler) == [[]]
    with pytest.raises(RetrieverError, match="refused the search: status 403"):
        ask(POST, handler)
    assert statuses == []


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"organic": 1}', b'{"organic": ["a"]}', b'{"organic": [{}]}'])
def test_an_answer_that_is_not_as_described_is_an_error(content):
    with pytest.raises(RetrieverError, match="does not answer as its JsonApi says"):
        ask(POST, lambda request: httpx.Response(200, content=content))


def test_a_key_that_is_missing_or_broken_is_named_by_its_variable(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "a\nb")
    with pytest.raises(RetrieverError, match="the key in TEST_KEY must be printable"):
        JsonWebSearch(GET)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(RetrieverError, match="put yours into the environment variable TEST_KEY"):
        JsonWebSearch(GET)


def test_ones_own_search_needs_one_function():
    class Mine(WebSearch):
        async def search_one(self, query, k):
            return [Hit(f"{query}-{i}", "c", 1.0) for i in range(5)]

    assert [[hit.id for hit in row] for row in asyncio.run(Mine().search(["a", "b"], 2))] == [
        ["a-0", "a-1"],
        ["b-0", "b-1"],
    ]
