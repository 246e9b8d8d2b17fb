"""Native tools: the tokenizer's own chat template writes the prompt and what stands around every result."""

from __future__ import annotations

import json
from typing import Any

from agentrl.agent.codec import Segment, Text
from agentrl.agent.protocols.json_tools import JsonTools
from agentrl.config import ConfigError
from agentrl.types import INVALID, Action

# Words that no template changes and no conversation holds.
_SAID, _TOLD = "agentrl-said-here", "agentrl-told-here"


class ChatTools(JsonTools):
    """Tools through the chat template of a model that writes calls as <tool_call> JSON, such as Qwen2.5, Qwen3 and Hermes.

    The template describes the tools in the prompt. A turn ends with the model's own end token, which is sampled and trained
    like any other; it holds one call, or the answer in <answer>. A result comes back as a message of role tool, a
    correction as one of role user.

    The template never renders a conversation again as it grows, or ids would change. It renders one made-up conversation,
    once. What it writes there between the assistant's text and the text of the next message opens the frame of every later
    message, and what it writes from that text to where the model continues closes the frame. Where a turn was cut off
    before its end token, the frame brings the token. Some templates write a message differently by its place in the
    conversation: Qwen3's drops earlier thoughts. Here the model goes on from what it had seen, thoughts included.
    """

    stop = ()

    def _set_up(self) -> None:
        """Raises ConfigError if the tokenizer's template does not support tools in this form."""
        if self.config.worked_examples:
            raise ConfigError("agent.worked_examples: protocol chat_tools has none; set 0")
        self._in_chat = True
        self._schemas: list[dict[str, Any]] = [tool.schema for tool in self.tools.values()]
        # Some tokenizers count the tags of tools among their special tokens.
        special = self.codec.tokenizer.all_special_tokens
        self._controls = [token for token in special if len(token) > 1 and not self._tag.fullmatch(token)]
        asked = self._render([{"role": "user", "content": "?"}])
        if not all(any(form in asked for form in _written_forms(tool.description)) for tool in self.tools.values()):
            raise self._unfit("does not describe the tools that it is given")
        if "<tool_call>" not in asked:
            raise self._unfit(
                "asks for calls in another form than <tool_call> JSON; write a protocol of your own for it"
            )
        self._tool, self._user = self._around("tool"), self._around("user")

    def instruction(self) -> str:
        return (
            "Answer the question at the end. Call the tools as often as you need, one call in a turn. When you know the "
            "answer, write it, as short as possible and without explanation, as <answer> the answer </answer>.\n\n"
        )

    def parse(self, text: str) -> Action:
        if any(token in text for token in self._controls):
            return Action(INVALID, "only the conversation's own frame has control tokens")
        return super().parse(text)

    def correction(self, problem: str, ended: bool = False) -> Text:
        return self._message(self._user, self._advice(problem), ended)

    def _frame(self, body: str, ended: bool) -> Text:
        return self._message(self._tool, body, ended)

    def _message(self, around: tuple[str, str], body: str, ended: bool) -> Text:
        head, tail = around
        if ended:
            head = head.removeprefix(self.codec.tokenizer.eos_token)
        return Segment(head, True), Segment(body), Segment(tail, True)

    def _around(self, role: str) -> tuple[str, str]:
        """Return what the template writes before and after the text of a message that follows the assistant's."""
        rendered = self._render(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": _SAID},
                {"role": role, "content": _TOLD},
            ]
        )
        _, said, rest = rendered.rpartition(_SAID)
        head, told, tail = rest.partition(_TOLD)
        if not said or not told:
            raise self._unfit(f"leaves out the text of a message of role {role}")
        end = self.codec.tokenizer.eos_token
        if not end or not head.lstrip().startswith(end):
            raise self._unfit(f"does not end the assistant's message with the tokenizer's end token, {end}")
        return head.lstrip(), tail


def _written_forms(description: str) -> tuple[str, ...]:
    """Return how a template may write a description: as it is, or as a text in JSON."""
    return description, json.dumps(description, ensure_ascii=False)[1:-1], json.dumps(description)[1:-1]
