"""A search tool of a real MCP server, over both transports."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from retrievers.base import Hit, RetrieverError
from retrievers.clients.mcp import McpRetriever

# A server of this package takes seconds to start.
pytestmark = pytest.mark.slow

SERVER = str(Path(__file__).parent / "mcp_server.py")
STDIO = [sys.executable, SERVER]


@contextmanager
def http_server(port=0):
    if port == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    process = subprocess.Popen([*STDIO, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url():
    with http_server() as url:
        yield url


def using(server, use, **options):
    async def run():
        async with McpRetriever(server, **options) as retriever:
            return await use(retriever)

    return asyncio.run(run())


def search(server, queries, k=2, **options):
    return using(server, lambda retriever: retriever.search(queries, k), **options)


def test_texts_become_hits_over_both_transports(url):
    queries = ["x", "half \ud800", "\x00\x1b 東京"]
    rows = search(url, queries)
    assert rows == search(STDIO, queries)
    assert [[hit.score for hit in row] for row in rows] == [[1.0, 0.5]] * 3
    assert [row[0].title for row in rows] == ["x", "half \ufffd", "\x00\x1b 東京"]
    assert len({hit.id for row in rows for hit in row}) == 6


def test_the_tool_and_its_arguments_have_the_names_that_are_given(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "mine")
    rows = search(
        STDIO,
        ["x"],
        4,
        count_argument="count",
        arguments={"language": "de"},
        environment=["TEST_KEY"],
    )
    assert [hit.contents for hit in rows[0]] == [f'"x"\nde mine {i}' for i in range(4)]

    def read_hits(texts):
        return [Hit(item["id"], item["body"], 1.0) for item in map(json.loads, texts)]

    options = {"tool": "lookup", "query_argument": "question", "read_hits": read_hits}
    assert search(STDIO, ["x"], **options) == [[Hit("a", "x", 1.0)]]
    with pytest.raises(RetrieverError, match="answer of MCP tool 'search' cannot be read"):
        search(STDIO, ["x"], read_hits=read_hits)


def test_many_queries_share_a_connection_and_keep_their_order(url):
    rows = search(url, [f"q{i}" for i in range(40)], 1)
    assert [row[0].title for row in rows] == [f"q{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("query", "options", "reason"),
    [
        ("bad", {}, "MCP tool 'search' failed: .*search"),
        ("x", {"tool": "nothing"}, "MCP tool 'nothing' failed: Unknown tool"),
        ("x", {"query_argument": "no"}, "MCP tool 'search' failed"),
        ("slow", {"timeout_seconds": 3.0, "retries": 0}, "1 attempts; the last one: no answer within 3 s"),
    ],
)
def test_a_tool_that_fails_says_why(query, options, reason):
    with pytest.raises(RetrieverError, match=reason):
        search(STDIO, [query], **options)


def test_a_server_that_dies_is_started_again():
    async def use(retriever):
        with pytest.raises(RetrieverError, match="2 attempts; the last one: the connection broke"):
            await retriever.search(["die"], 1)
        return await retriever.search(["x"], 1)

    assert using(STDIO, use, retries=1)[0][0].title == "x"


def test_a_server_that_is_away_for_a_while_is_found_again():
    async def use(retriever, server, port):
        server.__exit__(None, None, None)
        with pytest.raises(RetrieverError, match="gave no answer in 2 attempts"):
            await retriever.search(["x"], 1)
        with http_server(port):
            return await retriever.search(["x"], 1)

    server = http_server()
    url = server.__enter__()
    port = int(url.rpartition(":")[2].partition("/")[0])
    assert using(url, lambda retriever: use(retriever, server, port), retries=1)[0][0].title == "x"


@pytest.mark.parametrize("server", ["http://127.0.0.1:9/mcp", ["/no/such/command"], [sys.executable, "-c", ""]])
def test_a_server_that_is_not_there_is_named(server):
    with pytest.raises(RetrieverError, match=r"MCP server .* cannot be used"):
        search(server, ["x"])


def test_a_caller_that_gives_up_while_the_server_starts_leaves_no_server():
    def servers():
        return [child for child in psutil.Process(os.getpid()).children() if "sleep(600)" in " ".join(child.cmdline())]

    async def run():
        retriever = McpRetriever([sys.executable, "-c", "import time; time.sleep(600)"])
        search = asyncio.create_task(retriever.search(["x"], 1))
        async with asyncio.timeout(60):
            while not servers():
                await asyncio.sleep(0.05)
        search.cancel()
        await asyncio.wait({search})
        assert search.cancelled()
        assert servers() == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(RetrieverError, match="pip install 'mcp>=2'"):
        McpRetriever(STDIO)
