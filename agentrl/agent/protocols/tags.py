"""Search tags: <search> and <answer>, with passages in <information>."""

from __future__ import annotations

from agentrl.agent.codec import Codec
from agentrl.agent.protocols.base import TextProtocol, one_line
from agentrl.config import AgentConfig
from agentrl.types import Action, ActionKind

_FORMS = {"search": "<search> query </search>", "open": "<open> id </open>", "answer": "<answer> answer </answer>"}


class SearchTags(TextProtocol):
    """Search-R1's tags (arXiv 2503.09516): think, search, information and answer, in our own words.

    A turn is one search or one answer, closed by its tag; free text or a think block may stand before it. Where
    `agent.tools` has `open`, passages show their ids and <open> reads a whole document.
    """

    frame_tag = "information"
    author = "the search engine writes"

    def __init__(self, config: AgentConfig | None = None, codec: Codec | None = None) -> None:
        tools = ["search"] if config is None else config.tools
        self.action_tags = (*tools, "answer")
        self.stop = tuple(f"</{name}>" for name in self.action_tags)
        self.forms = tuple(_FORMS[name] for name in self.action_tags)
        super().__init__(config, codec)

    def instruction(self) -> str:
        reading = "To read a whole document, write <open> its id </open>. " if "open" in self.action_tags else ""
        return (
            "Answer the question at the end. You can look things up in an encyclopedia. First reason briefly inside "
            "<think> and </think>. To look something up, write <search> what you want to find </search>; passages come "
            f"back between <information> and </information>. {reading}You may search several times. When you know the "
            "answer, write it, as short as possible and without explanation, as <answer> the answer </answer>.\n\n"
        )

    def _call(self, query: str) -> str:
        return f"<search> {query} </search>"

    def _read(self, name: str, body: str) -> Action:
        return Action(ActionKind(name), one_line(body, f"the {name}"))
