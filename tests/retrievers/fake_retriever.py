import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

from retrievers.base import Hit, RetrieverError
from retrievers.batching import MicroBatches


class FakeRetriever:
    """Gives `k` made-up hits a query; fails where told to."""

    def __init__(self):
        self.calls = []
        self.error = None

    async def search(self, queries, k):
        self.calls.append((list(queries), k))
        if self.error is not None:
            raise RetrieverError(self.error)
        return [[Hit(f"{query}-{i}", f'"{query}"\ntext {i}', 1.0 / (i + 1)) for i in range(k)] for query in queries]


class ReadingRetriever(FakeRetriever):
    """Also reads every document but "none"."""

    async def read(self, document_id):
        self.calls.append(document_id)
        if self.error is not None:
            raise RetrieverError(self.error)
        return None if document_id == "none" else Hit(document_id, f'"{document_id}"\nwhole', 0.0)


class OddRetriever(ReadingRetriever):
    """Does what its query says, where that is one of a few words."""

    def __init__(self, greeting="hello"):
        super().__init__()
        if greeting == "refuse":
            raise RetrieverError("there is no such index; build it")
        if greeting == "crash":
            os._exit(5)
        if greeting == "hang":
            signal.pause()
        self.greeting = greeting
        self.sleeping = 0

    async def ping(self):
        return {"greeting": self.greeting, "pid": os.getpid()}

    async def search(self, queries, k):
        for query in queries:
            if query == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if query == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            if query == "break":
                raise ZeroDivisionError("oops")
            if query == "error":
                raise RetrieverError("no such thing")
            if query.startswith("sleep "):
                self.sleeping += 1
                try:
                    await asyncio.sleep(float(query.split()[1]))
                finally:
                    self.sleeping -= 1
            if query == "sleeping":
                return [[Hit(str(self.sleeping), "", 1.0)]]
            if query == "unspeakable":
                return [[Hit("a", "c", 1j)]]
            if query == "surrogate":
                return [[Hit("\udc80", "half \ud800 of a pair \x00\x1b", 1.0)]]
            if query == "nan":
                return [[Hit("a", "c", float("nan"))]]
            if query == "few":
                return []
            if query == "large":
                return [[Hit("a", "x" * (32 << 20), 1.0)]]
        return await super().search(queries, k)


class WorkerRetriever:
    """Searches and answers pings on one thread, which sleeps for as many seconds as a query says."""

    def __init__(self):
        self.thread, self.asked = ThreadPoolExecutor(1), []
        self.batches = MicroBatches(self.thread.submit, self.answer, 1)

    def answer(self, queries):
        self.asked.extend(queries)
        time.sleep(float(queries[0]))
        return [[Hit(",".join(self.asked), "", 1.0)]]

    async def ping(self):
        return await asyncio.wrap_future(self.thread.submit(dict))

    async def search(self, queries, k):
        return await self.batches.ask(queries)
