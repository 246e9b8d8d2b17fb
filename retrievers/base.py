"""What every retriever is: queries in, ranked hits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class RetrieverError(Exception):
    """Retrieval could not be done; the message says what failed, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found. `contents` is `"Title"` in double quotes, a line break, then the text."""

    id: str
    contents: str
    score: float

    @property
    def title(self) -> str:
        head, separator, _ = self.contents.partition("\n")
        return head.strip().removeprefix('"').removesuffix('"') if separator else ""

    @property
    def text(self) -> str:
        head, separator, rest = self.contents.partition("\n")
        return rest if separator else head


def check_search(queries: Sequence[str], k: int) -> None:
    """Raise RetrieverError unless these are arguments of a search."""
    if isinstance(queries, str) or not all(isinstance(query, str) for query in queries):
        raise RetrieverError("queries must be a list of strings")
    if k < 1:
        raise RetrieverError(f"k is {k} and must be at least 1")


class Retriever(Protocol):
    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if the search could not be done; no partial answer is returned.
        """
        ...
