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
