"""The service over real sockets: clients that mean harm, stock clients, many clients."""

import json
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import requests
from serving import served

from retrievers.base import RetrieverError
from retrievers.service.server import make_app, serve

pytestmark = pytest.mark.slow

ASK = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MIB = b" " * (1 << 20)


@pytest.fixture(scope="module")
def service():
    bounds = {"header_seconds": 0.5, "write_seconds": 0.5, "max_connections": 20}
    with served(app={"body_seconds": 0.5}, serve=bounds) as service:
        yield service


def answer_of(connection):
    """Everything that comes until the other side closes."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def ask_health(connection):
    """Send a whole request over a connection and read its whole answer."""
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 200")


def is_well(service):
    return httpx.get(service.base + "/health").json()["status"] == "ok"


def test_a_stock_search_r1_client_is_served(service):
    body = {"queries": ["ada", "bob"], "topk": 3, "return_scores": True}
    results = requests.post(service.url, json=body).json()["result"]
    assert [[item["document"]["contents"] for item in row] for row in results] == [
        [f'"{query}"\ntext {i}' for i in range(3)] for query in ("ada", "bob")
    ]


@pytest.mark.parametrize("sent", [b"", b"POST /retr", b"GET /health HTTP/1.1\r\nX: "])
def test_a_client_that_sends_its_headers_slowly_is_cut_off(service, sent):
    with service.connect() as connection:
        connection.sendall(sent)
        began = time.monotonic()
        connection.settimeout(0.1)
        with suppress(ConnectionError):
            while True:
                connection.sendall(b"a" if sent else b"")
                with suppress(TimeoutError):
                    if connection.recv(100) == b"":
                        break
        assert time.monotonic() - began > 0.4
    assert is_well(service)


def test_the_headers_of_a_later_request_on_a_connection_have_the_same_deadline(service):
    with service.connect(5) as connection:
        ask_health(connection)
        # A connection may be idle between two requests for longer than that.
        assert select.select([connection], [], [], 0.8)[0] == []
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
        began = time.monotonic()
        assert answer_of(connection).count(b"HTTP/1.1 200") == 1
        assert time.monotonic() - began > 0.4


def test_a_client_that_sends_its_body_slowly_is_told_and_cut_off(service):
    with service.connect() as connection:
        connection.sendall(ASK + b"Content-Length: 1000\r\n\r\n{")
        began = time.monotonic()
        answer = answer_of(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began > 0.4
    assert is_well(service)


def test_a_gigabyte_that_is_announced_is_refused_before_it_is_sent(service):
    with service.connect() as connection:
        connection.sendall(ASK + b"Content-Length: 1073741824\r\nExpect: 100-continue\r\n\r\n")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"] == "the request's body is larger than 1048576 bytes"


def test_a_gigabyte_that_comes_in_pieces_is_refused_after_the_first_of_them(service):
    sent = 0
    with service.connect() as connection:
        connection.sendall(ASK + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(1024):
                connection.sendall(b"100000\r\n" + MIB + b"\r\n")
                sent += 1
        except ConnectionError:
            pass
    # What the sockets' buffers hold comes on top of the one that is read.
    assert sent < 20
    assert is_well(service)


@pytest.mark.parametrize("length", [b"-1", b"9" * 5000, b"1e9", b"5, 6"])
def test_a_length_that_is_none_is_refused(service, length):
    with service.connect() as connection:
        connection.sendall(ASK + b"Content-Length: " + length + b"\r\n\r\n" + b'{"queries": "x"}')
        assert answer_of(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 422")
    assert is_well(service)


def test_headers_beyond_all_measure_are_refused(service):
    with service.connect() as connection:
        with suppress(ConnectionError):
            connection.sendall(ASK + b"X: " + MIB)
        assert answer_of(connection)[:12] in (b"HTTP/1.1 400", b"")
    assert is_well(service)


def test_a_client_that_does_not_take_its_answer_is_cut_off(service):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(service.address)
        body = b'{"queries": "large"}'
        connection.sendall(ASK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        # The client sees it only when it reads on, so the server's side is watched.
        port, server = connection.getsockname()[1], psutil.Process(service.process.pid)
        for accepted in (True, False):
            while any(other.raddr and other.raddr.port == port for other in server.net_connections()) != accepted:
                time.sleep(0.02)
        assert len(answer_of(connection)) < 32 << 20
    assert is_well(service)


def test_connections_beyond_the_bound_are_cut_off_and_places_come_free_again(service):
    held = [service.connect() for _ in range(20)]
    for connection in held:
        ask_health(connection)
    with service.connect() as beyond:
        assert answer_of(beyond) == b""
    for connection in held:
        connection.close()
    assert is_well(service)


def test_a_body_as_large_as_allowed_is_taken(service):
    start, end = b'{"queries": "x', b'"}'
    body = start + b"x" * ((1 << 20) - len(start) - len(end)) + end
    assert httpx.post(service.url, content=body).status_code == 200
    assert httpx.post(service.url, content=body + b" ").status_code == 413


def test_requests_are_logged_to_stderr_where_asked_for():
    with served(serve={"log_requests": True}) as service:
        assert httpx.post(service.url, json={"queries": ["x"], "topk": 2}).status_code == 200
        line = json.loads(service.process.stderr.readline())
    assert (line["path"], line["status"], line["queries"], line["k"]) == ("/retrieve", 200, 1, 2)


def test_a_port_that_is_taken_is_named(service):
    from fake_retriever import FakeRetriever

    with pytest.raises(RetrieverError, match=rf"cannot listen on 127\.0\.0\.1:{service.address[1]}"):
        serve(make_app(FakeRetriever()), port=service.address[1])


def test_a_retriever_that_does_not_start_ends_the_service_with_its_reason():
    refusing = served(options={"greeting": "refuse"}, child=True)
    with pytest.raises(AssertionError, match="there is no such index; build it"), refusing:
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_quietly_when_told_to_and_takes_its_child_along(number):
    with served(child=True) as service:
        with service.connect():
            (child,) = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
            service.process.send_signal(number)
            _, complaints = service.process.communicate(timeout=30)
        assert (service.process.returncode, complaints) == (0, "")
        assert not Path(f"/proc/{child}").exists()
