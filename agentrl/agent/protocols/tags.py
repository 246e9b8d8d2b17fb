"""Search tags: <search> and <answer>, with passages in <information>."""

from __future__ import annotations

from agentrl.agent.protocols.base import TextProtocol, call_of, one_line, read_json
from agentrl.agent.tools import TOOLS, ToolSpec
from agentrl.types import ANSWER, OPEN, SEARCH, Action


class SearchTags(TextProtocol):
    """Search-R1's tags (arXiv 2503.09516): think, search, information and answer, in our own words.

    A turn is one call or one answer, closed by its tag; free text or a think block may stand before it. Where
    `agent.tools` has `open`, passages show their ids and <open> reads a whole document. Every other tool has a tag of its
    name, with the one text that the tool takes in it, or its arguments as a JSON object.
    """

    frame_tag = "information"

    def _set_up(self) -> None:
        self.author = "the search engine writes" if self.tools.keys() <= TOOLS.keys() else "the tools write"
        self.stop = tuple(f"</{name}>" for name in self.action_tags)
        self.forms = (*(_form(tool) for tool in self.tools.values()), "<answer> answer </answer>")

    @property
    def action_tags(self) -> tuple[str, ...]:
        """The tags of actions: each tool's, and the answer's."""
        return (*self.tools, ANSWER)

    def instruction(self) -> str:
        others = [tool for name, tool in self.tools.items() if name not in TOOLS]
        parts = ["Answer the question at the end. "]
        if SEARCH in self.tools:
            parts.append("You can look things up in an encyclopedia. ")
        parts.append("First reason briefly inside <think> and </think>. ")
        if SEARCH in self.tools:
            parts.append(
                "To look something up, write <search> what you want to find </search>; passages come back between "
                "<information> and </information>. "
            )
        if OPEN in self.tools:
            parts.append("To read a whole document, write <open> its id </open>. ")
        parts += [f"To use {tool.name} ({_sentence(tool.description)}), write {_form(tool)}. " for tool in others]
        if others:
            parts.append("What they return comes back between <information> and </information>. ")
        parts.append(f"You may {'call the tools' if others else 'search'} several times. ")
        return (
            "".join(parts) + "When you know the answer, write it, as short as possible and without explanation, as "
            "<answer> the answer </answer>.\n\n"
        )

    def _call(self, query: str) -> str:
        return f"<search> {query} </search>"

    def _read(self, name: str, body: str) -> Action:
        if name == ANSWER:
            return Action(ANSWER, one_line(body, "the answer"))
        tool = self.tools[name]
        if tool.argument is None:
            return call_of(tool, read_json(body) if body.strip() else {})
        return call_of(tool, {tool.argument: body}, f"the {name}")


def _form(tool: ToolSpec) -> str:
    return f"<{tool.name}> {tool.form} </{tool.name}>"


def _sentence(description: str) -> str:
    return " ".join(description.split()).removesuffix(".")
