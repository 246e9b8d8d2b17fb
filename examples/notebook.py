"""A tool with a state of its own in each episode: `agent.tools: [search, "notebook:Notebook"]`."""

from contextlib import asynccontextmanager


class Notebook:
    name, description = "note", "Keep a value under a key, or read it where no value is given."
    parameters = {
        "type": "object",
        "properties": {k: {"type": "string"} for k in ("key", "value")},
        "required": ["key"],
    }

    def __init__(self) -> None:
        self.notes = {}

    @asynccontextmanager
    async def episode(self, question):
        yield Notebook()

    async def call(self, key: str, value: str | None = None) -> str:
        if value is not None:
            self.notes[key] = value
        return self.notes.get(key, "nothing")
