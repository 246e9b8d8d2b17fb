import asyncio
import json
from email.utils import formatdate

import httpx
import pytest
import virtual_clock
from fake_retriever import FakeRetriever, OddRetriever, ReadingRetriever

from retrievers.base import CannotReadError, Hit, RetrieverError
from retrievers.clients import http, retrying
from retrievers.clients.remote import HttpRetriever
from retrievers.clients.wire import load_format
from retrievers.service.server import make_app

URL = "http://test/retrieve"
GOOD = {"result": [[{"document": {"id": "a", "contents": "c"}, "score": 2}]]}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retrying, "_PAUSE_SECONDS", 0.001)


def using(handler, use, **options):
    async def run():
        transport = handler if isinstance(handler, httpx.AsyncBaseTransport) else httpx.MockTransport(handler)
        retriever = HttpRetriever(URL, transport=transport, **options)
        try:
            return await use(retriever)
        finally:
            await retriever.close()

    return virtual_clock.run(run())


def ask(handler, queries=("x",), k=1, **options):
    return using(handler, lambda retriever: retriever.search(list(queries), k), **options)


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
        b'{"result": [[{"id": "a"}]]}',
        b'{"result": [[{"document": {"id": 7.5, "contents": "c"}, "score": 1}]]}',
        b'{"result": [[{"document": {"id": true, "contents": "c"}, "score": 1}]]}',
        b'{"result": [[{"document": {"id": "a", "title": "c"}, "score": 1}]]}',
        b'{"result": [[{"document": null, "contents": "c"}]]}',
        b'{"result": [{"document": {"id": "a", "contents": "c"}, "score": 1}]}',
        b'{"result": [[{"document": {"id": "a", "contents": null}, "score": 1}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": "1"}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": NaN}]]}',
        b'{"result": [[{"document": {"id": "a", "contents": "c"}, "score": 1' + b"0" * 400 + b"}]]}",
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


def test_search_r1s_bm25_server_gives_no_ids_and_equal_passages_get_equal_ones():
    document = {"title": "A", "text": "b", "contents": '"A"\nb'}
    row = [{"document": document, "score": 2.5}, {"document": document | {"contents": "other"}, "score": 1}]
    (one, other), (again, _) = ask(lambda _: httpx.Response(200, json={"result": [row, row]}), ["x", "y"], 2)
    assert one == again
    assert one.contents == '"A"\nb'
    assert one.id.startswith("sha256-")
    assert one.id != other.id


TAY = '"River Tay"\nThe Tay is a river.'


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"document": {"contents": TAY}}, (None, 1.0)),
        ({"document": {"id": None, "contents": TAY}, "score": None}, (None, 1.0)),
        ({"document": {"id": 3, "contents": TAY}, "score": 1.5}, ("3", 1.5)),
        ({"document": {"docid": "3", "contents": TAY}, "score": 1.5}, ("3", 1.5)),
        ({"document": {"id": "3", "title": "River Tay", "text": "The Tay is a river."}, "score": 1.5}, ("3", 1.5)),
        ({"id": "3", "contents": TAY}, ("3", 1.0)),
        ({"_id": 3, "title": "River Tay", "text": "The Tay is a river.", "score": 7}, ("3", 7.0)),
    ],
)
def test_a_server_that_nearly_speaks_the_format_is_understood(item, expected):
    (hit,) = ask(lambda _: httpx.Response(200, json={"result": [[item]]}))[0]
    assert hit.contents == TAY
    assert (None if hit.id.startswith("sha256-") else hit.id, hit.score) == expected


def test_hits_beyond_those_that_were_asked_for_are_left_out_and_ranks_score_where_scores_are_missing():
    row = [{"document": {"contents": f'"Page {i}"\nText {i}.'}} for i in range(7)]
    (hits,) = ask(lambda _: httpx.Response(200, json={"result": [row]}), k=3)
    assert [hit.title for hit in hits] == ["Page 0", "Page 1", "Page 2"]
    assert [hit.score for hit in hits] == [1.0, 1 / 2, 1 / 3]


def test_the_token_opens_the_server_and_its_refusal_is_not_tried_again():
    app = make_app(ReadingRetriever(), token="secret")
    assert ask(httpx.ASGITransport(app), token="secret")[0][0].id == "x-0"
    for token in (None, "wrong"):
        with pytest.raises(RetrieverError, match="refused the token: status 401"):
            ask(httpx.ASGITransport(app), token=token)
    with pytest.raises(RetrieverError, match="token must be printable"):
        HttpRetriever(URL, token="a\nb")


def test_documents_are_read_through_the_server():
    async def use(retriever):
        return await retriever.read("a/b c\x00"), await retriever.read("none"), await retriever.read("\ud800")

    document, nothing, broken = using(httpx.ASGITransport(make_app(ReadingRetriever())), use)
    assert document == Hit("a/b c\x00", '"a/b c\x00"\nwhole', 0.0)
    assert nothing is None
    assert broken.id == "\ufffd"


