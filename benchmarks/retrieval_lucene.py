"""Lucene's part of `retrieval.py`: agentrl, its cache, Search-R1's loop and Pyserini's batch search on one JVM.

Whoever calls `measure_lucene` keeps Java out of its own process, see `measuring.in_process`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import in_turns
from retrieval_work import K, Rows, Seconds, check_equal, without_warm_up

from retrievers.base import Hit, RetrieverError
from retrievers.lucene import jvm
from retrievers.lucene import retriever as lucene
from retrievers.lucene.retriever import LuceneRetriever
from retrievers.stages.cache import CachedRetriever

MEMORY_PASSES = 10
SLICE = 250
"""Queries of a call. Within a round the methods take turns after each, so that what else the machine does falls on all."""


class Rivals:
    """A searcher of Anserini's, used as others use it; the retrievers' JVM must run. Scored with k1 0.9 and b 0.4."""

    def __init__(self, index: str, threads: int) -> None:
        self._threads = threads
        self._searcher: Any = jvm.submit(self._open, index).result()

    def search_r1(self, queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Answer as the BM25 retriever of Search-R1's server does (search_r1/search/retrieval_server.py).

        A search for each query, one after the other; then each hit's document is looked up again by its id. Pyserini's
        class around the searcher is left out, which makes this faster than the original.
        """
        return jvm.submit(self._search_r1, queries).result()

    def batch(self, queries: Sequence[str]) -> Rows:
        """Answer with one call of Anserini's batch search, and read what a hit has."""
        return jvm.submit(self._batch, queries).result()

    def batch_of_scores(self, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
        """As `batch`, but read ids and scores only."""
        return jvm.submit(self._batch_of_scores, queries).result()

    def _open(self, index: str) -> Any:
        searcher = jvm.autoclass("io.anserini.search.SimpleSearcher")(index)
        searcher.set_bm25(0.9, 0.4)
        return searcher

    def _search_r1(self, queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        answers = []
        for query in queries:
            hits = self._searcher.search(query, K)
            scores = [hit.score for hit in hits]
            names = [hit.docid for hit in hits]
            texts = [json.loads(self._searcher.doc(name).get("raw"))["contents"] for name in names]
            documents = [
                # The original gives no ids; they cost nothing here and say whether the answers are equal.
                {
                    "id": name,
                    "title": text.split("\n")[0].strip('"'),
                    "text": "\n".join(text.split("\n")[1:]),
                    "contents": text,
                }
                for name, text in zip(names, texts, strict=True)
            ]
            answers.append(
                [{"document": document, "score": score} for document, score in zip(documents, scores, strict=True)]
            )
        return answers

    def _batch(self, queries: Sequence[str]) -> Rows:
        found = self._search_all(queries)
        return [
            [
                Hit(hit.docid, json.loads(hit.lucene_document.get("raw"))["contents"], float(hit.score))
                for hit in found.get(str(number))
            ]
            for number in range(len(queries))
        ]

    def _batch_of_scores(self, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
        found = self._search_all(queries)
        return [[(hit.docid, float(hit.score)) for hit in found.get(str(number))] for number in range(len(queries))]

    def _search_all(self, queries: Sequence[str]) -> Any:
        texts, names = jvm.autoclass("java.util.ArrayList")(), jvm.autoclass("java.util.ArrayList")()
        for number, query in enumerate(queries):
            texts.add(query)
            names.add(str(number))
        return self._searcher.batch_search(texts, names, K, self._threads)


def search_r1_hits(answers: Sequence[Sequence[dict[str, Any]]]) -> Rows:
    return [
        [Hit(item["document"]["id"], item["document"]["contents"], item["score"]) for item in answer]
        for answer in answers
    ]


class Unasked:
    """Stands behind a cache that must have everything."""

    async def search(self, queries: Sequence[str], k: int) -> Rows:
        raise RetrieverError(f"the cache does not have {queries[0]!r}")


def measure_lucene(index: str, rounds: Sequence[Sequence[str]], threads: int, folder: str) -> tuple[Seconds, Seconds]:
    """Return the seconds of each method in each round, and those of all processors; to be run by `in_process`.

    Args:
        index: a Lucene index.
        rounds: the queries of each; those of the first warm Java up and are not measured.
        threads: of Java.
        folder: for caches.

    Raises:
        RuntimeError: if two methods give different answers.
    """
    return asyncio.run(_measure_lucene(index, rounds, threads, Path(folder)))


async def _measure_lucene(
    index: str, rounds: Sequence[Sequence[str]], threads: int, folder: Path
) -> tuple[Seconds, Seconds]:
    retriever = LuceneRetriever(index, threads=threads)
    rivals = Rivals(index, threads)

    async def search_r1(queries: Sequence[str]) -> Any:
        return rivals.search_r1(queries)

    async def limit(queries: Sequence[str]) -> Any:
        return rivals.batch(queries)

    async def limit_of_scores(queries: Sequence[str]) -> Any:
        return rivals.batch_of_scores(queries)

    methods: dict[str, Callable[[Sequence[str]], Awaitable[Any]]] = {
        "agentrl": lambda queries: retriever.search(queries, K),
        "search_r1": search_r1,
        "pyserini": limit,
        "pyserini_scores": limit_of_scores,
    }
    seconds: Seconds = {name: [] for name in [*methods, "memory", "disk"]}
    processors: Seconds = {name: [] for name in methods}
    for number, queries in enumerate(rounds):
        answers: dict[str, list[Any]] = {name: [] for name in methods}
        spent, used = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0.0)
        for turn, start in enumerate(range(0, len(queries), SLICE), number):
            for name in in_turns(list(methods), turn):
                began, began_used = time.perf_counter(), time.process_time()
                answers[name] += await methods[name](queries[start : start + SLICE])
                spent[name] += time.perf_counter() - began
                used[name] += time.process_time() - began_used
        for name in methods:
            seconds[name].append(spent[name])
            processors[name].append(used[name])
        rows = answers["agentrl"]
        check_equal("Search-R1's loop", queries, search_r1_hits(answers["search_r1"]), rows)
        check_equal("Pyserini's batch search", queries, answers["pyserini"], rows)
        for name, value in (await _measure_cache(retriever, queries, rows, folder / str(number))).items():
            seconds[name].append(value)
        if number:
            rate = {name: len(queries) / values[-1] for name, values in seconds.items()}
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items())
            print(f"round {number} of {len(rounds) - 1}, queries/s: {shown}", flush=True)
    retriever.close()
    return without_warm_up(seconds), without_warm_up(processors)


def measure_batches(index: str, rounds: Sequence[Sequence[str]], threads: int, sizes: Sequence[int]) -> Seconds:
    """Return the seconds of each round for each bound on the queries that Java gets at once; to be run by `in_process`.

    The queries of the first round warm up and are not measured.

    Raises:
        RuntimeError: if two bounds give different answers.
    """
    return asyncio.run(_measure_batches(index, rounds, threads, sizes))


async def _measure_batches(index: str, rounds: Sequence[Sequence[str]], threads: int, sizes: Sequence[int]) -> Seconds:
    retrievers = {}
    for size in sizes:
        # A retriever takes the bound when it is made. This process ends with the measurement.
        lucene.MAX_BATCH = size
        retrievers[str(size)] = LuceneRetriever(index, threads=threads)
    seconds: Seconds = {name: [] for name in retrievers}
    for number, queries in enumerate(rounds):
        answers: dict[str, Rows] = {name: [] for name in retrievers}
        spent = dict.fromkeys(retrievers, 0.0)
        for turn, start in enumerate(range(0, len(queries), SLICE), number):
            for name in in_turns(list(retrievers), turn):
                began = time.perf_counter()
                answers[name] += await retrievers[name].search(queries[start : start + SLICE], K)
                spent[name] += time.perf_counter() - began
        for name, rows in answers.items():
            seconds[name].append(spent[name])
            check_equal(f"batches of {name}", queries, rows, answers[str(sizes[0])])
    for retriever in retrievers.values():
        retriever.close()
    return without_warm_up(seconds)


async def _measure_cache(
    retriever: LuceneRetriever, queries: Sequence[str], expected: Rows, folder: Path
) -> dict[str, float]:
    filled = CachedRetriever(retriever, folder, "benchmark")
    await filled.search(queries, K)
    seconds = {}
    began = time.perf_counter()
    # One pass takes a few milliseconds, which is too short to be measured well.
    for _ in range(MEMORY_PASSES):
        rows = await filled.search(queries, K)
    seconds["memory"] = (time.perf_counter() - began) / MEMORY_PASSES
    check_equal("the cache in memory", queries, rows, expected)
    await filled.close()
    fresh = CachedRetriever(Unasked(), folder, "benchmark")
    began = time.perf_counter()
    rows = await fresh.search(queries, K)
    seconds["disk"] = time.perf_counter() - began
    check_equal("the cache on disk", queries, rows, expected)
    await fresh.close()
    shutil.rmtree(folder)
    return seconds
