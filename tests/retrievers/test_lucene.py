import asyncio
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lucene_process
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from retrievers.backends import build_index
from retrievers.base import Hit, RetrieverError
from retrievers.lucene.scoring import Scoring

pytestmark = pytest.mark.slow

PASSAGES = {
    "ada": '"Ada Lovelace"\nShe wrote the first program, for the Analytical Engine.',
    "babbage": '"Charles Babbage"\nHe designed the Analytical Engine and the Difference Engine.',
    "odd": '"Quotes \\"and\\" more"\nUnicode 😀 東京 \u0000 tab\t end.\nAnother line about engines',
    "tie-b": "shared shared",
    "tie-a": "shared shared",
    "tie-c": "shared shared",
    "long": "shared " * 50,
}
WORDS = ["engine", "Analytical", "Ada", "shared", "東京", "the", "wrote program", "!?", ""]


@pytest.fixture(scope="module")
def java():
    """Runs a function of `lucene_process` in its process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lucene")
    lines = [json.dumps({"id": name, "contents": contents}) for name, contents in PASSAGES.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    build_index(folder / "corpus.jsonl", folder / "index")
    return str(folder / "index")


def search(java, index, queries, k=3):
    return java(lucene_process.search_in_turn, index, [(queries, k)])[0]


def test_the_best_passage_comes_first_with_its_contents_and_a_float_score(java, index):
    found = search(java, index, ["who wrote the first program?", "difference engine"])
    assert [hits[0].id for hits in found] == ["ada", "babbage"]
    for hits in found:
        assert all(isinstance(hit, Hit) and type(hit.score) is float and math.isfinite(hit.score) for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(hit.contents == PASSAGES[hit.id] for hit in hits)


def test_contents_come_back_letter_for_letter(java, index):
    (hit,) = search(java, index, ["東京 unicode"])[0]
    assert hit.contents == PASSAGES["odd"]


def test_ties_are_broken_by_id_and_k_bounds_the_hits(java, index):
    ties = [hit.id for hit in search(java, index, ["shared"], 10)[0] if hit.id.startswith("tie")]
    assert ties == ["tie-a", "tie-b", "tie-c"]
    assert len(search(java, index, ["shared"], 2)[0]) == 2


@pytest.mark.parametrize("query", ["", "  \n\t", "!?...", "the", "\x00\x01", "\ud800"])
def test_a_query_without_terms_has_no_hits(java, index, query):
    assert search(java, index, [query])[0] == []


@pytest.mark.parametrize(
    "query",
    [
        "engine \ud800",
        "engine\x00",
        "engine " + "x" * 200_000,
        "engine " * 50_000,
        "engine " + " ".join(f"w{i}" for i in range(20_000)),
        "engine " + "".join(chr(0x4E00 + i) for i in range(20_000)),
        'engine" AND (title:* OR +-~^[ ] {} /.*/',
    ],
)
def test_an_odd_query_is_searched_and_does_not_harm_its_neighbours(java, index, query):
    expected = search(java, index, ["engine"])[0]
    found = search(java, index, ["engine", query, "engine"])
    assert found[0] == found[2] == expected
    assert {hit.id for hit in found[1]} >= {hit.id for hit in expected[:2]}


@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=()), max_size=20), max_size=5),
            st.integers(1, 5),
        ),
        max_size=40,
    )
)
@pytest.mark.parametrize("options", [{}, {"scoring": "qld", "rm3": True}], ids=["bm25", "qld+rm3"])
def test_batched_search_equals_one_by_one(java, index, options, calls):
    alone = [(position, query, k) for position, (queries, k) in enumerate(calls) for query in queries]
    answers = java(lucene_process.search_in_turn, index, [([query], k) for _, query, k in alone], options)
    expected = [[] for _ in calls]
    for (position, _, _), answer in zip(alone, answers, strict=True):
        expected[position].append(answer[0])
    assert java(lucene_process.search_at_once, index, calls, options) == expected


def test_more_queries_than_a_batch_holds_are_all_answered(java, index):
    queries = WORDS * 60
    assert search(java, index, queries) == search(java, index, WORDS) * 60


def test_a_query_that_fails_in_java_fails_alone(java, index):
    ada, bad, shared = java(lucene_process.batch_calls, index, ["Ada", "bad", "shared"])
    assert ada[0][0].id == "ada"
    assert len(shared[0]) == 2
    assert isinstance(bad, RetrieverError)
    assert index in str(bad)


def test_searches_that_were_given_up_do_not_disturb_later_ones(java, index):
    assert java(lucene_process.cancelled_then_asked, index) == search(java, index, ["shared"], 2)


def test_k1_and_b_reach_lucene(java, index):
    def scores(**options):
        found = java(lucene_process.search_in_turn, index, [(["shared"], 4)], options)[0][0]
        return {hit.id: hit.score for hit in found}

    flat = scores(k1=0.0, b=0.0)
    assert max(flat.values()) - min(flat.values()) < 1e-4
    assert scores(b=0.0)["long"] > scores(b=1.0)["long"]


def test_rm3_finds_what_shares_words_with_the_first_hits_only(java, tmp_path):
    # RM3 takes no words that more than a tenth of all passages have.
    passages = PASSAGES | {f"other-{i}": f"nothing of it {i}" for i in range(40)}
    lines = [json.dumps({"id": name, "contents": contents}) for name, contents in passages.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    build_index(tmp_path / "corpus.jsonl", tmp_path / "index")

    def found(**options):
        hits = java(lucene_process.search_in_turn, str(tmp_path / "index"), [(["Ada"], 5)], options)[0][0]
        return [hit.id for hit in hits if hit.score > 0]

    assert found() == ["ada"]
    assert found(rm3=True) == ["ada", "babbage", "odd"]
    assert found(rm3=True, original_query_weight=1.0) == ["ada"]


@pytest.mark.parametrize("query", ["", "the !?", "東京", "\ud800"])
def test_rm3_takes_queries_without_terms_or_words_to_add(java, index, query):
    plain = java(lucene_process.search_in_turn, index, [([query], 3)])[0][0]
    expanded = java(lucene_process.search_in_turn, index, [([query], 3)], {"rm3": True})[0][0]
    assert [hit.id for hit in expanded] == [hit.id for hit in plain]


def test_mu_reaches_lucene(java, index):
    def scores(mu):
        options = {"scoring": "qld", "mu": mu}
        return [hit.score for hit in java(lucene_process.search_in_turn, index, [(["shared"], 4)], options)[0][0]]

    assert scores(10.0) != scores(1000.0)


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "tfidf"},
        {"k1": -1.0},
        {"k1": math.nan},
        {"b": 1.5},
        {"scoring": "qld", "mu": 0.0},
        {"rm3": True, "fb_terms": 0},
        {"rm3": True, "fb_docs": 51},
        {"rm3": True, "original_query_weight": 1.1},
    ],
    ids=str,
)
def test_a_scoring_of_no_use_is_refused(options):
    with pytest.raises(RetrieverError, match="must"):
        Scoring(**{"name" if name == "scoring" else name: value for name, value in options.items()})


def test_a_terminated_process_ends_at_once_and_python_hears_of_it(index):
    script = (
        "import signal, sys, time; from retrievers.lucene.retriever import LuceneRetriever\n"
        "began = time.monotonic(); LuceneRetriever(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(time.monotonic() - began, flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", script, index], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert float(child.stdout.readline()) < 20
        child.terminate()
        assert child.wait(10) == 7
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_whole_document_is_read_by_its_id_and_an_unknown_id_has_none(java, index):
    hits = java(lucene_process.read, index, ["odd", "babbage", "no such id", ""])
    assert [hit and (hit.id, hit.contents) for hit in hits] == [
        ("odd", PASSAGES["odd"]),
        ("babbage", PASSAGES["babbage"]),
        None,
        None,
    ]


def test_documents_of_prebuilt_indexes_are_read_in_the_forms_that_they_have(java, index):
    beir = '{"_id": "x", "title": "Ada", "text": "She wrote."}'
    assert java(lucene_process.read_stored, index, beir).contents == '"Ada"\nShe wrote.'
    for stored, reason in [(None, "does not store"), ("<html>", "unknown form"), ('{"abstract": 1}', "with abstract")]:
        with pytest.raises(RetrieverError, match=reason):
            java(lucene_process.read_stored, index, stored)


def test_ping_describes_the_index(java, index):
    answer = java(lucene_process.ping, index)
    assert answer["documents"] == len(PASSAGES)
    assert len(answer["corpus_sha256"]) == 64
    assert answer["pid"] != os.getpid()


def test_a_closed_retriever_says_so(java, index):
    messages = java(lucene_process.open_and_close, index)
    assert len(messages) == 2
    assert all("is closed" in message for message in messages)


@pytest.mark.parametrize(("queries", "k"), [("a string", 1), ([1], 1), (["x"], 0)])
def test_arguments_of_no_use_are_refused(java, index, queries, k):
    with pytest.raises(RetrieverError, match="must be"):
        search(java, index, queries, k)


def test_a_damaged_index_and_one_of_another_size_are_refused(java, index, tmp_path):
    damaged = Path(shutil.copytree(index, tmp_path / "damaged"))
    segments = next(damaged.glob("segments_*"))
    segments.write_bytes(b"x" * segments.stat().st_size)
    with pytest.raises(RetrieverError, match="cannot be opened"):
        search(java, str(damaged), ["x"])
    other = Path(shutil.copytree(index, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"documents": 99}))
    with pytest.raises(RetrieverError, match="7 documents and its manifest says 99"):
        search(java, str(other), ["x"])


def test_a_second_java_of_other_size_in_one_process_is_refused(java, index):
    with pytest.raises(RetrieverError, match="already"):
        java(lucene_process.other_options, index)


def test_searching_imports_neither_torch_nor_pyserini(java, index):
    search(java, index, ["x"])
    assert java(lucene_process.imported, ["torch", "pyserini", "transformers", "agentrl"]) == []


def test_titles_of_real_passages_find_their_passages(java, tmp_path):
    corpus = real_data("corpus/wiki-tiny.jsonl")
    build_index(corpus, tmp_path / "index")
    passages = [json.loads(line) for line in corpus.read_text().splitlines()[::15]]
    titles = [passage["contents"].partition("\n")[0] for passage in passages]
    found = search(java, str(tmp_path / "index"), titles, 10)
    right = sum(any(hit.id == passage["id"] for hit in hits) for passage, hits in zip(passages, found, strict=True))
    assert right >= 0.9 * len(passages)


def test_it_works_as_a_ray_actor_whose_death_is_seen(index):
    ray = pytest.importorskip("ray")
    from retrievers.lucene.retriever import LuceneRetriever

    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        actor = ray.remote(LuceneRetriever).options(num_cpus=1).remote(index)

        async def many():
            return await asyncio.gather(*(actor.search.remote([word], 2) for word in WORDS))

        answers = asyncio.run(many())
        assert [answer[0] for answer in answers] == ray.get(actor.search.remote(WORDS, 2))
        with pytest.raises(RetrieverError, match="k is 0"):
            ray.get(actor.search.remote(["x"], 0))
        os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
        with pytest.raises(ray.exceptions.ActorDiedError):
            ray.get(actor.ping.remote())
    finally:
        ray.shutdown()
