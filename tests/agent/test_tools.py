"""Which retrievers a tool is offered with, whatever stands before them, and how a command line sets tools up."""

import asyncio

import pytest

from agentrl.agent.tools import Toolbox
from agentrl.config import ConfigError, ToolConfig, load_config
from retrievers.base import Hit
from retrievers.stages.cache import CachedRetriever, RecordingRetriever
from retrievers.stages.rerank import RerankingRetriever

BOTH = [ToolConfig(kind="search"), ToolConfig(kind="open")]


class Searching:
    async def search(self, queries, k):
        return [[] for _ in queries]


class Reading(Searching):
    async def read(self, document_id):
        return Hit(document_id, "whole", 0.0)


class Wrapping(Reading):
    """A user's own, which reads where what it searches cannot."""

    def __init__(self, inner):
        self._inner = inner


def wrapped(inner, folder):
    """The inner retriever behind each stage of this package, and behind all of them."""
    reranked = RerankingRetriever(inner, None)
    cached = CachedRetriever(inner, folder / "cache", "a")
    recording = RecordingRetriever(CachedRetriever(reranked, folder / "both", "a"), folder / "seen", "a")
    return [inner, reranked, cached, recording]


def test_open_needs_a_retriever_that_reads_whatever_stands_before_it(tmp_path):
    for retriever in wrapped(Searching(), tmp_path / "searching"):
        with pytest.raises(ConfigError, match=r"`open` needs .* and Searching has no `async def read"):
            Toolbox(BOTH, retriever, 3)
        Toolbox(BOTH[:1], retriever, 3)
    for inner in (Reading(), Wrapping(Searching())):
        for number, retriever in enumerate(wrapped(inner, tmp_path / type(inner).__name__)):
            Toolbox(BOTH, retriever, 3)
            assert asyncio.run(retriever.read(str(number))).contents == "whole"


def test_an_override_reaches_into_a_tool_that_stands_by_its_name():
    tools = load_config("pocket.yaml", ["agent.tools=[search, open]", "agent.tools.1.timeout_seconds=5"]).agent.tools
    assert [(tool.kind, tool.timeout_seconds) for tool in tools] == [("search", None), ("open", 5)]
