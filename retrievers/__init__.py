"""Retrieval for search agents: Lucene BM25 in its own process, an HTTP service and its client. Stands alone."""

from retrievers.base import Hit, Retriever, RetrieverError

__all__ = ["Hit", "Retriever", "RetrieverError"]
