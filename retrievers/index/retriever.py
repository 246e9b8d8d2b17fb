"""What retrievers of index folders share: one worker that answers micro-batches, and what is said of the index."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from retrievers.base import Hit, RetrieverError, check_search, clean_query
from retrievers.batching import MicroBatches
from retrievers.index.manifest import open_manifest


class IndexRetriever(ABC):
    """Searches an index folder on one worker thread, which queries reach in micro-batches; see `retrievers.batching`.

    A subclass says how the worker searches. Works as a Ray actor, for instance `ray.remote(LuceneRetriever)`.
    """

    def __init__(self, index: str, backend: str, submit: Callable[..., Future[Any]], largest_batch: int) -> None:
        """Open the manifest.

        Args:
            index: the index folder.
            backend: the kind of index that it must be.
            submit: runs a function with arguments on the worker, after all that were submitted before.
            largest_batch: queries that the worker takes at once.

        Raises:
            RetrieverError: if the folder is no sound index of that kind.
        """
        self._index, self._manifest, self._closed = index, open_manifest(Path(index), backend), False
        self._submit = submit
        self._batches: MicroBatches[tuple[str, int], list[Hit]] = MicroBatches(submit, self._answer, largest_batch)

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if the retriever is closed, an argument is invalid, or the search fails.
        """
        self._check_open()
        check_search(queries, k)
        return await self._batches.ask([(clean_query(query), k) for query in queries])

    @abstractmethod
    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if the retriever is closed or the reading fails.
        """

    async def ping(self) -> dict[str, object]:
        """Prove that the worker answers, and describe the index.

        Raises:
            RetrieverError: if the retriever is closed or the worker fails.
        """
        self._check_open()
        documents = await asyncio.wrap_future(self._submit(self._count))
        return {
            "index": self._index,
            "backend": self._manifest.backend,
            "documents": documents,
            "corpus": self._manifest.corpus,
            "corpus_sha256": self._manifest.corpus_sha256,
            **self._description(),
            "waiting": self._batches.waiting,
            "pid": self.pid(),
        }

    def pid(self) -> int:
        """The process that runs this retriever."""
        return os.getpid()

    def close(self) -> None:
        """Let go of the index once the queries before were answered. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    @abstractmethod
    def _search_worker(self, queries: list[str], k: int) -> list[list[Hit]]:
        """On the worker: the `k` best hits of each query. Raises RetrieverError if the search fails."""

    @abstractmethod
    def _count(self) -> int:
        """On the worker: the documents of the index."""

    @abstractmethod
    def _description(self) -> dict[str, object]:
        """How the index is searched, for `ping`."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the index, after all that the worker still has to do."""

    def _check_open(self) -> None:
        if self._closed:
            raise RetrieverError(f"the retriever of {self._index} is closed")

    def _answer(self, asks: list[tuple[str, int]]) -> list[list[Hit]]:
        """On the worker: the hits of queries, each with its own k. Raises RetrieverError if the search fails."""
        # The hits of an approximate search depend on how many are looked for, and must not on what others ask.
        positions_of: dict[int, list[int]] = defaultdict(list)
        for position, (_, k) in enumerate(asks):
            positions_of[k].append(position)
        answers: dict[int, list[Hit]] = {}
        for k, positions in positions_of.items():
            found = self._search_worker([asks[position][0] for position in positions], k)
            answers.update(zip(positions, found, strict=True))
        return [answers[position] for position in range(len(asks))]
