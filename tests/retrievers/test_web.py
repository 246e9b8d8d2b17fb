"""Web search through adapters: the user's key, the provider's names, and hits."""

import asyncio
import json
import traceback

import httpx
import pytest

from retrievers.base import Hit, RetrieverError
from retrievers.clients import retrying
from retrievers.clients.web import JsonApi, JsonWebSearch, WebSearch

GET = JsonApi("https://search.test/v1", results="web.results", count="n", headers_env={"X-Key": "TEST_KEY"})
POST = JsonApi("https://search.test/", results="organic", method="POST", text="snippet", link="link", count=None)


@pytest.fixture(autouse=True)
def _key_and_no_pauses(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "mine")
    monkeypatch.setattr(retrying, "_PAUSE_SECONDS", 0.001)


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
        assert request.headers["x-key"] == "mine"
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
    with pytest.raises(RetrieverError, match="the description of a web search lacks results"):
        JsonWebSearch({"url": "https://search.test/"})
    with pytest.raises(RetrieverError, match="a web search has no setting 'parameter'; did you mean parameters"):
        JsonWebSearch(described | {"parameter": {"q": "secret"}})


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


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({"token_env": "TEST_KEY"}, lambda request: request.headers["authorization"] == "Bearer mine"),
        ({"headers_env": {"X-Key": "TEST_KEY"}}, lambda request: request.headers["x-key"] == "mine"),
        ({"parameters_env": {"api_key": "TEST_KEY"}}, lambda request: request.url.params["api_key"] == "mine"),
    ],
)
def test_a_key_from_the_environment_is_sent_where_the_service_wants_it_and_never_shown(keys, sent, caplog):
    caplog.set_level("DEBUG", "httpx")
    api = JsonApi("https://search.test/v1", results="results", **keys)

    statuses = [401, 500, 200]

    def handler(request):
        assert sent(request)
        return httpx.Response(statuses.pop(), text="no such key: mine")

    while statuses:
        with pytest.raises(RetrieverError, match=r"no such key: \[key\]") as raised:
            ask(api, handler, retries=0)
        assert "mine" not in str(raised.value)
    assert "GET https://search.test/v1" in caplog.text
    assert "mine" not in caplog.text


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("before", [0, 150, 450])
def test_a_key_is_not_shown_where_the_server_repeats_a_url_or_a_message_cuts_through_it(monkeypatch, status, before):
    monkeypatch.setenv("TEST_KEY", "sk+planted/+/0123456789+/+/0123456789")

    def handler(request):
        return httpx.Response(status, text="." * before + str(request.url))

    api = JsonApi("https://search.test/v1", results="results", parameters_env={"api_key": "TEST_KEY"})
    with pytest.raises(RetrieverError) as raised:
        ask(api, handler, retries=0)
    assert "planted" not in "".join(traceback.format_exception(raised.value))


def test_a_key_that_is_missing_or_broken_is_named_by_its_variable(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "a\nb")
    with pytest.raises(RetrieverError, match=r"headers_env.X-Key: the key in TEST_KEY must be printable"):
        JsonWebSearch(GET)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(RetrieverError, match=r"headers_env.X-Key: the environment has no TEST_KEY"):
        JsonWebSearch(GET)
    with pytest.raises(RetrieverError, match=r"headers_env must give each name its environment variable"):
        JsonWebSearch({"url": "https://search.test/", "results": "r", "headers_env": ["X-Key"]})
    with pytest.raises(RetrieverError, match="token_env must be the name of the environment variable"):
        JsonWebSearch({"url": "https://search.test/", "results": "r", "token_env": 7})
    with pytest.raises(RetrieverError, match="token_env must be the name of the environment variable") as raised:
        JsonWebSearch(JsonApi("https://search.test/", results="r", token_env="sk-123/456"))
    assert "sk-123" not in str(raised.value)


def test_ones_own_search_needs_one_function():
    class Mine(WebSearch):
        async def search_one(self, query, k):
            return [Hit(f"{query}-{i}", "c", 1.0) for i in range(5)]

    assert [[hit.id for hit in row] for row in asyncio.run(Mine().search(["a", "b"], 2))] == [
        ["a-0", "a-1"],
        ["b-0", "b-1"],
    ]
