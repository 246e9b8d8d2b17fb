"""Searching through a retriever that remembers."""

import asyncio

from fake_retriever import FakeRetriever


def using(retriever, use):
    async def run():
        try:
            return await use(retriever)
        finally:
            await retriever.close()

    return asyncio.run(run())


def search(retriever, queries, k=2):
    return using(retriever, lambda r: r.search(queries, k))


def found(queries, k=2):
    return asyncio.run(FakeRetriever().search(queries, k))
