"""Searches a Lucene index, as an asyncio object or a Ray actor: `ray.remote(LuceneRetriever)`.

The JVM's one thread takes queries in micro-batches, see `retrievers.batching`, and searches them in parallel.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from retrievers.base import MAX_QUERY_CHARACTERS, Hit, RetrieverError, clean_query, titled
from retrievers.index.manifest import Manifest
from retrievers.index.retriever import IndexRetriever
from retrievers.lucene import jvm
from retrievers.lucene.scoring import Scoring

MAX_BATCH = 256


class LuceneRetriever(IndexRetriever):
    """Searches an index of words; also see `Retriever`.

    Equal queries give equal hits, alone or among others: ties of score are broken by id. A query without any term that
    the analyser keeps, such as "" or "the !?", has no hits.
    """

    def __init__(
        self,
        index: str,
        k1: float = 0.9,
        b: float = 0.4,
        threads: int = 2,
        heap: str = "1g",
        *,
        scoring: str = "bm25",
        mu: float = 1000.0,
        rm3: bool = False,
        fb_terms: int = 10,
        fb_docs: int = 10,
        original_query_weight: float = 0.5,
    ) -> None:
        """Open the index.

        Args:
            index: the index folder.
            k1, b, scoring, mu, rm3, fb_terms, fb_docs, original_query_weight: see `Scoring`.
            threads: of Java. Retrievers of one process share one JVM and need equal `threads` and `heap`.
            heap: of Java, such as "1g".

        Raises:
            RetrieverError: if the folder is no sound index, an argument is invalid, or Java does not start.
        """
        self._scoring = Scoring(scoring, k1, b, mu, rm3, fb_terms, fb_docs, original_query_weight)
        super().__init__(index, "lucene", jvm.submit, MAX_BATCH)
        self._threads = threads
        jvm.start(jvm.JvmOptions(heap, threads))
        self._searcher: Any = jvm.submit(_open, index, self._scoring, self._manifest).result()

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if the retriever is closed or Java fails.
        """
        self._check_open()
        contents = await asyncio.wrap_future(jvm.submit(_read, self._searcher, clean_query(document_id)))
        return None if contents is None else Hit(document_id, contents, 0.0)

    def _search_worker(self, queries: list[str], k: int) -> list[list[Hit]]:
        try:
            return self._search_java(queries, k)
        except jvm.java_exception() as error:
            raise RetrieverError(f"search in {self._index} failed: {error}") from error

    def _count(self) -> int:
        return self._searcher.get_total_num_docs()

    def _description(self) -> dict[str, object]:
        return self._scoring.description()

    def _release(self) -> None:
        # The JVM keeps running.
        jvm.submit(self._searcher.close).result()

    def _search_java(self, queries: list[str], k: int) -> list[list[Hit]]:
        if len(queries) == 1:
            return [_hits(self._searcher.search(queries[0], k))]
        texts, names = jvm.autoclass("java.util.ArrayList")(), jvm.autoclass("java.util.ArrayList")()
        for position, query in enumerate(queries):
            texts.add(query)
            names.add(str(position))
        found = self._searcher.batch_search(texts, names, k, self._threads)
        return [_hits(found.get(str(position))) for position in range(len(queries))]


def _open(index: str, scoring: Scoring, manifest: Manifest) -> Any:
    """On the JVM's thread: a searcher of the index. Raises RetrieverError if it is damaged or not the manifest's."""
    failure = jvm.java_exception()
    try:
        searcher = jvm.autoclass("io.anserini.search.SimpleSearcher")(index)
        if scoring.name == "bm25":
            searcher.set_bm25(scoring.k1, scoring.b)
        else:
            searcher.set_qld(scoring.mu)
        if scoring.rm3:
            # The collection makes RM3 read the words of a hit from the stored corpus line, where the index has no
            # vectors of documents. The expanded query is the same, and the index smaller by a third.
            searcher.set_rm3("JsonCollection", scoring.fb_terms, scoring.fb_docs, scoring.original_query_weight)
        jvm.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2 * MAX_QUERY_CHARACTERS)
    except failure as error:
        raise RetrieverError(f"index {index} cannot be opened: {error}; build it again") from error
    documents = searcher.get_total_num_docs()
    if documents != manifest.documents:
        raise RetrieverError(
            f"index {index} has {documents} documents and its manifest says {manifest.documents}; build it again"
        )
    return searcher


def _read(searcher: Any, document_id: str) -> str | None:
    """On the JVM's thread: the contents of a document. Raises RetrieverError if Java fails."""
    try:
        found = searcher.doc(document_id)
    except jvm.java_exception() as error:
        raise RetrieverError(f"document {document_id!r} cannot be read: {error}") from error
    return None if found is None else _contents(document_id, found.get("raw"))


def _hits(documents: Any) -> list[Hit]:
    """On the JVM's thread: Java's ScoredDoc[] as hits."""
    return [_hit(found) for found in documents]


def _hit(found: Any) -> Hit:
    # Reading a field is a call into Java each time.
    name = found.docid
    return Hit(name, _contents(name, found.lucene_document.get("raw")), float(found.score))


def _contents(name: str, raw: str | None) -> str:
    """The contents in a document's stored corpus line. Raises RetrieverError if there is none, or of unknown form."""
    if raw is None:
        raise RetrieverError(f"the index does not store its documents, so {name!r} has no text; use one that does")
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise RetrieverError(f"document {name!r} is stored in an unknown form: {raw[:80]!r}") from error
    if "contents" in record:
        return record["contents"]
    # BEIR's form, which prebuilt indexes of its collections have.
    if "text" in record:
        return titled(record.get("title") or "", record["text"])
    raise RetrieverError(f"document {name!r} is stored in an unknown form, with {', '.join(record)}")
