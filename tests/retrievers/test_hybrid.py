import asyncio
from fractions import Fraction

import pytest
from fake_retriever import FakeRetriever
from hypothesis import given
from hypothesis import strategies as st

from retrievers.base import CannotReadError, Hit, RetrieverError
from retrievers.stages.cache import CachedRetriever
from retrievers.stages.hybrid import HybridRetriever, fuse


class Listed:
    """Answers every query with the same ranking, and knows a corpus."""

    def __init__(self, names, corpus="c0ffee", contents="text"):
        self.names, self.corpus, self.contents, self.depths = names, corpus, contents, []

    async def search(self, queries, k):
        self.depths.append(k)
        return [[Hit(name, self.contents, 9.0 - rank) for rank, name in enumerate(self.names[:k])] for _ in queries]

    async def read(self, document_id):
        return Hit(document_id, self.contents, 0.0) if document_id in self.names else None

    async def ping(self):
        return {"documents": 3, "corpus": "c.jsonl", "corpus_sha256": self.corpus}


def search(retriever, queries=("q",), k=10):
    return asyncio.run(retriever.search(list(queries), k))


def test_scores_are_those_of_the_paper():
    found = search(HybridRetriever([Listed("abc"), Listed("bd")]))[0]
    assert [hit.id for hit in found] == ["b", "a", "d", "c"]
    assert [hit.score for hit in found] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


rankings = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=2, max_size=4)


def hits(names):
    return [Hit(name, f"text of {name}", -float(rank)) for rank, name in enumerate(names)]


@given(rankings, st.integers(0, 100))
def test_fusing_ranks_by_the_exact_sum_of_reciprocal_ranks_with_ties_by_id(ranked, constant):
    exact = {}
    for names in ranked:
        for rank, name in enumerate(names, 1):
            exact[name] = exact.get(name, 0) + Fraction(1, constant + rank)
    found = fuse([hits(names) for names in ranked], constant)
    assert {hit.id: hit.score for hit in found} == pytest.approx({name: float(score) for name, score in exact.items()})
    assert [(-hit.score, hit.id) for hit in found] == sorted((-hit.score, hit.id) for hit in found)


@given(rankings, st.randoms())
def test_the_order_of_the_retrievers_does_not_matter(ranked, random):
    shuffled = list(ranked)
    random.shuffle(shuffled)
    first, second = (fuse([hits(names) for names in order]) for order in (ranked, shuffled))
    assert first == second


@given(st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_fusing_a_ranking_with_itself_changes_no_order(names):
    assert [hit.id for hit in fuse([hits(names), hits(names)])] == names


def test_a_passage_named_twice_by_one_retriever_counts_once():
    (hit,) = fuse([hits("aa"), []])
    assert hit.score == pytest.approx(1 / 61)


def test_depth_bounds_what_is_asked_of_each_and_k_what_is_returned():
    first, second = Listed("abcdef"), Listed("fedcba")
    assert len(search(HybridRetriever([first, second], depth=2), k=2)[0]) == 2
    assert len(search(HybridRetriever([first, second], depth=2), k=3)[0]) == 3
    assert first.depths == second.depths == [2, 3]


def test_each_query_is_fused_with_its_own_rankings():
    found = search(HybridRetriever([FakeRetriever(), FakeRetriever()]), ["x", "y"], 1)
    assert [row[0].id for row in found] == ["x-0", "y-0"]


def test_a_retriever_that_fails_fails_the_search():
    broken = FakeRetriever()
    broken.error = "the index is gone"
    with pytest.raises(RetrieverError, match="the index is gone"):
        search(HybridRetriever([FakeRetriever(), broken]))


def test_documents_are_read_through_the_first_that_can():
    hybrid = HybridRetriever([FakeRetriever(), Listed("ab")])
    assert asyncio.run(hybrid.read("a")) == Hit("a", "text", 0.0)
    assert asyncio.run(hybrid.read("z")) is None
    with pytest.raises(CannotReadError):
        asyncio.run(HybridRetriever([FakeRetriever(), FakeRetriever()]).read("a"))


def test_a_cache_before_a_retriever_without_documents_is_not_asked_for_them(tmp_path):
    cached = CachedRetriever(FakeRetriever(), tmp_path, "a")
    assert asyncio.run(HybridRetriever([cached, Listed("ab")]).read("a")) == Hit("a", "text", 0.0)
    asyncio.run(cached.close())


def test_ping_tells_of_all_and_refuses_indexes_of_different_corpora():
    about = asyncio.run(HybridRetriever([Listed("a"), Listed("b"), FakeRetriever()]).ping())
    assert (about["backend"], about["documents"], about["corpus_sha256"], len(about["parts"])) == (
        "hybrid",
        3,
        "c0ffee",
        2,
    )
    with pytest.raises(RetrieverError, match="2 different corpora"):
        asyncio.run(HybridRetriever([Listed("a"), Listed("b", corpus="decaf")]).ping())


@pytest.mark.parametrize(
    ("retrievers", "options"),
    [([Listed("a")], {}), ([Listed("a")] * 2, {"depth": 0}), ([Listed("a")] * 2, {"constant": -1})],
)
def test_arguments_of_no_use_are_refused(retrievers, options):
    with pytest.raises(RetrieverError):
        HybridRetriever(retrievers, **options)
