"""Reading whole documents, which some retrievers can do beside searching."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from retrievers.base import Hit, RetrieverError


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
