"""Tool calls in JSON inside <tool_call>, as Qwen and Hermes models are trained to write them."""

from __future__ import annotations

import json
import re
from typing import Any

from agentrl.agent.codec import Codec, Text
from agentrl.agent.protocols.base import TextProtocol
from agentrl.agent.tools import TOOLS
from agentrl.config import AgentConfig
from agentrl.types import Action, ActionKind

_SHAPE = '{"name": "…", "arguments": {…}}'


class JsonTools(TextProtocol):
    """Calls as `<tool_call>{"name": "search", "arguments": {"query": "…"}}</tool_call>`, results in <tool_response>.

    The form is that of NousResearch's Hermes-Function-Calling, which Qwen2.5 and Qwen3 share; the words are ours. A turn is
    one call or one <answer>, closed by its tag; free text or a think block may stand before it. Results follow in the
    model's own turn; `chat_tools` puts them into messages of their own.
    """

    names = ("think", "tools", "tool_call", "tool_response", "answer")
    stop: tuple[str, ...] = ("</tool_call>", "</answer>")

    _ACTION = re.compile(r"<(tool_call|answer)>(.*)</\1>\s*", re.DOTALL)

    def __init__(self, config: AgentConfig | None = None, codec: Codec | None = None) -> None:
        super().__init__(config, codec)
        self.tools = [TOOLS[name] for name in self.config.tools]

    def instruction(self) -> str:
        schemas = "\n".join(json.dumps(tool.schema) for tool in self.tools)
        call = _call(self.tools[0].name, {self.tools[0].argument: "…"})
        return (
            f"Answer the question at the end. These tools are at hand:\n<tools>\n{schemas}\n</tools>\n"
            f"First reason briefly inside <think> and </think>. To call a tool, write its name and arguments in JSON:\n{call}\n"
            "Its result comes back between <tool_response> and </tool_response>. You may call tools several times, one "
            "call in a turn. When you know the answer, write it, as short as possible and without explanation, as "
            "<answer> the answer </answer>.\n\n"
        )

    def worked_examples(self, count: int) -> str:
        return "".join(_WORKED_EXAMPLES[:count])

    def parse(self, text: str) -> Action:
        tags = [(match.group(0), match.group(2).lower()) for match in self._tag.finditer(text)]
        if any(name == "tool_response" for _, name in tags):
            return Action(ActionKind.INVALID, "only the tools write <tool_response>")
        actions = [whole for whole, name in tags if name in ("tool_call", "answer")]
        if not actions:
            return Action(ActionKind.INVALID, "no <tool_call> or <answer> was closed")
        if len(actions) > 2:
            return Action(ActionKind.INVALID, "more than one action in a turn")
        match = self._ACTION.fullmatch(text, pos=text.find(actions[0]))
        if match is None:
            return Action(ActionKind.INVALID, "the tags of the action do not match")
        if match.group(1) == "tool_call":
            return self._call(match.group(2))
        argument = " ".join(match.group(2).split())
        return Action(ActionKind.ANSWER, argument) if argument else Action(ActionKind.INVALID, "the answer is empty")

    def _call(self, body: str) -> Action:
        """Read a call. The problems name nothing that the model wrote, since they come back as the environment's words."""
        try:
            call = json.loads(body, object_pairs_hook=_object)
        # JSON that is nested too deeply to be read is no error of the reader's.
        except (ValueError, RecursionError) as error:
            what = "names a key twice" if isinstance(error, _TwiceError) else "is not valid JSON"
            return Action(ActionKind.INVALID, f"the tool call {what}")
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return Action(ActionKind.INVALID, f"the tool call is not of the form {_SHAPE}")
        tool = next((tool for tool in self.tools if tool.name == call["name"]), None)
        if tool is None:
            return Action(
                ActionKind.INVALID, f"there is no such tool; there is {', '.join(t.name for t in self.tools)}"
            )
        arguments = call["arguments"]
        if not isinstance(arguments, dict) or arguments.keys() != {tool.argument}:
            return Action(ActionKind.INVALID, f"{tool.name} takes one argument, {tool.argument}")
        value = arguments[tool.argument]
        argument = " ".join(value.split()) if isinstance(value, str) else ""
        if not argument:
            return Action(ActionKind.INVALID, f"the {tool.argument} of {tool.name} must be a text that is not empty")
        return Action(tool.kind, argument)

    def correction(self, problem: str, ended: bool = False) -> Text:
        return self._frame(self._advice(problem), ended)

    def _advice(self, problem: str) -> str:
        call = f"<tool_call>{_SHAPE}</tool_call>"
        return f"Invalid action: {problem}. Write one {call} or one <answer> answer </answer>."

    def _frame(self, body: str, ended: bool) -> Text:
        return f"\n<tool_response>\n{body}\n</tool_response>\n"


class _TwiceError(ValueError):
    """An object with the same key twice, of which Python's reader would silently keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _TwiceError
    return made


def _call(name: str, arguments: dict[str, str]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


_WORKED_EXAMPLES = (
    "Question: In which country is the city where the river Elbe meets the sea?\n"
    "<think> I need to know where the Elbe meets the sea. </think>\n"
    f"{_call('search', {'query': 'mouth of the river Elbe'})}\n"
    "<tool_response>\nDoc 1(Title: Elbe) The Elbe flows into the North Sea at Cuxhaven.\n</tool_response>\n"
    "<think> Now I need the country of Cuxhaven. </think>\n"
    f"{_call('search', {'query': 'Cuxhaven'})}\n"
    "<tool_response>\nDoc 1(Title: Cuxhaven) Cuxhaven is a town in Lower Saxony, Germany.\n</tool_response>\n"
    "<think> Cuxhaven is in Germany. </think>\n"
    "<answer> Germany </answer>\n\n",
    "Question: Who painted The Night Watch?\n"
    "<think> I should look this up. </think>\n"
    f"{_call('search', {'query': 'The Night Watch painting'})}\n"
    "<tool_response>\nDoc 1(Title: The Night Watch) The Night Watch is a painting of 1642 by Rembrandt.\n</tool_response>\n"
    "<think> The passage names the painter. </think>\n"
    "<answer> Rembrandt </answer>\n\n",
)
