import asyncio

import pytest
from fake_retriever import FakeRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, save_cross_encoder, save_encoder

from retrievers.base import CannotReadError, Hit, RetrieverError
from retrievers.stages.rerank import CrossEncoder, RerankingRetriever

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_cross_encoder(tmp_path_factory.mktemp("models") / "cross")


@pytest.fixture(scope="module")
def model(folder):
    return CrossEncoder(folder, batch=4, device="cpu")


class Fixed:
    """Finds the same passages for every query."""

    def __init__(self, texts):
        self.hits = [Hit(f"d{rank}", text, 1.0 / (rank + 1)) for rank, text in enumerate(texts)]
        self.asked = []

    async def search(self, queries, k):
        self.asked.append(k)
        return [self.hits[:k] for _ in queries]

    async def read(self, document_id):
        return Hit(document_id, "whole", 0.0)


def own_scores(folder, query, texts):
    """What transformers says, one pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(**tokenizer(query, text, return_tensors="pt")).logits[0].tolist() for text in texts]


def search(retriever, queries, k):
    return asyncio.run(retriever.search(queries, k))


TEXTS = [f"{first} {second} river" for first in WORDS[:4] for second in WORDS[4:8]]


def test_hits_come_in_the_order_of_the_models_own_scores(model, folder):
    found = search(RerankingRetriever(Fixed(TEXTS), model), ["who boat"], 5)[0]
    expected = {text: scores[0] for text, scores in zip(TEXTS, own_scores(folder, "who boat", TEXTS), strict=True)}
    best = sorted(TEXTS, key=lambda text: -expected[text])[:5]
    assert [hit.contents for hit in found] == best
    assert [hit.score for hit in found] == pytest.approx([expected[text] for text in best], abs=1e-4)


def test_of_two_outputs_the_difference_counts_and_of_three_nothing(tmp_path):
    folder = save_cross_encoder(tmp_path / "two", outputs=2)
    scores = CrossEncoder(folder, device="cpu").score([("who", text) for text in TEXTS[:3]])
    assert scores == pytest.approx([yes - no for no, yes in own_scores(folder, "who", TEXTS[:3])], abs=1e-4)
    with pytest.raises(RetrieverError, match="3 outputs; it needs 1 or 2"):
        CrossEncoder(save_cross_encoder(tmp_path / "three", outputs=3), device="cpu")


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 12)), min_size=1, max_size=8))
def test_searches_at_once_equal_searches_one_by_one(model, calls):
    retriever = RerankingRetriever(Fixed(TEXTS), model, depth=6)

    async def run():
        return await asyncio.gather(*(retriever.search([query], k) for query, k in calls))

    for (query, k), rows in zip(calls, asyncio.run(run()), strict=True):
        alone = search(retriever, [query], k)[0]
        assert len(rows[0]) == k
        assert [hit.score for hit in rows[0]] == pytest.approx([hit.score for hit in alone], abs=1e-4)


class Lengths:
    """A model by which longer passages fit better."""

    sha256 = "00"

    def score(self, pairs):
        return [float(len(passage)) for _, passage in pairs]


def test_ties_keep_the_first_retrievers_order():
    retriever = RerankingRetriever(Fixed(["b", "aa", "a", "bb", "c"]), Lengths())
    assert [hit.id for hit in search(retriever, ["who"], 5)[0]] == ["d1", "d3", "d0", "d2", "d4"]
    assert asyncio.run(retriever.ping()) == {"reranker_sha256": "00", "rerank_depth": 50}
    retriever.close()
    retriever.close()


def test_depth_is_asked_of_the_first_retriever_and_k_is_returned(model):
    first = Fixed(TEXTS)
    retriever = RerankingRetriever(first, model, depth=4)
    assert [len(search(retriever, ["who"], k)[0]) for k in (2, 6)] == [2, 6]
    assert first.asked == [4, 6]


def test_pairs_longer_than_the_model_takes_are_cut(model):
    found = search(RerankingRetriever(Fixed(["sea " * 500, "boat"]), model), ["who " * 500, "", "\ud800"], 2)
    assert [len(hits) for hits in found] == [2, 2, 2]


def test_no_more_of_a_text_is_tokenised_than_may_count(model, monkeypatch):
    tokenizer, seen = model._tokenizer, []

    class Counting:
        pad = staticmethod(tokenizer.pad)

        def __call__(self, queries, passages, **options):
            seen.append((len(queries), max(map(len, queries)), max(map(len, passages))))
            return tokenizer(queries, passages, **options)

    monkeypatch.setattr(model, "_tokenizer", Counting())
    passages = ["sea " * 2_000, *TEXTS]
    scores = model.score([("who " * 2_000, passage) for passage in passages])
    assert len(seen) == 5
    assert max(seen) <= (4, 4000, 64 * 16)
    monkeypatch.undo()
    assert scores == pytest.approx(model.score([("who " * 900, passage[:900]) for passage in passages]), abs=1e-4)


class Connection(Fixed):
    """Must be entered before it is asked."""

    def __init__(self):
        super().__init__(["a", "bb"])
        self.events = []

    async def __aenter__(self):
        self.events.append("entered")
        return self

    async def __aexit__(self, kind, error, trace):
        self.events.append(kind)


def test_what_it_stands_before_is_entered_and_left_with_it():
    async def run(inner):
        async with RerankingRetriever(inner, Lengths()) as retriever:
            assert [hit.id for hit in (await retriever.search(["who"], 2))[0]] == ["d1", "d0"]
            raise KeyError

    connection = Connection()
    for inner in (connection, Fixed(["a", "bb"])):
        with pytest.raises(KeyError):
            asyncio.run(run(inner))
    assert connection.events == ["entered", KeyError]


def test_a_query_without_hits_has_none_after_reranking(model):
    assert search(RerankingRetriever(Fixed([]), model), ["who"], 3) == [[]]
    assert search(RerankingRetriever(Fixed(TEXTS), model), [], 3) == []


def test_what_the_first_retriever_refuses_is_refused(model):
    broken = FakeRetriever()
    broken.error = "the index is gone"
    with pytest.raises(RetrieverError, match="the index is gone"):
        search(RerankingRetriever(broken, model), ["x"], 1)
    with pytest.raises(CannotReadError):
        asyncio.run(RerankingRetriever(broken, model).read("x"))
    assert asyncio.run(RerankingRetriever(Fixed([]), model).read("x")) == Hit("x", "whole", 0.0)


def test_arguments_and_models_of_no_use_are_refused(model, folder, tmp_path):
    with pytest.raises(RetrieverError, match="depth is 0"):
        RerankingRetriever(Fixed(TEXTS), model, depth=0)
    with pytest.raises(RetrieverError, match="k is 0"):
        search(RerankingRetriever(Fixed(TEXTS), model), ["x"], 0)
    with pytest.raises(RetrieverError, match="max_tokens 2"):
        CrossEncoder(folder, max_tokens=2)
    with pytest.raises(RetrieverError, match="no such folder"):
        CrossEncoder("./nothing")
    # transformers would give a plain encoder a new, random head and rank by it.
    with pytest.raises(RetrieverError, match="no trained"):
        CrossEncoder(save_encoder(tmp_path / "plain"), device="cpu")
