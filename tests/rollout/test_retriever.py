"""What the section `retriever` of a config makes: the right kind, once told everything it needs, under the right name."""

import asyncio
import json
import sqlite3
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agentrl.config import ConfigError, DataConfig, RetrieverConfig
from agentrl.rollout.retriever import ActorRetriever, check_recording, make_retriever, retriever_identity
from retrievers.base import Hit, RetrieverError
from retrievers.clients.remote import HttpRetriever
from retrievers.stages.cache import CachedRetriever

made = []


class Own:
    """A retriever of the user's, which says what it was made with."""

    def __init__(self, text="found"):
        self.asked = 0
        self.text = text
        made.append(self)

    async def search(self, queries, k):
        self.asked += 1
        return [[Hit("d", f'"T"\n{self.text} {query}', 1.0)][:k] for query in queries]


OWN = {"kind": "object", "target": f"{__name__}:Own"}


def search(retriever, query="x"):
    async def ask():
        try:
            return (await retriever.search([query], 3))[0][0].text
        finally:
            if hasattr(retriever, "close"):
                await retriever.close()

    return asyncio.run(ask())


def test_an_object_is_made_of_its_options(tmp_path):
    data = DataConfig(root=str(tmp_path))
    settings = RetrieverConfig(**OWN, options={"text": "seen"})
    assert search(make_retriever(settings, data, "", [])) == "seen x"
    with pytest.raises(ConfigError, match=r"retriever\.target 'no:thing' cannot be imported"):
        make_retriever(RetrieverConfig(kind="object", target="no:thing"), data, "", [])


def test_a_server_is_asked_with_the_token_from_the_environment(tmp_path, monkeypatch):
    data = DataConfig(root=str(tmp_path))
    settings = RetrieverConfig(kind="http", url="http://127.0.0.1:9/retrieve", token_env="SEARCH_TOKEN")
    monkeypatch.delenv("SEARCH_TOKEN", raising=False)
    with pytest.raises(RetrieverError, match=r"retriever\.token_env: the environment has no SEARCH_TOKEN"):
        make_retriever(settings, data, "", [])
    monkeypatch.setenv("SEARCH_TOKEN", "secret")
    assert isinstance(make_retriever(settings, data, "", []), HttpRetriever)


def test_a_cache_answers_for_the_same_name_alone(tmp_path):
    data = DataConfig(root=str(tmp_path))
    settings = RetrieverConfig(**OWN, cache="kept")
    answers = [search(make_retriever(settings, data, name, [])) for name in ("one", "one", "two")]
    assert answers == ["found x"] * 3
    assert [own.asked for own in made[-3:]] == [1, 0, 1]
    assert isinstance(make_retriever(settings, data, "one", []), CachedRetriever)


def test_a_recording_stands_in_for_the_retriever_and_refuses_what_it_has_not_seen(tmp_path):
    data = DataConfig(root=str(tmp_path))
    assert search(make_retriever(RetrieverConfig(**OWN, record="seen"), data, "name", [])) == "found x"
    # No index is opened for it.
    replay = RetrieverConfig(index="missing", replay="seen")
    assert replay.indexes == []
    assert search(make_retriever(replay, data, "", [])) == "found x"
    with pytest.raises(RetrieverError, match="does not have the query 'y'"):
        search(make_retriever(replay, data, "", []), "y")


