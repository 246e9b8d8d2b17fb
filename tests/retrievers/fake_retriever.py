import asyncio
import os
import signal

from retrievers.base import Hit, RetrieverError


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
                await asyncio.sleep(float(query.split()[1]))
            if query == "surrogate":
                return [[Hit("\udc80", "half \ud800 of a pair \x00\x1b", 1.0)]]
            if query == "nan":
                return [[Hit("a", "c", float("nan"))]]
            if query == "few":
                return []
            if query == "large":
                return [[Hit("a", "x" * (32 << 20), 1.0)]]
        return await super().search(queries, k)
