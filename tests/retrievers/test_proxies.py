"""Which servers are asked through the proxy that the environment names, and what is said when that fails."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from retrievers.base import RetrieverError
from retrievers.clients.proxies import proxy_for
from retrievers.clients.remote import HttpRetriever

pytestmark = pytest.mark.slow

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
# Nothing listens at the port of "discard".
GONE = "http://user:secret@127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    """Answers every search with one hit."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            body = b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": 1}]]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def ask(url):
    async def run():
        retriever = HttpRetriever(url, retries=0)
        try:
            return await retriever.search(["x"], 1)
        finally:
            await retriever.close()

    return asyncio.run(run())


@pytest.mark.parametrize("proxy", [GONE, "socks5://127.0.0.1:9", "nonsense://x"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "me.localhost"])
def test_a_server_on_this_machine_is_asked_directly(server, monkeypatch, proxy, host):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    assert proxy_for(f"http://{host}:{server}/retrieve") is None
    if host != "me.localhost":
        assert ask(f"http://{host}:{server}/retrieve")[0][0].id == "a"


def test_the_proxy_that_stood_between_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("http_proxy", GONE)
    with pytest.raises(
        RetrieverError, match=r"through the proxy http://127\.0\.0\.1:9, which the environment"
    ) as raised:
        ask("http://search.test/retrieve")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_a_message(monkeypatch, proxy):
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(RetrieverError, match=rf"proxy {proxy}, .* cannot be used .* put search.test into NO_PROXY"):
        HttpRetriever("http://search.test/retrieve")
    monkeypatch.setenv("no_proxy", "search.test")
    HttpRetriever("http://search.test/retrieve")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://10.1.2.3/", "http://a:1"),
        ("https://search.test/", "http://b:2"),
        ("https://127.8.9.1/", None),
        ("http://[::1]:80/", None),
        ("http://0.0.0.0:80/", None),
        ("https://inside.test/", None),
    ],
)
def test_the_environment_decides_by_scheme_and_exceptions(monkeypatch, url, proxy):
    monkeypatch.setenv("HTTP_PROXY", "a:1")
    monkeypatch.setenv("https_proxy", "http://b:2")
    monkeypatch.setenv("NO_PROXY", "inside.test")
    assert proxy_for(url) == proxy
