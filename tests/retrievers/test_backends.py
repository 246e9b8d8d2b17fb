import hashlib
import io
import json
import math
import multiprocessing
import tarfile
from concurrent.futures import ProcessPoolExecutor

import httpx
import lucene_process
import pytest
import ray

from retrievers.backends import (
    build_index,
    check_one_corpus,
    check_options,
    describe_index,
    has_encoder,
    identify_reranker,
    open_index,
    retriever_class,
)
from retrievers.base import RetrieverError
from retrievers.index.manifest import open_manifest, write_manifest
from retrievers.lucene.prebuilt import Prebuilt, find_prebuilt, prebuilt_index


@pytest.fixture
def folder(tmp_path):
    """What looks like a Lucene index until Java sees it."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "segments_1").write_text("12345")
    write(folder)
    return folder


def write(folder, backend="lucene", corpus_sha256="00ff"):
    write_manifest(
        folder,
        backend=backend,
        corpus="c.jsonl",
        corpus_sha256=corpus_sha256,
        documents=2,
        parameters={"analyzer": "english", "deep": {"er": 1}},
        versions={"lucene": "9.9.1"},
        build_seconds=1.0,
    )


def test_of_all_kinds_of_index_the_dense_one_alone_has_an_encoder(folder, tmp_path):
    (tmp_path / "dense").mkdir()
    write(tmp_path / "dense", backend="dense")
    assert [has_encoder(folder), has_encoder(tmp_path / "dense")] == [False, True]


def test_an_option_that_the_retriever_has_not_is_refused_with_those_it_has(folder):
    with pytest.raises(RetrieverError, match=r"LuceneRetriever has no option 'ef_search'; it has k1, b, "):
        open_index(str(folder), ef_search=3)


@pytest.mark.parametrize(
    ("backend", "options", "wanted"),
    [
        ("lucene", {"k1": "1e-1"}, "float"),
        ("lucene", {"b": True}, "float"),
        ("lucene", {"threads": "two"}, "int"),
        ("lucene", {"fb_docs": 2.5}, "int"),
        ("lucene", {"fb_docs": False}, "int"),
        ("lucene", {"heap": 1}, "str"),
        ("lucene", {"rm3": "off2"}, "bool"),
        ("dense", {"device": 1}, r"str \| None"),
    ],
)
def test_an_option_of_another_type_is_refused_by_its_name(folder, backend, options, wanted):
    write(folder, backend)
    ((name, value),) = options.items()
    with pytest.raises(RetrieverError, match=f"option '{name}' of .* is {value!r} and must be of type {wanted}"):
        open_index(str(folder), **options)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_refused(folder, value):
    with pytest.raises(RetrieverError, match=rf"option 'k1' of LuceneRetriever is {value} and must be a finite number"):
        check_options(folder, {"k1": value})


def test_a_build_with_an_option_that_its_kind_has_not_is_refused(tmp_path):
    with pytest.raises(RetrieverError, match="an index of kind lucene has no option 'head'; did you mean heap"):
        build_index(tmp_path / "corpus.jsonl", tmp_path / "out", head="1g")
    with pytest.raises(RetrieverError, match="an index of kind flat has no option 'heap'"):
        build_index(tmp_path / "corpus.jsonl", tmp_path / "out", "flat", heap="1g")
    with pytest.raises(RetrieverError, match="kind is 'annoy' and must be one of flat, fp16, hnsw, ivfpq"):
        build_index(tmp_path / "corpus.jsonl", tmp_path / "out", "annoy")


def test_options_of_the_right_types_are_taken(folder):
    check_options(folder, {"k1": 1, "b": 0.5, "threads": 1, "heap": "1g", "rm3": False})
    write(folder, "dense")
    check_options(folder, {"device": None, "model": "x", "ef_search": 3})


def test_options_are_checked_likewise_once_their_class_is_an_actors(folder):
    ray.remote(retriever_class(folder))
    check_options(folder, {"k1": 1, "heap": "1g"})
    with pytest.raises(RetrieverError, match="option 'threads' of LuceneRetriever is 'two' and must be of type int"):
        check_options(folder, {"threads": "two"})


def test_indexes_of_different_corpora_are_not_fused(folder, tmp_path):
    others = {name: tmp_path / name for name in ("same", "unknown", "other")}
    for path, digest in zip(others.values(), ("00ff", "", "ff00"), strict=True):
        path.mkdir()
        write(path, corpus_sha256=digest)
    check_one_corpus([])
    check_one_corpus([str(others["unknown"]), str(folder), str(others["same"])])
    with pytest.raises(RetrieverError, match=r"index .*/index was .*00ff.* and index .*/other from .*ff00.*one corpus"):
        check_one_corpus([str(folder), *map(str, others.values())])


def test_a_reranker_is_known_by_its_weights_and_not_by_its_place(tmp_path):
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (identify_reranker(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert identify_reranker(str(tmp_path / "a"), 7) != a
    with pytest.raises(RetrieverError, match="no such folder"):
        identify_reranker("./nothing")


def test_an_unknown_backend_and_a_folder_that_is_no_index_are_refused(folder, tmp_path):
    write(folder, backend="sparse")
    with pytest.raises(RetrieverError, match="backend is 'sparse' and must be one of lucene, dense"):
        open_index(str(folder))
    with pytest.raises(RetrieverError, match="not a folder"):
        open_index(str(tmp_path / "nothing"))


def test_an_index_is_described_with_dotted_names_and_its_size(folder):
    about = describe_index(folder)
    assert about["documents"] == 2
    assert (about["analyzer"], about["deep.er"], about["version of lucene"]) == ("english", 1, "9.9.1")
    assert about["size"].endswith(" MiB in 2 files")
    (folder / "segments_1").write_text("1")
    with pytest.raises(RetrieverError, match="has 1 bytes"):
        describe_index(folder)


def test_anserinis_prebuilt_indexes_are_known_by_name():
    cacm = find_prebuilt("cacm")
    assert (cacm.documents, len(cacm.md5), cacm.url[:8]) == (3204, 32, "https://")
    with pytest.raises(RetrieverError, match=r"no index 'msmarco-v1-pasage'.*msmarco-v1-passage"):
        find_prebuilt("msmarco-v1-pasage")


def archive_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def published(content, md5=None):
    digest = md5 or hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Prebuilt("toy", "https://example.org/toy.tar.gz", digest, len(content), 2)


def download(wanted, cache, content):
    asked = []

    def handler(request):
        asked.append(request.url)
        if isinstance(content, Exception):
            raise content
        return httpx.Response(200 if content else 404, content=iter([content]))

    reports = []
    folder = prebuilt_index(
        wanted, cache, on_progress=lambda *report: reports.append(report), transport=httpx.MockTransport(handler)
    )
    return folder, asked, reports


def test_a_prebuilt_index_is_downloaded_once_checked_and_given_a_manifest(tmp_path):
    content = archive_of({"lucene-toy/segments_1": b"12345", "lucene-toy/_0.cfs": b"x"})
    wanted = published(content)
    folder, asked, reports = download(wanted, tmp_path, content)
    assert len(asked) == 1
    assert reports[-1] == (len(content), len(content))
    manifest = open_manifest(folder, "lucene")
    assert (manifest.corpus, manifest.corpus_sha256, manifest.documents) == ("toy", "", 2)
    assert manifest.parameters["archive_md5"] == wanted.md5
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    assert download(wanted, tmp_path, httpx.ConnectError("offline"))[:2] == (folder, [])


@pytest.mark.parametrize(
    ("wanted", "content", "reason"),
    [
        (
            published(b"x"),
            httpx.ConnectError("no network"),
            "cannot be downloaded .*no network.*build an index of your own",
        ),
        (published(b"x"), b"", "cannot be downloaded .*404"),
        (published(b"x", md5="0" * 32), archive_of({"a/segments_1": b"1"}), "must have 00000"),
        (published(b"no archive"), b"no archive", "could not be written"),
        (published(archive_of({"a/readme": b"1"})), archive_of({"a/readme": b"1"}), "holds 0 Lucene indexes"),
    ],
    ids=["offline", "gone", "checksum", "no archive", "no index"],
)
def test_a_download_that_fails_is_an_error_and_leaves_nothing(tmp_path, wanted, content, reason):
    with pytest.raises(RetrieverError, match=reason):
        download(wanted, tmp_path, content)
    assert list((tmp_path / "indexes").iterdir()) == []


@pytest.mark.slow
def test_a_prebuilt_index_is_searched_like_any_other(tmp_path):
    lines = [{"id": "a", "contents": "apple pie"}, {"id": "b", "contents": "pear tree"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    build_index(tmp_path / "corpus.jsonl", tmp_path / "built")
    content = archive_of(
        {f"x/{path.name}": path.read_bytes() for path in (tmp_path / "built").iterdir() if path.suffix != ".json"}
    )
    folder, _, _ = download(published(content), tmp_path / "cache", content)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as java:
        name, rows, about = java.submit(lucene_process.open_any, str(folder), ["apple"], 2).result(timeout=60)
    assert (name, [hit.id for hit in rows[0]], rows[0][0].contents) == ("LuceneRetriever", ["a"], "apple pie")
    assert (about["corpus"], about["corpus_sha256"]) == ("toy", "")
