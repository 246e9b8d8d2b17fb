"""What every protocol is, and what the packaged ones share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any
from typing import Protocol as TypingProtocol

from agentrl.agent.codec import Codec, Segment, Text, as_string, clean
from agentrl.agent.protocols.examples import EXAMPLES, Example
from agentrl.agent.protocols.passages import fit, fit_text
from agentrl.agent.tools import TOOLS, ToolSpec, describe_tools
from agentrl.config import AgentConfig, ConfigError
from agentrl.types import ANSWER, INVALID, OPEN, SEARCH, Action, Turn
from retrievers.base import Hit

# Words that no template changes and no question holds.
_ASKED = "agentrl-question-here"

_PLACE = "{question}"


class Protocol(TypingProtocol):
    """How to ask, where to stop, what an action is and how an observation is written.

    A protocol of your own is a class that is made with the settings, the codec and the tools of a run; name it in
    `agent.protocol` as `package.module:Class`. Whatever it writes is encoded alone. It must neutralise foreign text: the
    questions, titles, texts and ids that it is handed.
    """

    stop: tuple[str, ...]
    """Strings that end a turn and stay part of it. The model's own end token ends a turn in any case."""

    def __init__(self, config: AgentConfig, codec: Codec, tools: Sequence[ToolSpec]) -> None:
        """Raises ConfigError for settings or a tokenizer that it cannot work with."""
        ...

    def prompt(self, question: str) -> Text:
        """Write what the model continues first."""
        ...

    def parse(self, text: str) -> Action:
        """Read the action from the model's text of one turn, which comes without the end token.

        A turn that cannot be read is invalid, and its argument says in our words what was wrong: the model is told them.
        """
        ...

    def observation(self, result: str | Sequence[Hit], limit: int, ended: bool = False) -> Text:
        """Write what a tool returned as at most `limit` tokens, complete with what closes it.

        `ended` says that the turn closed with the end token. An observation whose closing alone is beyond `limit` is
        complete all the same.
        """
        ...

    def correction(self, problem: str, ended: bool = False) -> Text:
        """Tell the model what was wrong with its last turn."""
        ...

    def answer(self, prompt: str, turns: Sequence[Turn]) -> str | None:
        """Return the answer that counts when an episode with this prompt is over, or None if it has none."""
        action = turns[-1].action
        return action.argument if action.kind == ANSWER else None


class Mistake(Exception):
    """What is wrong with a turn, in words that can be shown to the model: they hold nothing that the model wrote."""


