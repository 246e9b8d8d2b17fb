"""What the tests run in a process of its own: Java shall not share one with torch, nor be there when others fork."""

import asyncio
import sys

from retrievers.backends import open_index
from retrievers.base import RetrieverError
from retrievers.lucene.retriever import LuceneRetriever

_opened = {}


def opened(index, **options):
    key = (index, tuple(options.items()))
    if key not in _opened:
        _opened[key] = LuceneRetriever(index, **options)
    return _opened[key]


def search_in_turn(index, calls, options=None):
    """The answers to calls of (queries, k), one after the other."""

    async def run():
        retriever = opened(index, **(options or {}))
        return [await retriever.search(queries, k) for queries, k in calls]

    return asyncio.run(run())


def search_at_once(index, calls, options=None):
    """The answers to calls of (queries, k), all of them waiting together."""

    async def run():
        retriever = opened(index, **(options or {}))
        return await asyncio.gather(*(retriever.search(queries, k) for queries, k in calls))

    return asyncio.run(run())


def ping(index):
    return asyncio.run(opened(index).ping())


def open_any(source, queries, k):
    """What `open_index` opens, what it finds, and how it describes itself."""

    async def run():
        retriever = open_index(source)
        return type(retriever).__name__, await retriever.search(queries, k), await retriever.ping()

    return asyncio.run(run())


def read(index, names):
    async def run():
        return [await opened(index).read(name) for name in names]

    return asyncio.run(run())


def read_stored(index, raw):
    """Read a document that is stored as `raw`."""
    retriever = LuceneRetriever(index)

    class Searcher:
        def doc(self, name):
            return {"raw": raw}

    retriever._searcher = Searcher()
    return asyncio.run(retriever.read("x"))


def open_and_close(index):
    """The messages of using a closed retriever; closes it twice."""
    retriever = LuceneRetriever(index)
    retriever.close()
    retriever.close()
    messages = []
    for call in (retriever.search(["x"], 1), retriever.ping()):
        try:
            asyncio.run(call)
        except RetrieverError as error:
            messages.append(str(error))
    return messages


def cancelled_then_asked(index):
    """Gives up on many searches, then asks one."""

    async def run():
        retriever = opened(index)
        tasks = [asyncio.create_task(retriever.search(["shared"], 2)) for _ in range(200)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await retriever.search(["shared"], 2)

    return asyncio.run(run())


def batch_calls(index, queries):
    """Break one query in Java; returns each query's hits or error."""

    async def run():
        retriever = LuceneRetriever(index)
        java = retriever._searcher

        class Breaking:
            def search(self, query, k):
                return java.search(query, -1 if query == "bad" else k)

            def batch_search(self, texts, names, k, threads):
                return java.batch_search(texts, names, -1, threads)

        retriever._searcher = Breaking()
        return await asyncio.gather(*(retriever.search([query], 2) for query in queries), return_exceptions=True)

    return asyncio.run(run())


def other_options(index):
    opened(index)
    return LuceneRetriever(index, heap="512m")


def imported(names):
    return [name for name in names if name in sys.modules]
