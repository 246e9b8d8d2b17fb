"""Keys in options: what is one, what is said of it, and what is shown of URLs."""

import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrievers.base import RetrieverError
from retrievers.secrets import check_no_literal_key, find_literal_key, public_url, redacting

KEY = "sk-planted-1234"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"token": KEY}, "token"),
        ({"headers": {"Authorization": KEY}}, "headers.Authorization"),
        ({"headers": {"X-Subscription-Token": KEY}}, "headers.X-Subscription-Token"),
        ({"headers": {"X-Api-Key": KEY}}, "headers.X-Api-Key"),
        ({"headers": {"Ocp-Apim-Subscription-Key": KEY}}, "headers.Ocp-Apim-Subscription-Key"),
        ({"api": {"parameters": {"api_key": KEY}}}, "api.parameters.api_key"),
        ({"api": {"parameters": {"key": KEY}}}, "api.parameters.key"),
        ({"environment": {"BRAVE_API_KEY": KEY}}, "environment.BRAVE_API_KEY"),
        ({"tavilyApiKey": KEY}, "tavilyApiKey"),
        ({"apikey": KEY}, "apikey"),
        ({"db": {"password": KEY}}, "db.password"),
        ({"header": f"Bearer {KEY}"}, "header"),
        ({"server": f"https://mcp.test/mcp?tavilyApiKey={KEY}"}, "server"),
        ({"server": f"https://me:{KEY}@mcp.test/mcp"}, "server"),
        ({"server": ["npx", "search", "--api-key", KEY]}, "server.2"),
        ({"server": ["npx", "search", f"--token={KEY}"]}, "server.2"),
        ({"server": ["env", f"BRAVE_API_KEY={KEY}", "npx"]}, "server.1"),
        ({"environment": [f"BRAVE_API_KEY={KEY}"]}, "environment.0"),
        ({"token_env": KEY}, "token_env"),
        ({"api": {"headers_env": {"X-Key": KEY}}}, "api.headers_env.X-Key"),
        ({"url": f"search.test/v1?api_key={KEY}"}, "url"),
        (f"http://x.test/?api_key={KEY}", ""),
    ],
)
def test_a_key_that_stands_in_options_is_refused_by_its_place_and_not_printed(options, where):
    assert find_literal_key(options) == where
    with pytest.raises(RetrieverError, match=r"`retriever\.options.*` holds a key.*headers_env") as raised:
        check_no_literal_key(options, "retriever.options")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_env": "SEARCH_TOKEN"},
        {"headers_env": {"Authorization": "SEARCH_TOKEN"}, "parameters_env": {"api_key": "SERPAPI_KEY"}},
        {"environment": ["BRAVE_API_KEY"]},
        {"max_tokens": 512, "tokenizer": "bert-base-uncased", "token": None, "password": ""},
        {"url": "https://search.test/v1?hl=en", "results": "web.results", "query": "q", "keyword": "x"},
        {"server": ["npx", "-y", "search-server", "--port", "8000"]},
        {"url": "http://[::1]:8000/retrieve"},
    ],
)
def test_names_of_variables_and_other_options_are_no_keys(options):
    assert find_literal_key(options) is None
    check_no_literal_key(options, "retriever.options")


def test_a_url_is_shown_without_what_may_be_a_key():
    assert public_url("https://me:pw@search.test:8/v1/x?api_key=1#a") == "https://search.test:8/v1/x"
    assert public_url("http://127.0.0.1:8000/retrieve") == "http://127.0.0.1:8000/retrieve"


WRITINGS = [
    str,
    quote,
    quote_plus,
    lambda key: quote(key, safe="").lower() if key == key.lower() else quote(key, safe=""),
    lambda key: json.dumps(key)[1:-1],
    lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    lambda key: json.dumps(key)[1:-1].replace("&", "\\u0026").replace("<", "\\u003c"),
]


@example(before="", key="key%", after="", write=quote)
@given(
    before=st.text(max_size=30),
    key=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=4, max_size=12),
    after=st.text(max_size=30),
    write=st.sampled_from(WRITINGS),
)
def test_no_message_shows_a_key_however_it_is_written(before, key, after, write):
    shown = str(redacting(["", "other-key", key])(f"{before}\x00{write(key)}\x00{after}"))
    assert shown.count("\x00") >= 2
    assert any(part in ("[key]", "\\[key]") for part in shown.split("\x00"))