class TextProtocol(Protocol):
    """The packaged protocols' common part: one message that asks, and turns of one action each between tags.

    Subclasses set the attributes below, in `_set_up` where they depend on the settings, and define `instruction`, `_read` and
    `_call`.

    Attributes:
        action_tags: the tags of actions, such as search.
        frame_tag: the tag around what the environment says, such as information.
        author: who writes that tag, with the verb: "the tools write".
        other_tags: tags that mean something to the model, and that no passage may hold either.
        forms: the actions as the model is reminded of them.
    """

    stop: tuple[str, ...] = ()
    action_tags: tuple[str, ...] = ("answer",)
    frame_tag: str = ""
    author: str = ""
    other_tags: tuple[str, ...] = ("think",)
    forms: tuple[str, ...] = ()

    def __init__(
        self,
        config: AgentConfig | None = None,
        codec: Codec | None = None,
        tools: Sequence[ToolSpec] | None = None,
    ) -> None:
        """Without a codec there is wording and parsing, but neither prompts nor observations.

        Raises:
            ConfigError: if the instruction has a place for the question, and worked examples are to stand before it, or
                these would search where there is no `search`.
        """
        self.config = AgentConfig() if config is None else config
        self.tools = {tool.name: tool for tool in (describe_tools(self.config.tools) if tools is None else tools)}
        self._codec = codec
        self._in_chat = self.config.prompt == "chat"
        self._schemas: list[dict[str, Any]] | None = None
        names = "|".join((*self.other_tags, self.frame_tag, *self.action_tags))
        # White space and case are no way around it: a model may well read < / Answer > as the tag.
        self._tag = re.compile(rf"<\s*(/?)\s*({names})\s*>", re.IGNORECASE)
        if _PLACE in (self.config.instruction or "") and self.config.worked_examples:
            raise ConfigError(
                f"agent.instruction: it has a place for the question, {_PLACE}, which leaves none for worked examples; "
                "write them into the instruction and set agent.worked_examples to 0"
            )
        if self.config.worked_examples and SEARCH not in self.tools:
            raise ConfigError("agent.worked_examples: they search, and agent.tools has no `search`; set 0")
        self._set_up()

    def _set_up(self) -> None:
        """Make what a protocol has of its own. Raises ConfigError for settings or a tokenizer that it cannot work with."""

    @property
    def codec(self) -> Codec:
        if self._codec is None:
            raise ValueError(f"{type(self).__name__} was made without a codec")
        return self._codec

    def instruction(self) -> str:
        """What the model is told about the protocol, ending where the question follows."""
        raise NotImplementedError

    def _read(self, name: str, body: str) -> Action:
        """Return the action of the tag `name` with `body` in it. Raises Mistake where it is none."""
        raise NotImplementedError

    def _call(self, query: str) -> str:
        """Write a search as the model does."""
        raise NotImplementedError

    def _frame(self, body: str, ended: bool) -> Text:
        """Put what the environment says, which is neutralised and stays as it is, between what opens and closes it."""
        return f"\n<{self.frame_tag}>\n{body}\n</{self.frame_tag}>\n"

    def worked_examples(self, count: int) -> str:
        """Write up to two complete episodes, for a model that has never seen the protocol."""
        return "".join(map(self._example, EXAMPLES[:count]))

    def _example(self, example: Example) -> str:
        steps = "".join(
            f"<think> {step.thought} </think>\n{self._call(step.query)}"
            f"{as_string(self._frame(f'Doc 1(Title: {step.title}) {step.text}', ended=False))}"
            for step in example.steps
        )
        return (
            f"Question: {example.question}\n{steps}"
            f"<think> {example.thought} </think>\n<answer> {example.answer} </answer>\n\n"
        )

    def ask(self, question: str) -> str:
        """Write the message that asks a question.

        The question stands where the instruction has {question}, or on a line of its own after instruction and examples.
        """
        config = self.config
        if config.instruction is not None and _PLACE in config.instruction:
            return _as_lines(config.instruction).replace(_PLACE, question)
        instruction = self.instruction() if config.instruction is None else config.instruction
        return f"{_as_lines(instruction)}{self.worked_examples(config.worked_examples)}Question: {question}\n"

    def prompt(self, question: str) -> Text:
        question = self.codec.neutralise(question)
        if not self._in_chat:
            return self.ask(question)
        first, *others = self._render([{"role": "user", "content": self.ask(_ASKED)}]).split(_ASKED)
        if not others:
            raise self._unfit("leaves out the user's message")
        return (Segment(first, True), *(part for other in others for part in (Segment(question), Segment(other, True))))

    def _render(self, messages: list[dict[str, str]]) -> str:
        """Write a conversation up to where the model continues it."""
        # It comes with transformers; a protocol is also looked up where neither is installed.
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

    def observation(self, result: str | Sequence[Hit], limit: int, ended: bool = False) -> Text:
        frame = partial(self._frame, ended=ended)
        if isinstance(result, str):
            return fit_text(result, self.codec, limit, self.neutralise, frame)
        return fit(result, self.codec, limit, self.neutralise, frame, with_ids=OPEN in self.tools)

    def correction(self, problem: str, ended: bool = False) -> Text:
        return self._frame(self._advice(problem), ended)

    def _advice(self, problem: str) -> str:
        return f"Invalid action: {problem}. Write one {' or one '.join(self.forms)}."

    def neutralise(self, text: str) -> str:
        """Rewrite the protocol's tags in foreign text, <answer> as [answer], and the tokenizer's control tokens, so that
        no passage can act for the model."""
        text = self._tag.sub(lambda match: f"[{match.group(1)}{match.group(2)}]", clean(text))
        return text if self._codec is None else self._codec.neutralise(text)

    def parse(self, text: str) -> Action:
        try:
            return self._read(*self._find(text))
        except Mistake as mistake:
            return Action(INVALID, str(mistake))

    def _find(self, text: str) -> tuple[str, str]:
        """Return the tag of the one action in a turn, and what stands between its opening and its closing.

        A closed thought is no action, whatever tags it names. Raises Mistake where there is not one action.
        """
        outside = self._thought.sub(lambda match: " " * len(match.group()), text)
        tags = list(self._tag.finditer(outside))
        if any(tag[2].lower() == self.frame_tag for tag in tags):
            raise Mistake(f"only {self.author} <{self.frame_tag}>")
        tags = [tag for tag in tags if tag[2].lower() in self.action_tags]
        if not tags:
            if any(tag[2].lower() in self.action_tags for tag in self._tag.finditer(text)):
                raise Mistake("what stands inside <think> is no action")
            raise Mistake(f"no {' or '.join(f'<{name}>' for name in self.action_tags)} was closed")
        if len(tags) > 2:
            raise Mistake("more than one action in a turn")
        opening, closing = tags[0], tags[-1]
        name, last = opening[2].lower(), closing[2].lower()
        if any(tag[0] != f"<{tag[1]}{tag[2].lower()}>" for tag in tags):
            raise Mistake(f"tags are written in lower case and without spaces, as <{name}>")
        if opening[1]:
            raise Mistake(f"</{name}> has no <{name}> before it")
        if not closing[1]:
            raise Mistake(f"<{name}> was not closed")
        if name != last:
            raise Mistake(f"<{name}> was closed with </{last}>")
        if text[closing.end() :].strip():
            raise Mistake(f"text follows </{name}>")
        return name, text[opening.end() : closing.start()]

    @cached_property
    def _thought(self) -> re.Pattern[str]:
        """What is a thought in a turn: from <think> to </think>, and from the start where the template has opened one."""
        opening, closing = r"<\s*think\s*>", r"<\s*/\s*think\s*>"
        begins = self._in_chat and self._codec is not None and self._render([{"role": "user", "content": "?"}])
        if begins and begins.rstrip().endswith("<think>"):
            opening = rf"(?:{opening}|\A)"
        return re.compile(f"{opening}.*?{closing}", re.IGNORECASE | re.DOTALL)