def write_index(folder, corpus_sha256="ab"):
    folder.mkdir()
    manifest = {
        "backend": "lucene",
        "corpus": "c.jsonl",
        "corpus_sha256": corpus_sha256,
        "documents": 1,
        "parameters": {"analyzer": "english"},
        "versions": {},
        "files": {},
        "built_at": "",
        "build_seconds": 1.0,
        "format_version": 2,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_model(folder, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)


def test_what_only_changes_the_speed_is_no_part_of_the_name(tmp_path):
    data = DataConfig(root=str(tmp_path))
    write_index(tmp_path / "index")
    write_model(tmp_path / "m", b"1")
    names = [
        retriever_identity(RetrieverConfig(index="index", options=options, **more), data)
        for options, more in (
            ({}, {}),
            ({"threads": 8, "heap": "2g"}, {"k": 5, "timeout_seconds": 1.0}),
            ({"k1": 1.2}, {}),
            ({}, {"fuse": [{"index": "index"}]}),
            ({}, {"rerank": {"model": str(tmp_path / "m")}}),
        )
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 4


def test_a_rerankers_weights_are_part_of_the_name_and_its_place_is_not(tmp_path):
    data = DataConfig(root=str(tmp_path))
    names = []
    for folder, weights in (("a", b"1"), ("b", b"1"), ("a", b"2")):
        write_model(tmp_path / folder, weights)
        names.append(retriever_identity(RetrieverConfig(**OWN, rerank={"model": str(tmp_path / folder)}), data))
    assert names[0] == names[1] != names[2]


def test_indexes_of_different_corpora_have_no_name_together(tmp_path):
    data = DataConfig(root=str(tmp_path))
    for name, digest in (("one", "ab"), ("same", "ab"), ("other", "cd")):
        write_index(tmp_path / name, digest)
    fused = [{"index": "same"}]
    assert retriever_identity(RetrieverConfig(index="one", fuse=fused), data)
    with pytest.raises(RetrieverError, match=r"index .*/one was built from .* and index .*/other from .*one corpus"):
        retriever_identity(RetrieverConfig(index="one", fuse=[*fused, {"index": "other"}]), data)


@contextmanager
def server_that_says(health):
    """A server whose answer to every GET is `health`, at a URL that is yielded with a way to change the answer."""
    says = {"health": health}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = says["health"]
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/retrieve", says
        finally:
            server.shutdown()


def test_hits_of_a_server_are_kept_under_the_name_of_what_it_searches(tmp_path):
    data = DataConfig(root=str(tmp_path))
    one, other = b"a" * 64, b"b" * 64
    with server_that_says(b'{"status": "ok", "corpus_sha256": "%s"}' % one) as (url, says):
        settings = RetrieverConfig(kind="http", url=url, cache="kept")
        names = [retriever_identity(settings, data)]
        for told in (
            b'{"corpus_sha256": "%s"}' % one,
            b'{"corpus_sha256": "%s"}' % other,
            b'{"search_sha256": "%s"}' % one,
        ):
            says["health"] = told
            names.append(retriever_identity(settings, data))
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize("told", [None, b"<html>", b"[]", b'{"corpus_sha256": "unknown"}', b'{"corpus_sha256": 7}'])
def test_a_server_that_does_not_say_what_it_searches_is_warned_of(tmp_path, caplog, told):
    with server_that_says(told) as (url, _):
        settings = RetrieverConfig(kind="http", url=f"{url}?hl=en", record="seen")
        assert json.loads(retriever_identity(settings, DataConfig(root=str(tmp_path))))["server"] == {}
    assert f"{url} does not say which corpus it searches" in caplog.text


def test_a_server_whose_hits_are_not_kept_is_not_asked(tmp_path):
    settings = RetrieverConfig(kind="http", url="http://127.0.0.1:9/retrieve", retries=0)
    assert "server" not in json.loads(retriever_identity(settings, DataConfig(root=str(tmp_path))))


def test_a_recording_is_refused_where_several_machines_would_write_it(monkeypatch):
    nodes = [{"Alive": True, "NodeManagerHostname": name} for name in ("left", "right")]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    with pytest.raises(ConfigError, match=r"retriever\.record: .* has 2 \(left, right\)"):
        check_recording(RetrieverConfig(**OWN, record="seen"))
    check_recording(RetrieverConfig(**OWN, cache="kept"))
    check_recording(RetrieverConfig(**OWN, replay="seen"))
    nodes[1]["Alive"] = False
    check_recording(RetrieverConfig(**OWN, record="seen"))


def test_no_file_of_a_cache_or_a_recording_holds_what_the_options_say(tmp_path):
    data = DataConfig(root=str(tmp_path))
    settings = RetrieverConfig(**OWN, options={"text": "sk-planted"}, cache="kept", record="seen")
    search(make_retriever(settings, data, retriever_identity(settings, data), []))
    for file in (tmp_path / "kept" / "hits.sqlite", tmp_path / "seen"):
        database = sqlite3.connect(file)
        (name,) = database.execute("SELECT name FROM identities").fetchone()
        database.close()
        assert len(name) == 64
        assert "planted" not in name


@pytest.fixture
def slow_actor(started_ray):
    """A Ray actor whose one thread answers one query after another, each when its turn is let through."""
    import ray

    class Slow:
        def __init__(self):
            from concurrent.futures import ThreadPoolExecutor

            from retrievers.batching import MicroBatches

            self.thread, self.answered, self.gate, self.cancelled = ThreadPoolExecutor(1), [], threading.Event(), 0
            self.batches = MicroBatches(self.thread.submit, self.answer, 1)

        def answer(self, queries):
            self.answered.extend(queries)
            self.gate.wait()
            return [[Hit("a", "c", 1.0)]]

        async def search(self, queries, k):
            try:
                return await self.batches.ask(queries)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        async def waiting(self):
            return self.batches.waiting

        async def given_up(self):
            return self.cancelled

        async def open(self):
            self.gate.set()
            await self.batches.ask(["last"])
            return self.answered

    actor = ray.remote(Slow).options(max_concurrency=100, num_cpus=0).remote()
    # A search that is cancelled before the actor runs never reaches it.
    ray.get(actor.waiting.remote())
    yield actor
    ray.kill(actor)


@pytest.mark.slow
def test_a_search_that_nobody_waits_for_any_more_is_not_done(slow_actor):
    async def run():
        settings = RetrieverConfig(index="x", timeout_seconds=0.2, retries=0)
        with pytest.raises(RetrieverError, match=r"1 attempts; the last one: no answer within 0\.2 s"):
            await ActorRetriever(slow_actor, settings).search(["first"], 1)
        # The thread is busy with the first one, which cannot be taken back.
        with pytest.raises(RetrieverError, match="no answer"):
            await ActorRetriever(slow_actor, settings).search(["timed out"], 1)
        patient = ActorRetriever(slow_actor, settings.model_copy(update={"timeout_seconds": 60.0}))
        given_up = asyncio.create_task(patient.search(["given up"], 1))
        while await slow_actor.waiting.remote() < 2:
            pass
        given_up.cancel()
        await asyncio.wait({given_up})
        assert given_up.cancelled()
        # Cancellations travel on their own: the actor may hear of the last one after it would have opened.
        async with asyncio.timeout(60):
            while await slow_actor.given_up.remote() < 3:
                pass
        return await slow_actor.open.remote()

    assert asyncio.run(run()) == ["first", "last"]


@pytest.mark.slow
def test_an_actor_that_breaks_is_a_retriever_error_and_not_tried_again(started_ray):
    import ray

    class Broken:
        def __init__(self):
            self.asked = 0

        async def search(self, queries, k):
            self.asked += 1
            raise ZeroDivisionError("oops")

        async def read(self, document_id):
            return self.asked

    actor = ray.remote(Broken).options(num_cpus=0).remote()
    retriever = ActorRetriever(actor, RetrieverConfig(index="x", retries=3))
    with pytest.raises(RetrieverError, match=r"the retriever broke: ZeroDivisionError\('oops'\)"):
        asyncio.run(retriever.search(["x"], 1))
    assert asyncio.run(ActorRetriever(actor, RetrieverConfig(index="x")).read("a")) == 1
