"""Tools: what the model can call. Each has one text argument, and answers with hits that the protocol writes down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.config import ConfigError
from agentrl.types import ActionKind, SearchCall
from retrievers.base import Hit, Reader, Retriever, unwrap


@dataclass(frozen=True, slots=True)
class Tool:
    """How a tool is shown to the model. `kind` is the action that calls it; `argument` the name of its one parameter."""

    kind: ActionKind
    argument: str
    description: str
    argument_description: str

    @property
    def name(self) -> str:
        return self.kind.value

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the JSON form that chat templates take."""
        parameters = {
            "type": "object",
            "properties": {self.argument: {"type": "string", "description": self.argument_description}},
            "required": [self.argument],
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


TOOLS: dict[str, Tool] = {
    "search": Tool(
        ActionKind.SEARCH, "query", "Search an encyclopedia and get the best passages.", "What you want to find."
    ),
    "open": Tool(ActionKind.OPEN, "id", "Read a whole document.", "The id of a document that a search has shown."),
}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a run, at work. `k` passages come back for a search.

    Raises:
        ConfigError: if `open` is among them and the retriever cannot read whole documents.
    """

    names: Sequence[str]
    retriever: Retriever
    k: int

    def __post_init__(self) -> None:
        source = unwrap(self.retriever)
        if "open" in self.names and not isinstance(source, Reader):
            raise ConfigError(
                f"agent.tools: `open` needs a retriever that reads whole documents, and {type(source).__name__} "
                "has no `async def read(document_id)`; leave `open` out or use another retriever"
            )

    async def call(self, kind: ActionKind, argument: str) -> tuple[Sequence[Hit], SearchCall | None]:
        """Call a tool; return what it found and, if it was a search, its record.

        Raises:
            RetrieverError: if the retriever failed.
        """
        if kind is ActionKind.OPEN:
            assert isinstance(self.retriever, Reader)
            document = await self.retriever.read(argument)
            return ([] if document is None else [document]), None
        now = asyncio.get_running_loop().time
        started = now()
        hits = (await self.retriever.search([argument], self.k))[0]
        return hits, SearchCall(
            query=argument,
            passage_ids=tuple(hit.id for hit in hits),
            scores=tuple(hit.score for hit in hits),
            seconds=now() - started,
        )
