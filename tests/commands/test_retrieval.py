"""What the commands for indexes make of their arguments, before anything is started."""

import sqlite3

import pytest
from rich.console import Console

from agentrl.commands.retrieval import parse_options, serve, sources
from retrievers.base import RetrieverError
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
    assert sources([one, same], {"k1": 1.2}) == [{"source": one, "k1": 1.2}, {"source": same}]
    with pytest.raises(RetrieverError, match=r"index .*/one was built from .* and index .*/other from .*one corpus"):
        sources([one, same, other], {})


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
