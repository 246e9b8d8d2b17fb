"""What every protocol is, and what the packaged ones share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import Protocol as TypingProtocol

from agentrl.agent.codec import Codec, Segment, Text, clean
from agentrl.agent.protocols.passages import fit
from agentrl.config import AgentConfig, ConfigError
from agentrl.types import Action, ActionKind, Turn
from retrievers.base import Hit

# Words that no template changes and no question holds.
_ASKED = "agentrl-question-here"


class Protocol(TypingProtocol):
    """How to ask, where to stop, what an action is and how an observation is written.

    A protocol of your own is a class that is made with the settings and the codec of a run; name it in `agent.protocol`
    as `package.module:Class`. Whatever it writes is encoded once, alone. It must neutralise foreign text: the questions,
    titles, texts and ids that it is handed.
    """

    stop: tuple[str, ...]
    """Strings that end a turn and stay part of it. The model's own end token ends a turn in any case."""

    def __init__(self, config: AgentConfig, codec: Codec) -> None:
        """Raises ConfigError for settings or a tokenizer that it cannot work with."""
        ...

    def prompt(self, question: str) -> Text:
        """Write what the model continues first."""
        ...

    def parse(self, text: str) -> Action:
        """Read the action from the model's text of one turn, which comes without the end token. Never raises: what cannot
        be read is INVALID, with what was wrong in our words, as they are shown to the model."""
        ...

    def observation(self, hits: Sequence[Hit], limit: int, ended: bool = False) -> Text:
        """Write hits as at most `limit` tokens, complete with what closes it. `ended`: the turn closed with the end token.
        Where `limit` does not even hold what closes it, it is complete all the same and has more."""
        ...

    def correction(self, problem: str, ended: bool = False) -> Text:
        """Tell the model what was wrong with its last turn."""
        ...

    def answer(self, prompt: str, turns: Sequence[Turn]) -> str | None:
        """Return the answer that counts when an episode with this prompt is over, or None if it has none."""
        action = turns[-1].action
        return action.argument if action.kind is ActionKind.ANSWER else None


class TextProtocol(Protocol):
    """The packaged protocols' common part: an instruction, worked examples and the question as one text or one message.

    Subclasses set `names`, the tags of their own, and write their frame in `_frame`.
    """

    stop: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __init__(self, config: AgentConfig | None = None, codec: Codec | None = None) -> None:
        """Without a codec there is wording and parsing, but neither prompts nor observations."""
        self.config = AgentConfig() if config is None else config
        self._codec = codec
        self._in_chat = self.config.prompt == "chat"
        self._schemas: list[dict[str, Any]] | None = None
        # White space and case are no way around it: a model may well read < / Answer > as the tag.
        self._tag = re.compile(rf"<\s*(/?)\s*({'|'.join(self.names)})\s*>", re.IGNORECASE)

    @property
    def codec(self) -> Codec:
        if self._codec is None:
            raise ValueError(f"{type(self).__name__} was made without a codec")
        return self._codec

    def instruction(self) -> str:
        """What the model is told about the protocol, ending where the question follows."""
        raise NotImplementedError

    def worked_examples(self, count: int) -> str:
        """Up to two complete episodes, for a model that has never seen the protocol."""
        raise NotImplementedError

    def _frame(self, body: str, ended: bool) -> Text:
        """Put what the environment says, which is neutralised and stays as it is, between what opens and closes it."""
        raise NotImplementedError

    def ask(self) -> str:
        """Everything that stands before the question."""
        config = self.config
        instruction = self.instruction() if config.instruction is None else config.instruction
        return f"{instruction}{self.worked_examples(config.worked_examples)}Question: "

    def prompt(self, question: str) -> Text:
        question = self.codec.neutralise(question)
        if not self._in_chat:
            return f"{self.ask()}{question}\n"
        before, mark, after = self._render([{"role": "user", "content": f"{self.ask()}{_ASKED}\n"}]).rpartition(_ASKED)
        if not mark:
            raise self._unfit("leaves out the user's message")
        return Segment(before, True), Segment(question), Segment(after, True)

    def _render(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation up to where the model continues it."""
        # transformers brings it along; a protocol is looked up where there is no transformers.
        from jinja2 import TemplateError

        if self.codec.tokenizer.chat_template is None:
            raise self._unfit("is missing")
        try:
            return self.codec.tokenizer.apply_chat_template(
                messages, tools=self._schemas, add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise self._unfit(
                f"refuses a conversation of roles {', '.join(m['role'] for m in messages)}: {error}"
            ) from error

    def _unfit(self, problem: str) -> ConfigError:
        where = f"agent.protocol {self.config.protocol}, agent.prompt {self.config.prompt}"
        return ConfigError(f"{where}: the chat template of this model's tokenizer {problem}")

    def observation(self, hits: Sequence[Hit], limit: int, ended: bool = False) -> Text:
        frame = partial(self._frame, ended=ended)
        return fit(hits, self.codec, limit, self.neutralise, frame, with_ids="open" in self.config.tools)

    def neutralise(self, text: str) -> str:
        """Rewrite the protocol's tags in foreign text, <answer> as [answer], and the tokenizer's control tokens, so that
        no passage can act for the model."""
        text = self._tag.sub(lambda match: f"[{match.group(1)}{match.group(2)}]", clean(text))
        return text if self._codec is None else self._codec.neutralise(text)
