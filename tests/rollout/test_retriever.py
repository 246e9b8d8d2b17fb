"""What the section `retriever` of a config makes: the right kind, once told everything it needs, under the right name."""

import asyncio
import json

import pytest

from agentrl.config import ConfigError, DataConfig, RetrieverConfig
from agentrl.rollout.retriever import make_retriever, retriever_identity
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
    with pytest.raises(ConfigError, match="the environment has no SEARCH_TOKEN"):
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
