"""What every retriever is: queries in, ranked hits out; and what retrievers of all kinds share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

MAX_QUERY_CHARACTERS = 4000
"""What follows in a longer query is not searched; Lucene bounds a query's terms, and a character can be a term."""


ID_KEYS = ("id", "docid", "_id")
"""What corpora and servers call a passage's id; the first that is there counts."""


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


class CannotReadError(RetrieverError):
    """The retriever has no whole documents; asking again does not help."""


@runtime_checkable
class Reader(Protocol):
    """A retriever that knows whole documents."""

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document with this id, with score 0, or None if there is none.

        Raises:
            RetrieverError: if the document could not be read.
        """
        ...


async def read(retriever: Any, document_id: str) -> Hit | None:
    """Read a document through `retriever`.

    Raises:
        CannotReadError: if it cannot read whole documents.
        RetrieverError: if the document could not be read.
    """
    if not isinstance(retriever, Reader):
        raise CannotReadError(f"{type(retriever).__name__} cannot read whole documents; use another retriever")
    return await retriever.read(document_id)


class RetrieverWrapper:
    """As an asynchronous context manager it enters and leaves `inner` too."""

    def __init__(self, inner: Retriever) -> None:
        self.inner = inner

    async def __aenter__(self) -> Self:
        if isinstance(self.inner, AbstractAsyncContextManager):
            await self.inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `inner` first: its searches then fail, one that is stuck included, and what this stage waits for comes to an end.
        try:
            if isinstance(self.inner, AbstractAsyncContextManager):
                await self.inner.__aexit__(kind, error, trace)
        finally:
            await self.leave()

    async def leave(self) -> None:
        """Let go of what this stage itself holds; `inner` is left already."""
        raise NotImplementedError


def unwrap(retriever: Any) -> Any:
    """What all stages stand before. A stage has a `read` whether or not that has one."""
    while isinstance(retriever, RetrieverWrapper):
        retriever = retriever.inner
    return retriever


def titled(title: str, text: str) -> str:
    """A passage's contents from its parts: the title on one line in double quotes, a line break, then the text."""
    return f'"{" ".join(title.split())}"\n{text}'


def contents_id(contents: str) -> str:
    """An id for a passage that has none: equal passages have equal ids."""
    return "sha256-" + hashlib.sha256(clean_text(contents).encode()).hexdigest()[:16]


def clean_text(text: str) -> str:
    """Replace halves of surrogate pairs by U+FFFD: UTF-8 cannot carry them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clean_query(query: str) -> str:
    """Cut a query to MAX_QUERY_CHARACTERS and clean it; what reads a query may need much memory for each character."""
    return clean_text(query[:MAX_QUERY_CHARACTERS])