def read_json(text: str) -> Any:
    """Read the JSON of a call. Raises Mistake if it is none, or an object in it names a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    # A RecursionError means JSON that is nested deeper than Python reads.
    except (ValueError, RecursionError) as error:
        raise Mistake("the tool call is not valid JSON") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a key that comes twice, Python's reader would silently keep the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Mistake("the tool call names a key twice")
    return made


def call_of(tool: ToolSpec, arguments: Any, what: str = "") -> Action:
    """Return the action that calls a tool; `what` names the one text that it takes.

    Raises:
        Mistake: if the arguments do not fit the tool's schema, or this text is empty.
    """
    one = tool.argument
    if one is not None and isinstance(arguments, dict) and isinstance(arguments.get(one), str):
        # Line breaks mean nothing in a query, and may mean much to other tools.
        tidy = one_line if tool.name in TOOLS else _stripped
        arguments = arguments | {one: tidy(arguments[one], what or f"the {one} of {tool.name}")}
    problem = tool.problem(arguments)
    if problem is not None:
        raise Mistake(problem)
    if one is not None:
        return Action(tool.name, arguments[one])
    return Action(tool.name, json.dumps(arguments, ensure_ascii=False), arguments)


def _stripped(text: str, what: str) -> str:
    if not text.strip():
        raise Mistake(f"{what} is empty")
    return text.strip()


def one_line(text: str, what: str) -> str:
    """Return an argument on one line. Raises Mistake if it is empty; `what` names it."""
    line = " ".join(text.split())
    if not line:
        raise Mistake(f"{what} is empty")
    return line


def _as_lines(text: str) -> str:
    """Return a text that ends with a line break, or the empty one."""
    text = text.rstrip(" \t")
    return text if not text or text.endswith("\n") else f"{text}\n"
