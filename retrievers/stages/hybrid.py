"""Fuses the rankings of several retrievers over one corpus."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from retrievers.base import Hit, Reader, Retriever, RetrieverError, check_search, read, unwrap


class HybridRetriever:
    """Reciprocal rank fusion (Cormack et al. 2009, doi:10.1145/1571941.1572114).

    A passage scores the sum of 1 / (constant + rank) over the retrievers that found it, ranks counted from 1. Ties are
    broken by id. Passages are the same if their ids are, so all retrievers must search one corpus.
    """

    def __init__(self, retrievers: Sequence[Retriever], *, depth: int = 100, constant: float = 60.0) -> None:
        """Remember the retrievers, which stay the caller's to close.

        Args:
            retrievers: two or more. Contents come from the first that found a passage, documents from the first that
                can read.
            depth: hits taken from each retriever, or k where that is more.
            constant: the larger, the less the first ranks count before the later ones; the paper's is 60.

        Raises:
            RetrieverError: if there are fewer than two retrievers, or an argument is invalid.
        """
        if len(retrievers) < 2:
            raise RetrieverError(f"{len(retrievers)} retrievers cannot be fused; give two or more")
        if depth < 1 or not constant >= 0:
            raise RetrieverError(f"depth {depth} must be at least 1 and constant {constant} not negative")
        self._retrievers, self._depth, self._constant = tuple(retrievers), depth, constant

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if an argument is invalid or one of the retrievers fails.
        """
        check_search(queries, k)
        depth = max(self._depth, k)
        rankings = await asyncio.gather(*(retriever.search(queries, depth) for retriever in self._retrievers))
        return [fuse([rows[query] for rows in rankings], self._constant)[:k] for query in range(len(queries))]

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if none of the retrievers can read documents, or the reading failed.
        """
        reader = next((r for r in self._retrievers if isinstance(unwrap(r), Reader)), self._retrievers[0])
        return await read(reader, document_id)

    async def ping(self) -> dict[str, object]:
        """Ask the retrievers that can be asked what they search.

        Raises:
            RetrieverError: if one does not answer, or two search different corpora.
        """
        able: list[Any] = [retriever for retriever in self._retrievers if hasattr(retriever, "ping")]
        about = await asyncio.gather(*(retriever.ping() for retriever in able))
        corpora = {str(part["corpus_sha256"]) for part in about if part.get("corpus_sha256")}
        if len(corpora) > 1:
            raise RetrieverError(
                f"the retrievers search {len(corpora)} different corpora, {', '.join(sorted(c[:12] for c in corpora))}…; "
                "fuse indexes of one corpus"
            )
        known = about[0] if about else {}
        shared = {name: known[name] for name in ("documents", "corpus", "corpus_sha256") if name in known}
        return {"backend": "hybrid", **shared, "depth": self._depth, "constant": self._constant, "parts": list(about)}

    def close(self) -> None:
        """Nothing to do: the retrievers are the caller's."""


def fuse(rankings: Sequence[Sequence[Hit]], constant: float = 60.0) -> list[Hit]:
    """Fuse rankings of one query, best first; a passage that a ranking names twice counts once there.

    Args:
        rankings: of any lengths, each best first.
        constant: see `HybridRetriever`.
    """
    shares: dict[str, list[float]] = {}
    contents: dict[str, str] = {}
    for ranking in rankings:
        ranks: dict[str, int] = {}
        for rank, hit in enumerate(ranking, 1):
            ranks.setdefault(hit.id, rank)
            contents.setdefault(hit.id, hit.contents)
        for name, rank in ranks.items():
            shares.setdefault(name, []).append(1.0 / (constant + rank))
    # An exact sum, which does not depend on the order of the retrievers, keeps equal scores equal.
    scores = {name: math.fsum(parts) for name, parts in shares.items()}
    return [Hit(name, contents[name], scores[name]) for name in sorted(scores, key=lambda name: (-scores[name], name))]
