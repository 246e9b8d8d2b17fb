"""BM25 over a Lucene index, as an asyncio object or a Ray actor: `ray.remote(LuceneRetriever)`.

BM25 is that of Robertson and Zaragoza (2009), doi:10.1561/1500000019, as Lucene computes it. Every call hands its
queries to a queue; the JVM's thread takes all that wait there, up to `MAX_BATCH`, and searches them in parallel. A lone
query is never kept waiting for company, and company shares one call into Java.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrievers import jvm
from retrievers.base import Hit, RetrieverError
from retrievers.index import Manifest, open_manifest

MAX_BATCH = 64
MAX_QUERY_CHARACTERS = 4000
"""What follows in a longer query is not searched; Lucene bounds a query's terms, and a character can be a term."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """A query that waits for its hits."""

    query: str
    k: int
    answer: Future[list[Hit]] = field(default_factory=Future)


class LuceneRetriever:
    """Searches an index that `retrievers.index.build_index` made; also see `Retriever`.

    Equal queries give equal hits, alone or among others: ties of score are broken by id. A query without any term that
    the analyser keeps, such as "" or "the !?", has no hits.
    """

    def __init__(self, index: str, k1: float = 0.9, b: float = 0.4, threads: int = 2, heap: str = "1g") -> None:
        """Open the index.

        Args:
            index: the index folder.
            k1: how soon a term's repetition stops counting; Anserini's default.
            b: how much long passages are discounted, 0 to 1; Anserini's default.
            threads: of Java. Retrievers of one process share one JVM and need equal `threads` and `heap`.
            heap: of Java, such as "1g".

        Raises:
            RetrieverError: if the folder is no sound index, or Java does not start.
        """
        if k1 < 0 or not 0 <= b <= 1:
            raise RetrieverError(f"k1 {k1} must not be negative and b {b} must lie between 0 and 1")
        self._manifest = open_manifest(Path(index))
        self._index, self._k1, self._b, self._threads = index, k1, b, threads
        self._waiting: deque[_Ask] = deque()
        self._closed = False
        jvm.start(jvm.JvmOptions(heap, threads))
        self._searcher: Any = jvm.submit(_open, index, k1, b, self._manifest).result()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if the retriever is closed, an argument is of no use, or Java fails.
        """
        if self._closed:
            raise RetrieverError(f"the retriever of {self._index} is closed")
        if isinstance(queries, str) or not all(isinstance(query, str) for query in queries):
            raise RetrieverError("queries must be a list of strings")
        if k < 1:
            raise RetrieverError(f"k is {k} and must be at least 1")
        asks = [_Ask(_clean(query), k) for query in queries]
        self._waiting.extend(asks)
        # One job for every MAX_BATCH queries that came in can never leave one waiting without a job to take it.
        for _ in range(0, len(asks), MAX_BATCH):
            jvm.submit(self._answer_waiting)
        return list(await asyncio.gather(*(asyncio.wrap_future(ask.answer) for ask in asks)))

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if the retriever is closed or Java fails.
        """
        if self._closed:
            raise RetrieverError(f"the retriever of {self._index} is closed")
        contents = await asyncio.wrap_future(jvm.submit(_read, self._searcher, _clean(document_id)))
        return None if contents is None else Hit(document_id, contents, 0.0)

    async def ping(self) -> dict[str, object]:
        """Prove that the JVM's thread answers, and describe the index.

        Raises:
            RetrieverError: if the retriever is closed or Java fails.
        """
        if self._closed:
            raise RetrieverError(f"the retriever of {self._index} is closed")
        documents = await asyncio.wrap_future(jvm.submit(_count, self._searcher))
        return {
            "index": self._index,
            "documents": documents,
            "corpus": self._manifest.corpus,
            "corpus_sha256": self._manifest.corpus_sha256,
            "k1": self._k1,
            "b": self._b,
            "waiting": len(self._waiting),
            "pid": self.pid(),
        }

    def pid(self) -> int:
        """The process that runs this retriever."""
        return os.getpid()

    def close(self) -> None:
        """Close the index once the queries before were answered. The JVM keeps running. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            jvm.submit(self._searcher.close).result()

    def _answer_waiting(self) -> None:
        """On the JVM's thread: answer up to MAX_BATCH of the waiting queries."""
        batch: list[_Ask] = []
        while self._waiting and len(batch) < MAX_BATCH:
            ask = self._waiting.popleft()
            if ask.answer.set_running_or_notify_cancel():
                batch.append(ask)
        by_k: dict[int, list[_Ask]] = defaultdict(list)
        for ask in batch:
            by_k[ask.k].append(ask)
        try:
            for k, asks in by_k.items():
                self._answer(asks, k)
        finally:
            # Whatever went wrong, nobody may wait for ever.
            for ask in batch:
                if not ask.answer.done():
                    ask.answer.set_exception(RetrieverError(f"search in {self._index} broke: {sys.exception()!r}"))

    def _answer(self, asks: list[_Ask], k: int) -> None:
        failure = jvm.java_exception()
        try:
            answers = self._search_java([ask.query for ask in asks], k)
        except failure as error:
            if len(asks) == 1:
                asks[0].answer.set_exception(RetrieverError(f"search in {self._index} failed: {error}"))
                return
            # One bad query fails the whole batch in Java; alone, it fails nobody else.
            for ask in asks:
                self._answer([ask], k)
            return
        for ask, hits in zip(asks, answers, strict=True):
            ask.answer.set_result(hits)

    def _search_java(self, queries: list[str], k: int) -> list[list[Hit]]:
        if len(queries) == 1:
            return [_hits(self._searcher.search(queries[0], k))]
        texts, names = jvm.autoclass("java.util.ArrayList")(), jvm.autoclass("java.util.ArrayList")()
        for position, query in enumerate(queries):
            texts.add(query)
            names.add(str(position))
        found = self._searcher.batch_search(texts, names, k, self._threads)
        return [_hits(found.get(str(position))) for position in range(len(queries))]