def test_a_server_without_documents_is_told_from_one_that_fails():
    with pytest.raises(CannotReadError, match="http://test/read offers no whole documents: status 404"):
        using(httpx.ASGITransport(make_app(FakeRetriever())), lambda retriever: retriever.read("a"))
    failing = ReadingRetriever()
    failing.error = "the disk is gone"
    with pytest.raises(RetrieverError, match="the disk is gone"):
        using(httpx.ASGITransport(make_app(failing)), lambda retriever: retriever.read("a"), retries=0)
    for payload in (b"[]", b"{}", b'{"document": 1}', b'{"document": {"id": "a"}}'):
        with pytest.raises(RetrieverError, match="does not speak"):
            using(lambda _, p=payload: httpx.Response(200, content=p), lambda retriever: retriever.read("a"))


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header", ["20", "date"])
def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(status, header, monkeypatch):
    monkeypatch.setattr(http.time, "time", lambda: 1_000_000.0)
    times = []

    def handler(request):
        times.append(asyncio.get_running_loop().time())
        value = "20" if header == "20" else formatdate(1_000_020, usegmt=True)
        return (
            httpx.Response(status, headers={"Retry-After": value})
            if len(times) == 1
            else httpx.Response(200, json=GOOD)
        )

    assert ask(handler)[0][0].id == "a"
    assert 20 <= times[1] - times[0] <= 24


def test_a_server_that_wants_an_hour_is_not_waited_for():
    with pytest.raises(RetrieverError, match="asks to come back in 3600 s: status 429"):
        ask(lambda _: httpx.Response(429, headers={"Retry-After": "3600"}))


@pytest.mark.parametrize("value", ["", "soon", "-5", "1e9", "Thu, 99 Foo 2020 00:00:00 GMT", "1" * 5000 + "x"])
def test_a_senseless_retry_after_is_as_good_as_none(value):
    answers = [httpx.Response(503, headers={"Retry-After": value}), httpx.Response(200, json=GOOD)]
    assert ask(lambda _: answers.pop(0))[0][0].id == "a"


def test_busy_servers_do_not_open_the_breaker():
    seen = []

    def handler(request):
        seen.append(request)
        return httpx.Response(429 if len(seen) <= 15 else 200, json=GOOD)

    async def use(retriever):
        began = asyncio.get_running_loop().time()
        rows = await asyncio.gather(*(retriever.search(["x"], 1) for _ in range(6)))
        # An open breaker would have made ten of them wait for half a second or more, one after the other.
        assert asyncio.get_running_loop().time() - began < 0.5
        return rows

    assert len(using(handler, use, retries=5)) == 6


def test_an_answer_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 1000)

    async def endless():
        while True:
            yield b" " * 100

    with pytest.raises(RetrieverError, match="more than 1000 bytes"):
        ask(lambda _: httpx.Response(200, content=endless()))


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "zstd", "unheard-of"])
def test_no_packed_answer_is_wanted_and_one_that_comes_is_refused_unread(encoding):
    async def unread():
        raise AssertionError("nothing may be read")
        yield

    def handler(request):
        assert request.headers["accept-encoding"] == "identity"
        return httpx.Response(200, headers={"Content-Encoding": encoding}, content=unread())

    with pytest.raises(RetrieverError, match=rf"packed its answer \({encoding}\)"):
        ask(handler, headers={"accept-encoding": "gzip"})
    plain = httpx.Response(200, headers={"Content-Encoding": "Identity"}, json=GOOD)
    assert ask(lambda _: plain)[0][0].id == "a"


def test_broken_text_in_an_answer_becomes_replacement_characters():
    content = b'{"result": [[{"document": {"id": "\\ud800", "contents": "\\udc00 \\u0000\\u001b"}, "score": 1}]]}'
    assert ask(lambda _: httpx.Response(200, content=content)) == [[Hit("\ufffd", "\ufffd \x00\x1b", 1.0)]]
    app = httpx.ASGITransport(make_app(OddRetriever()))
    assert ask(app, ["surrogate"]) == [[Hit("\ufffd", "half \ufffd of a pair \x00\x1b", 1.0)]]
    with pytest.raises(RetrieverError, match="does not speak"):
        ask(lambda _: httpx.Response(200, content=b'{"result": [["\xff'))


class OtherFormat:
    """A server of one query at a time that gives rows of (name, text)."""

    def request(self, queries, k):
        return {"q": list(queries), "n": k}

    def hits(self, payload, count, k):
        return [[Hit(name, text, 1.0 / (i + 1)) for i, (name, text) in enumerate(row)] for row in payload["rows"]]


not_a_format = object()


def test_another_servers_format_is_found_by_its_import_path():
    def handler(request):
        assert json.loads(request.content) == {"q": ["x"], "n": 2}
        return httpx.Response(200, json={"rows": [[["a", "one"], ["b", "two"]]]})

    wire = load_format("test_remote:OtherFormat")
    assert ask(handler, k=2, wire=wire) == [[Hit("a", "one", 1.0), Hit("b", "two", 0.5)]]


@pytest.mark.parametrize("payload", [{}, [], {"rows": 1}, {"rows": [["a"]]}, {"rows": []}])
def test_an_answer_that_ones_own_format_cannot_read_is_an_error_with_its_name(payload):
    with pytest.raises(RetrieverError, match="OtherFormat"):
        ask(lambda _: httpx.Response(200, json=payload), wire=OtherFormat())


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("test_remote", "not an import path"),
        ("no_such_module:Format", "cannot be imported"),
        ("test_remote:NoFormat", "cannot be imported"),
        ("test_remote:not_a_format", "has no request and no hits"),
    ],
)
def test_an_import_path_that_leads_to_no_format_says_why(path, reason):
    with pytest.raises(RetrieverError, match=reason):
        load_format(path)
