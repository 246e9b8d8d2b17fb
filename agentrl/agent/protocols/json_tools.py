"""Tool calls in JSON inside <tool_call>, as Qwen and Hermes models are trained to write them."""

from __future__ import annotations

import json

from agentrl.agent.protocols.base import Mistake, TextProtocol, call_of, one_line, read_json
from agentrl.types import ANSWER, Action

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

    def instruction(self) -> str:
        schemas = "\n".join(json.dumps(tool.schema, ensure_ascii=False) for tool in self.tools.values())
        first = next(iter(self.tools.values()))
        call = _written(first.name, dict.fromkeys(first.parameters.get("properties", {}), "…"))
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
        return Action(ANSWER, one_line(body, "the answer"))

    def _read_call(self, body: str) -> Action:
        call = read_json(body)
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            raise Mistake(f"the tool call is not of the form {_SHAPE}")
        name = call["name"]
        if not isinstance(name, str) or name not in self.tools:
            raise Mistake(f"there is no such tool; there is {', '.join(self.tools)}")
        return call_of(self.tools[name], call["arguments"])


def _written(name: str, arguments: dict[str, str]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