def _clean(query: str) -> str:
    """Cut a query to MAX_QUERY_CHARACTERS, and replace halves of surrogate pairs, which Java would not take."""
    return query[:MAX_QUERY_CHARACTERS].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open(index: str, k1: float, b: float, manifest: Manifest) -> Any:
    """On the JVM's thread: a searcher of the index. Raises RetrieverError if it is damaged or not the manifest's."""
    failure = jvm.java_exception()
    try:
        searcher = jvm.autoclass("io.anserini.search.SimpleSearcher")(index)
        searcher.set_bm25(k1, b)
        jvm.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2 * MAX_QUERY_CHARACTERS)
    except failure as error:
        raise RetrieverError(f"index {index} cannot be opened: {error}; build it again") from error
    documents = searcher.get_total_num_docs()
    if documents != manifest.documents:
        raise RetrieverError(
            f"index {index} has {documents} documents and its manifest says {manifest.documents}; build it again"
        )
    return searcher


def _count(searcher: Any) -> int:
    """On the JVM's thread: the documents of the index."""
    return searcher.get_total_num_docs()


def _read(searcher: Any, document_id: str) -> str | None:
    """On the JVM's thread: the contents of a document. Raises RetrieverError if Java fails."""
    try:
        found = searcher.doc(document_id)
    except jvm.java_exception() as error:
        raise RetrieverError(f"document {document_id!r} cannot be read: {error}") from error
    return None if found is None else json.loads(found.get("raw"))["contents"]


def _hits(documents: Any) -> list[Hit]:
    """On the JVM's thread: Java's ScoredDoc[] as hits; the raw document is the corpus line."""
    return [
        Hit(found.docid, json.loads(found.lucene_document.get("raw"))["contents"], float(found.score))
        for found in documents
    ]
