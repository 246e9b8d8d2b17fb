"""Search tags: <search> and <answer>, with passages in <information>."""

from __future__ import annotations

import re

from agentrl.agent.codec import Codec
from agentrl.agent.protocols.base import TextProtocol
from agentrl.config import AgentConfig
from agentrl.types import Action, ActionKind


class SearchTags(TextProtocol):
    """Search-R1's tags (arXiv 2503.09516): think, search, information and answer, in our own words.

    A turn is one search or one answer, closed by its tag; free text or a think block may stand before it. Where
    `agent.tools` has `open`, passages show their ids and <open> reads a whole document.
    """

    def __init__(self, config: AgentConfig | None = None, codec: Codec | None = None) -> None:
        tools = ["search"] if config is None else config.tools
        self._actions = (*tools, "answer")
        self.names = ("think", "information", *self._actions)
        self.stop = tuple(f"</{name}>" for name in self._actions)
        self._action = re.compile(rf"<({'|'.join(self._actions)})>(.*)</\1>\s*", re.DOTALL)
        super().__init__(config, codec)

    def instruction(self) -> str:
        reading = "To read a whole document, write <open> its id </open>. " if "open" in self._actions else ""
        return (
            "Answer the question at the end. You can look things up in an encyclopedia. First reason briefly inside "
            "<think> and </think>. To look something up, write <search> what you want to find </search>; passages come "
            f"back between <information> and </information>. {reading}You may search several times. When you know the "
            "answer, write it, as short as possible and without explanation, as <answer> the answer </answer>.\n\n"
        )

    def worked_examples(self, count: int) -> str:
        return "".join(_WORKED_EXAMPLES[:count])

    def parse(self, text: str) -> Action:
        tags = [(match.group(0), match.group(2).lower()) for match in self._tag.finditer(text)]
        if any(name == "information" for _, name in tags):
            return Action(ActionKind.INVALID, "only the search engine writes <information>")
        actions = [whole for whole, name in tags if name in self._actions]
        if not actions:
            wanted = " or ".join(f"<{name}>" for name in self._actions)
            return Action(ActionKind.INVALID, f"no {wanted} was closed")
        if len(actions) > 2:
            return Action(ActionKind.INVALID, "more than one action in a turn")
        match = self._action.fullmatch(text, pos=text.find(actions[0]))
        if match is None:
            return Action(ActionKind.INVALID, "the tags of the action do not match")
        argument = " ".join(match.group(2).split())
        if not argument:
            return Action(ActionKind.INVALID, f"the {match.group(1)} is empty")
        return Action(ActionKind(match.group(1)), argument)

    def correction(self, problem: str, ended: bool = False) -> str:
        wanted = {"search": "<search> query </search>", "open": "<open> id </open>"}
        choices = " or one ".join([*(wanted[name] for name in self._actions[:-1]), "<answer> answer </answer>"])
        return self._frame(f"Invalid action: {problem}. Write one {choices}.", ended)

    def _frame(self, body: str, ended: bool) -> str:
        return f"\n<information>\n{body}\n</information>\n"


_WORKED_EXAMPLES = (
    "Question: In which country is the city where the river Elbe meets the sea?\n"
    "<think> I need to know where the Elbe meets the sea. </think>\n"
    "<search> mouth of the river Elbe </search>\n"
    "<information>\nDoc 1(Title: Elbe) The Elbe flows into the North Sea at Cuxhaven.\n</information>\n"
    "<think> Now I need the country of Cuxhaven. </think>\n"
    "<search> Cuxhaven </search>\n"
    "<information>\nDoc 1(Title: Cuxhaven) Cuxhaven is a town in Lower Saxony, Germany.\n</information>\n"
    "<think> Cuxhaven is in Germany. </think>\n"
    "<answer> Germany </answer>\n\n",
    "Question: Who painted The Night Watch?\n"
    "<think> I should look this up. </think>\n"
    "<search> The Night Watch painting </search>\n"
    "<information>\nDoc 1(Title: The Night Watch) The Night Watch is a painting of 1642 by Rembrandt.\n</information>\n"
    "<think> The passage names the painter. </think>\n"
    "<answer> Rembrandt </answer>\n\n",
)
