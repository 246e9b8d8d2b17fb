"""Tool calls in JSON inside <tool_call>, as Qwen and Hermes models are trained to write them."""

from __future__ import annotations

import json
from typing import Any

from agentrl.agent.codec import Codec
from agentrl.agent.protocols.base import Mistake, TextProtocol, one_line
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

    stop: tuple[str, ...] = ("</tool_call>", "</answer>")
    action_tags = ("tool_call", "answer")
    other_tags = ("think", "tools")
    frame_tag = "tool_response"
    author = "the tools write"
    forms = (f"<tool_call>{_SHAPE}</tool_call>", "<answer> answer </answer>")

    def __init__(self, config: AgentConfig | None = None, codec: Codec | None = None) -> None:
        super().__init__(config, codec)
        self.tools = [TOOLS[name] for name in self.config.tools]

    def instruction(self) -> str:
        schemas = "\n".join(json.dumps(tool.schema) for tool in self.tools)
        call = _written(self.tools[0].name, {self.tools[0].argument: "…"})
        return (
            f"Answer the question at the end. These tools are at hand:\n<tools>\n{schemas}\n</tools>\n"
            f"First reason briefly inside <think> and </think>. To call a tool, write its name and arguments in JSON:\n{call}\n"
            "Its result comes back between <tool_response> and </tool_response>. You may call tools several times, one "
            "call in a turn. When you know the answer, write it, as short as possible and without explanation, as "
            "<answer> the answer </answer>.\n\n"
        )

    def _call(self, query: str) -> str:
        return _written("search", {"query": query})

    def _read(self, name: str, body: str) -> Action:
        if name == "tool_call":
            return self._read_call(body)
        return Action(ActionKind.ANSWER, one_line(body, "the answer"))

    def _read_call(self, body: str) -> Action:
        try:
            call = json.loads(body, object_pairs_hook=_object)
        # A RecursionError means JSON that is nested deeper than Python reads.
        except (ValueError, RecursionError) as error:
            raise Mistake("the tool call is not valid JSON") from error
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            raise Mistake(f"the tool call is not of the form {_SHAPE}")
        tool = next((tool for tool in self.tools if tool.name == call["name"]), None)
        if tool is None:
            raise Mistake(f"there is no such tool; there is {', '.join(tool.name for tool in self.tools)}")
        arguments = call["arguments"]
        if not isinstance(arguments, dict) or arguments.keys() != {tool.argument}:
            raise Mistake(f"{tool.name} takes one argument, {tool.argument}")
        what, value = f"the {tool.argument} of {tool.name}", arguments[tool.argument]
        if not isinstance(value, str):
            raise Mistake(f"{what} is not a text")
        return Action(tool.kind, one_line(value, what))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a key that comes twice, Python's reader would silently keep the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Mistake("the tool call names a key twice")
    return made


def _written(name: str, arguments: dict[str, str]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
