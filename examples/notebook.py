"""A tool with a state of its own in each episode: `agent.tools: [search, "notebook:Notebook"]`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agentrl.types import Question


class Notebook:
    name, description = "note", "Keep a value under a key, or read it where no value is given."
    parameters = {
        "type": "object",
        "properties": {k: {"type": "string"} for k in ("key", "value")},
        "required": ["key"],
    }

    @asynccontextmanager
    async def episode(self, question: Question) -> AsyncIterator["Notebook"]:
        page = Notebook()
        page.notes = {}
        yield page

    async def call(self, key: str, value: str | None = None) -> str:
        return self.notes.get(key, "nothing") if value is None else self.notes.setdefault(key, value)
