"""The tools that every run can have: `search` and `open`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentrl.agent.tools.spec import Tool
from agentrl.config import ConfigError
from agentrl.types import OPEN, SEARCH
from retrievers.base import Hit, Reader, Retriever, unwrap


def _one_text(argument: str, description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {argument: {"type": "string", "description": description}},
        "required": [argument],
    }


class Search:
    """Finds passages."""

    name = SEARCH
    description = "Search an encyclopedia and get the best passages."
    parameters = _one_text("query", "What you want to find.")

    def __init__(self, retriever: Retriever, k: int) -> None:
        self._retriever, self._k = retriever, k

    async def call(self, query: str) -> Sequence[Hit]:
        """Return the `k` best passages. Raises RetrieverError if the retriever fails."""
        return (await self._retriever.search([query], self._k))[0]


class Open:
    """Reads a whole document."""

    name = OPEN
    description = "Read a whole document."
    parameters = _one_text("id", "The id of a document that a search has shown.")

    def __init__(self, retriever: Retriever, k: int) -> None:
        """Raises ConfigError if the retriever cannot read whole documents."""
        source = unwrap(retriever)
        if not isinstance(source, Reader):
            raise ConfigError(
                f"agent.tools: `open` needs a retriever that reads whole documents, and {type(source).__name__} "
                "has no `async def read(document_id)`; leave `open` out or use another retriever"
            )
        self._retriever: Any = retriever

    async def call(self, id: str) -> Sequence[Hit]:
        """Return the document alone, or nothing. Raises RetrieverError if the retriever fails."""
        document = await self._retriever.read(id)
        return [] if document is None else [document]


TOOLS: Mapping[str, Callable[..., Tool]] = {SEARCH: Search, OPEN: Open}
