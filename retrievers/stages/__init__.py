"""Retrievers that stand before others: caches, recordings, fusion, reranking."""
