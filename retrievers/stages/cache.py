"""Retrievers that remember: a cache on disk and in memory, and recordings by which a run is repeated without an index."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from retrievers.base import Hit, Retriever, RetrieverError, RetrieverWrapper, check_search, clean_text, read
from retrievers.stages.store import READ, HitStore, decode_hits, encode_hits

_Key = tuple[int, str]
_Row = tuple[Hit, ...]

_BLANKS = re.compile(r"[ \t\n\v\f\r]+")
# What an entry needs in memory beside its passages: the key and the objects around the strings, at a guess.
_OVERHEAD_BYTES = 500


def normalised(query: str) -> str:
    """The form of a query in which it is looked up and asked: NFC, with single spaces and none at the ends.

    Case stays: an analyser that keeps it, a dense model or a web search may answer "us" and "US" differently. Only
    ASCII's blanks are taken together, because tokenisers differ about Unicode's.
    """
    return _BLANKS.sub(" ", unicodedata.normalize("NFC", clean_text(query))).strip(" ")


class StoredRetriever(RetrieverWrapper):
    """Looks in memory, then in a store, and asks `inner` for the rest; each query that several want is asked once.

    `inner` gets the normalised query, so that what is stored does not depend on who asked first. When a caller gives up,
    its search goes on, and the hits are kept. A caller can share a search with another caller, whose other queries may make
    that search fail; the first caller then repeats the search with its own queries alone. Use it on one event loop only.

    Attributes:
        counts: queries and documents answered from "memory", from "disk", by "asking", and by "waiting" for the same
            one that was asked already.
    """

    def __init__(self, inner: Retriever, store: HitStore, memory_limit: int) -> None:
        super().__init__(inner)
        self._store = store
        self._memory = _Memory(memory_limit)
        self._asking: dict[_Key, asyncio.Task[Mapping[str, _Row]]] = {}
        # All that are under way, with the number of their queries.
        self._searches: dict[asyncio.Task[Mapping[str, _Row]], int] = {}
        self.counts = {"memory": 0, "disk": 0, "asking": 0, "waiting": 0}

    async def leave(self) -> None:
        """See `close`."""
        await self.close()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if `inner` failed, or the store cannot be used.
        """
        check_search(queries, k)
        return [list(row) for row in await self._rows(k, [normalised(query) for query in queries])]

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            CannotReadError: if `inner` has no whole documents.
            RetrieverError: if `inner` failed, or the store cannot be used.
        """
        row = (await self._rows(READ, [clean_text(document_id)]))[0]
        return row[0] if row else None

    async def check_search_works(self) -> None:
        """Raise RetrieverError unless `inner` can search now; nothing is looked up or stored."""
        await check_search_works(self.inner)

    async def close(self) -> None:
        """Wait for what is being asked, and close the store; `inner` stays open."""
        while self._searches:
            await asyncio.wait(self._searches)
        self._store.close()

    async def _rows(self, k: int, texts: list[str]) -> list[_Row]:
        rows: dict[str, _Row] = {}
        for text in texts:
            row = self._memory.get((k, text))
            if row is not None:
                rows[text] = row
        self.counts["memory"] += len(rows)
        if len(rows) < len(texts):
            wanted = [text for text in dict.fromkeys(texts) if text not in rows]
            if wanted:
                await self._add(rows, k, wanted)
        return [rows[text] for text in texts]

    async def _add(self, rows: dict[str, _Row], k: int, wanted: list[str]) -> None:
        """Put what memory does not have into `rows`."""
        shared: dict[asyncio.Task[Mapping[str, _Row]], list[str]] = defaultdict(list)
        for text in wanted:
            if (k, text) in self._asking:
                shared[self._asking[k, text]].append(text)
        # Where another caller's query is asked with ours, that may be what fails.
        mixed = {task for task, texts in shared.items() if len(texts) < self._searches[task]}
        unasked = [text for text in wanted if (k, text) not in self._asking]
        stored = self._store.get(k, unasked)
        for text, data in stored.items():
            rows[text] = self._remember(k, text, decode_hits(data), len(data))
        missing = [text for text in unasked if text not in stored]
        self.counts["disk"] += len(stored)
        self.counts["asking"] += len(missing)
        self.counts["waiting"] += len(wanted) - len(unasked)
        tasks = [*shared, *([self._start(k, missing)] if missing else [])]
        if not tasks:
            return
        # Does not cancel them with this caller.
        await asyncio.wait(tasks)
        again: list[str] = []
        for task in tasks:
            if task in mixed and task.exception() is not None:
                again.extend(shared[task])
            else:
                rows.update(task.result())
        if again:
            rows.update(await asyncio.shield(self._start(k, again)))

    def _start(self, k: int, texts: list[str]) -> asyncio.Task[Mapping[str, _Row]]:
        task = asyncio.create_task(self._ask(k, texts))
        self._searches[task] = len(texts)
        for text in texts:
            self._asking.setdefault((k, text), task)

        def forget(done: asyncio.Task[Mapping[str, _Row]]) -> None:
            del self._searches[done]
            for text in texts:
                if self._asking.get((k, text)) is done:
                    del self._asking[k, text]
            # Those who wait get the exception. Where nobody waits, asyncio would complain that nobody looked at it.
            if not done.cancelled():
                done.exception()

        task.add_done_callback(forget)
        return task

    async def _ask(self, k: int, texts: list[str]) -> Mapping[str, _Row]:
        if k == READ:
            found = await read(self.inner, texts[0])
            answers = [[] if found is None else [found]]
        else:
            answers = await self.inner.search(texts, k)
        entries = {text: encode_hits(hits) for text, hits in zip(texts, answers, strict=True)}
        # Where another process was faster, its answer holds, so that a recording says what everybody saw.
        entries |= await asyncio.to_thread(self._store.put, k, entries)
        return {text: self._remember(k, text, decode_hits(data), len(data)) for text, data in entries.items()}

    def _remember(self, k: int, text: str, hits: list[Hit], size: int) -> _Row:
        row = tuple(hits)
        self._memory.put((k, text), row, size + len(text) + _OVERHEAD_BYTES)
        return row


class CachedRetriever(StoredRetriever):
    """A cache of bounded size in a folder, which several processes and several indexes may share."""

    def __init__(
        self,
        inner: Retriever,
        folder: Path | str,
        identity: str,
        size_limit: int = 1 << 30,
        memory_limit: int = 64 << 20,
    ) -> None:
        """Open the cache, or make it.

        Args:
            inner: is asked for what is not there.
            folder: on a local disk.
            identity: what the answers depend on beside query and k: the index's hash, k1, b, the analyser, the model.
            size_limit: bytes on disk; what was stored longest ago leaves first.
            memory_limit: bytes in this process, about; what was used longest ago leaves first.

        Raises:
            RetrieverError: if the folder cannot be used.
        """
        super().__init__(inner, HitStore(Path(folder) / "hits.sqlite", identity, size_limit=size_limit), memory_limit)


class RecordingRetriever(StoredRetriever):
    """Records everything that `inner` finds, for `ReplayRetriever`; several processes may record into one file.

    A query that is in the file is answered from it, also after the index changed: what a recording run saw is what its
    replay gives.
    """

    def __init__(self, inner: Retriever, file: Path | str, identity: str, memory_limit: int = 64 << 20) -> None:
        """Open the recording, or make it; see `CachedRetriever`.

        Raises:
            RetrieverError: if the file cannot be used, or records another identity.
        """
        super().__init__(inner, HitStore(Path(file), identity, exclusive=True), memory_limit)


class ReplayRetriever(StoredRetriever):
    """Gives what was recorded, and refuses everything else."""

    def __init__(self, file: Path | str, identity: str | None = None, memory_limit: int = 64 << 20) -> None:
        """Open the recording. Without `identity`, where there is no index to have one, it may be of any.

        Raises:
            RetrieverError: if the file cannot be used, or records another identity.
        """
        store = HitStore(Path(file), identity, read_only=True, exclusive=True)
        super().__init__(_Unrecorded(Path(file)), store, memory_limit)

    async def check_search_works(self) -> None:
        """Raise RetrieverError unless the recording can be read."""
        self._store.get(1, ["health"])


async def check_search_works(retriever: Retriever) -> None:
    """Raise RetrieverError unless `retriever` can search now; what caches and recordings hold does not count."""
    if isinstance(retriever, StoredRetriever):
        await retriever.check_search_works()
    else:
        await retriever.search(["health"], 1)


class _Unrecorded:
    """Stands where a recording has nothing."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        raise self._unknown(f"the query {queries[0]!r} with k {k}")

    async def read(self, document_id: str) -> Hit | None:
        raise self._unknown(f"the document {document_id!r}")

    def _unknown(self, what: str) -> RetrieverError:
        return RetrieverError(f"{self._file} does not have {what}; replay the run that it records, or record again")


class _Memory:
    """Rows by key, those used longest ago thrown away when all together are larger than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._rows: OrderedDict[_Key, tuple[_Row, int]] = OrderedDict()

    def get(self, key: _Key) -> _Row | None:
        entry = self._rows.get(key)
        if entry is None:
            return None
        self._rows.move_to_end(key)
        return entry[0]

    def put(self, key: _Key, row: _Row, size: int) -> None:
        _, before = self._rows.pop(key, ((), 0))
        self._rows[key] = row, size
        self._size += size - before
        while self._size > self._limit:
            _, (_, gone) = self._rows.popitem(last=False)
            self._size -= gone
