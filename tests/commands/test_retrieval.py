"""What the commands for indexes make of their arguments, before anything is started."""

import io
import re
import sqlite3

import pytest
from rich.console import Console

from agentrl.commands.retrieval import parse_options, print_index, search, serve, stage_options
from retrievers.base import Hit, RetrieverError
from retrievers.index.manifest import write_manifest


def write_index(folder, corpus_sha256):
    folder.mkdir()
    write_manifest(
        folder,
        backend="lucene",
        corpus="c.jsonl",
        corpus_sha256=corpus_sha256,
        documents=1,
        parameters={"analyzer": "english"},
        versions={},
        build_seconds=1.0,
    )
    return str(folder)


def test_options_are_read_as_a_config_is():
    given = ["k1=1e-1", "b=0.5", "threads=2", "rm3=true", "heap=2g", "model="]
    expected = {"k1": 0.1, "b": 0.5, "threads": 2, "rm3": True, "heap": "2g", "model": None}
    assert parse_options(given) == expected
    assert type(parse_options(["k1=1e2"])["k1"]) is float


def test_indexes_of_different_corpora_are_refused_before_one_is_opened(tmp_path):
    one, same, other = (
        write_index(tmp_path / name, digest) for name, digest in (("one", "ab"), ("same", "ab"), ("other", "cd"))
    )
    assert stage_options([one, same], {"k1": 1.2}) == [(one, {"k1": 1.2}), (same, {})]
    with pytest.raises(RetrieverError, match=r"index .*/one was built from .* and index .*/other from .*one corpus"):
        stage_options([one, same, other], {})


def test_a_service_keeps_the_hits_of_a_reranker_under_the_name_of_its_weights(tmp_path, monkeypatch):
    index, model = write_index(tmp_path / "index", "ab"), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr("retrievers.service.process.ProcessRetriever", lambda target, plan: None)
    monkeypatch.setattr("retrievers.service.server.serve", lambda app, **options: None)
    for weights in (b"1", b"2", b"1"):
        (model / "model.safetensors").write_bytes(weights)
        serve(
            [index],
            {},
            Console(quiet=True),
            rerank=str(model),
            cache=tmp_path / "cache",
            host="127.0.0.1",
            port=0,
            k=3,
            token_env=None,
            log_requests=False,
        )
    database = sqlite3.connect(tmp_path / "cache" / "hits.sqlite")
    assert database.execute("SELECT count(*) FROM identities").fetchone() == (2,)
    database.close()


def test_an_index_is_described_without_cutting_anything_in_a_pipe_or_in_a_narrow_terminal(tmp_path):
    corpus_sha256 = "0123456789abcdef" * 4
    folder = write_index(tmp_path / ("long" * 40), corpus_sha256)
    piped = io.StringIO()
    print_index(folder, Console(file=piped, width=40))
    assert re.search(f"^corpus_sha256 +{corpus_sha256}$", piped.getvalue(), re.MULTILINE)
    assert folder in piped.getvalue()
    for width in (40, 80):
        shown = io.StringIO()
        print_index(folder, Console(file=shown, width=width, force_terminal=True, color_system=None))
        assert max(map(len, shown.getvalue().splitlines())) <= width
        told = re.sub(r"\x1b\[[0-9;]*m|\s+", "", shown.getvalue())
        assert f"corpus_sha256{corpus_sha256}" in told
        assert folder in told


@pytest.mark.parametrize("terminal", [True, False])
def test_hits_are_shortened_for_a_terminal_and_whole_in_a_pipe(tmp_path, monkeypatch, terminal):
    words = " ".join(f"word{i}" for i in range(200))

    class Opened:
        async def search(self, queries, k):
            return [[Hit("d1", f'"A [red]title"\n{words}', 1.5)], []]

        def close(self):
            pass

    monkeypatch.setattr("agentrl.commands.retrieval.open_stages", lambda indexes, rerank: Opened())
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=terminal, color_system=None)
    search([write_index(tmp_path / "index", "ab")], ["one", "two"], 1, {}, None, console)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert (lines[0], lines[1]) == ("one", "  1. A [red]title  1.5000  d1")
    assert lines[-2:] == ["two", "  nothing was found"]
    if terminal:
        assert max(map(len, lines)) <= 60
        assert " …" in lines[-3]
    else:
        assert lines[2] == f"  {words}"


def test_a_default_of_many_hits_raises_the_services_bound(tmp_path, monkeypatch):
    apps = []
    monkeypatch.setattr("retrievers.service.process.ProcessRetriever", lambda target, plan: None)
    monkeypatch.setattr("retrievers.service.server.serve", lambda app, **options: apps.append(app))
    options = {"rerank": None, "cache": None, "host": "127.0.0.1", "port": 0, "token_env": None, "log_requests": False}
    for k in (3, 500):
        serve([write_index(tmp_path / f"index-{k}", "ab")], {}, Console(quiet=True), k=k, **options)
    bounds = [app.openapi()["paths"]["/retrieve"]["post"] for app in apps]
    assert ["100" in str(bounds[0]), "500" in str(bounds[1])] == [True, True]
