"""What an index folder says about itself, and what is refused."""

import json
from dataclasses import asdict

import pytest

from retrievers.base import RetrieverError
from retrievers.index.manifest import Manifest, open_manifest

MANIFEST = Manifest(
    backend="lucene",
    corpus="c.jsonl",
    corpus_sha256="00",
    documents=2,
    parameters={"analyzer": "english"},
    versions={"lucene": "9.9.1"},
    files={"segments_1": 5},
    built_at="2026-01-01T00:00:00Z",
    build_seconds=1.0,
)


@pytest.fixture
def folder(tmp_path):
    """What looks like an index to a manifest's reader."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "segments_1").write_text("12345")
    (folder / "manifest.json").write_text(json.dumps(asdict(MANIFEST)))
    return folder


def change(folder, **values):
    record = asdict(MANIFEST) | values
    (folder / "manifest.json").write_text(
        json.dumps({key: value for key, value in record.items() if value is not None})
    )


def test_a_sound_manifest_is_read(folder):
    assert open_manifest(folder) == MANIFEST == open_manifest(folder, "lucene")


def test_a_manifest_of_version_1_is_read(folder):
    old = {"format_version": 1, "analyzer": "english", "pyserini": "1.6.0", "anserini": "1.7.1", "lucene": "9.9.1"}
    change(folder, parameters=None, versions=None, files=None, **old)
    manifest = open_manifest(folder)
    assert manifest.parameters == {"analyzer": "english"}
    assert manifest.versions == {"pyserini": "1.6.0", "anserini": "1.7.1", "lucene": "9.9.1"}
    assert manifest.documents == 2


def test_a_manifest_that_is_not_sound_is_refused_with_what_is_wrong(folder, tmp_path):
    with pytest.raises(RetrieverError, match=r"nothing is not a folder.*agentrl index build"):
        open_manifest(tmp_path / "nothing")
    change(folder, format_version=99)
    with pytest.raises(RetrieverError, match="format_version is 99 and must be 2"):
        open_manifest(folder)
    change(folder, documents="many")
    with pytest.raises(RetrieverError, match="'documents' is missing or not of type int"):
        open_manifest(folder)
    change(folder, corpus_sha256=None)
    with pytest.raises(RetrieverError, match="'corpus_sha256' is missing"):
        open_manifest(folder)
    change(folder, parameters=["a list"])
    with pytest.raises(RetrieverError, match="'parameters' is missing or not of type dict"):
        open_manifest(folder)
    change(folder)
    with pytest.raises(RetrieverError, match="backend is 'lucene' and must be 'dense'"):
        open_manifest(folder, "dense")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RetrieverError, match="damaged"):
        open_manifest(folder)
    change(folder)
    (folder / "segments_1").write_text("1234")
    with pytest.raises(RetrieverError, match=r"segments_1 has 4 bytes and .* says 5"):
        open_manifest(folder)
    (folder / "segments_1").unlink()
    with pytest.raises(RetrieverError, match="segments_1 is missing"):
        open_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(RetrieverError, match=r"has no manifest\.json"):
        open_manifest(folder)
