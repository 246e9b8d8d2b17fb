"""Tools: what the model can call. A run has `search`, `open` and those of its user, each described by a JSON schema."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import Protocol as TypingProtocol

from agentrl.config import ConfigError, ToolConfig
from agentrl.registry import look_up
from agentrl.types import ANSWER, INVALID, OPEN, SEARCH, Action, AgentRLError, Question, ToolCall
from retrievers.base import Hit, Reader, Retriever, unwrap
from retrievers.names import describe_exception

# A name stands in tags and in JSON.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# What a schema of arguments may have at its top: with more, arguments could fit it that are none of its properties.
_KEYWORDS = {"type", "properties", "required", "additionalProperties", "description", "title", "$defs", "$schema"}
_KINDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}
# The most characters of a schema that a mistake quotes, and of a refusal that a record keeps.
_SHOWN, _RECORDED = 200, 1000
# The tags of protocols, and what an action is that calls no tool.
_TAKEN = (ANSWER, INVALID, "think", "information", "tool_call", "tool_response", "tools")


class ToolError(AgentRLError):
    """A tool refuses a call; the model is told the message, and the episode goes on."""


class Tool(TypingProtocol):
    """What a tool is: a class that is made once in each rollout worker, with the options that `agent.tools` gives it.

    An own tool stands in `agent.tools` as `package.module:Class`. Any number of episodes call it at once. What belongs to one
    episode alone is made by an optional method `episode(question)`: an asynchronous context manager whose value, another
    tool of the same description, is called in that episode. Entering sets it up; leaving, however the episode ends, cleans up.
    """

    name: str
    """How the model calls it: lower case letters, digits and underscores."""

    description: str
    """What it does, for the model."""

    parameters: Mapping[str, Any]
    """Its arguments as a JSON schema of type object (json-schema.org, draft 2020-12)."""

    async def call(self, **arguments: Any) -> str | Sequence[Hit]:
        """Return text, or passages; `arguments` fit the schema.

        Raises:
            ToolError: to tell the model why there is no result. Any other exception fails the episode.
        """
        ...


@dataclass(frozen=True)
class ToolSpec:
    """A tool as protocols write it for the model."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def argument(self) -> str | None:
        """The name of the one text that the tool takes and needs, or None if it takes anything else."""
        properties, needed = self.parameters.get("properties", {}), self.parameters.get("required", ())
        texts = [name for name, schema in properties.items() if schema.get("type") == "string" and name in needed]
        return texts[0] if len(texts) == len(properties) == 1 else None

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the JSON form that chat templates take."""
        described = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": described}

    @property
    def form(self) -> str:
        """What stands between the tags of a call, as the model is reminded of it."""
        return self.argument or json.dumps(
            dict.fromkeys(self.parameters.get("properties", {}), "…"), ensure_ascii=False
        )

    def problem(self, arguments: Any) -> str | None:
        """Return what is wrong with the arguments of a call, in words that hold nothing that the model wrote, or None."""
        known, needed = self.parameters.get("properties", {}), set(self.parameters.get("required", ()))
        if not isinstance(arguments, dict) or not needed <= arguments.keys() <= known.keys():
            if self.argument is not None:
                return f"{self.name} takes one argument, {self.argument}"
            named = (name if name in needed else f"{name} (not needed)" for name in known)
            return f"{self.name} takes {', '.join(named) or 'no argument'}"
        try:
            error = next(self._validator.iter_errors(arguments), None)
        except RecursionError:
            return f"what {self.name} is called with is nested too deep"
        if error is None:
            return None
        path = list(error.absolute_path)
        what = f"the {path[0]} of {self.name}" if path else f"what {self.name} is called with"
        if error.validator == "type" and len(path) == 1:
            kind = error.validator_value
            return f"{what} is not {_KINDS.get(kind, kind) if isinstance(kind, str) else ' or '.join(kind)}"
        rule = json.dumps({error.validator: error.validator_value}, ensure_ascii=False)
        return f"{what} does not fit its schema, {rule if len(rule) <= _SHOWN else rule[:_SHOWN] + '…'}"

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator

        return Draft202012Validator(self.parameters)


def _one_text(argument: str, description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {argument: {"type": "string", "description": description}},
        "required": [argument],
    }


class Search:
    """Finds passages."""

    name = SEARCH
    description = "Search an encyclopedia and get the best passages."
    parameters = _one_text("query", "What you want to find.")

    def __init__(self, retriever: Retriever, k: int) -> None:
        self._retriever, self._k = retriever, k

    async def call(self, query: str) -> Sequence[Hit]:
        """Return the `k` best passages. Raises RetrieverError if the retriever fails."""
        return (await self._retriever.search([query], self._k))[0]


class Open:
    """Reads a whole document."""

    name = OPEN
    description = "Read a whole document."
    parameters = _one_text("id", "The id of a document that a search has shown.")

    def __init__(self, retriever: Retriever, k: int) -> None:
        """Raises ConfigError if the retriever cannot read whole documents."""
        source = unwrap(retriever)
        if not isinstance(source, Reader):
            raise ConfigError(
                f"agent.tools: `open` needs a retriever that reads whole documents, and {type(source).__name__} "
                "has no `async def read(document_id)`; leave `open` out or use another retriever"
            )
        self._retriever: Any = retriever

    async def call(self, id: str) -> Sequence[Hit]:
        """Return the document alone, or nothing. Raises RetrieverError if the retriever fails."""
        document = await self._retriever.read(id)
        return [] if document is None else [document]


TOOLS: Mapping[str, Callable[..., Tool]] = {SEARCH: Search, OPEN: Open}


def find_tool(name: str) -> Callable[..., Tool]:
    """Return the class of a packaged tool, or of an import path such as `package.module:Class`.

    Raises:
        ConfigError: if there is none.
    """
    return look_up(name, TOOLS, "tool", lambda message: ConfigError(f"agent.tools: {message}"))


def spec_of(tool: Any, where: str) -> ToolSpec:
    """Read how a tool, or its class, describes itself; `where` names it in messages.

    Raises:
        ConfigError: if it does not say what `Tool` demands, or its `call` does not take what its schema says.
    """
    missing = [part for part in ("name", "description", "parameters", "call") if not hasattr(tool, part)]
    if missing:
        raise ConfigError(f"agent.tools: {where} has no `{missing[0]}`; see agentrl.agent.tools.Tool")
    if not (isinstance(tool.name, str) and _NAME.fullmatch(tool.name)) or tool.name in _TAKEN:
        raise ConfigError(
            f"agent.tools: the name of {where} is {tool.name!r}; it must be lower case letters, digits and underscores, and "
            f"none of {', '.join(_TAKEN)}"
        )
    if tool.name in TOOLS and not isinstance(tool, Search | Open) and tool not in (Search, Open):
        raise ConfigError(
            f"agent.tools: {where} has the name of a packaged tool, {tool.name}, whose calls are counted and described as "
            "searches; give it another name, or put it behind `search` as a retriever of your own (retriever.target)"
        )
    if not isinstance(tool.description, str) or not tool.description.strip():
        raise ConfigError(f"agent.tools: {where} has an empty `description`, by which the model knows the tool")
    _check_schema(tool.parameters, where)
    _check_call(tool, where)
    if inspect.isasyncgenfunction(getattr(tool, "episode", None)):
        raise ConfigError(f"agent.tools: `episode` of {where} must be an @asynccontextmanager (of contextlib)")
    return ToolSpec(tool.name, tool.description, tool.parameters)


def describe_tools(settings: Sequence[ToolConfig]) -> list[ToolSpec]:
    """Return how the tools of a run describe themselves, by their classes where these say it; else one is made for that.

    Raises:
        ConfigError: if there is no such tool, or it does not describe itself.
    """
    found = []
    for setting in settings:
        tool: Any = find_tool(setting.kind)
        found.append(spec_of(tool if describes_itself(tool) else _made(tool, setting), setting.kind))
    return found


def describes_itself(kind: Any) -> bool:
    """Whether a class says all that `Tool` demands, and not only the tools that are made of it."""
    name, description, parameters = (getattr(kind, part, None) for part in ("name", "description", "parameters"))
    return isinstance(name, str) and isinstance(description, str) and isinstance(parameters, Mapping)


def _check_schema(parameters: Any, where: str) -> None:
    # It takes a moment to import, and only a user's tools need it.
    from jsonschema import Draft202012Validator, SchemaError

    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise ConfigError(f'agent.tools: the `parameters` of {where} must be a JSON schema of "type": "object"')
    try:
        Draft202012Validator.check_schema(parameters)
        json.dumps(parameters)
    except SchemaError as error:
        raise ConfigError(f"agent.tools: the `parameters` of {where} are no JSON schema: {error.message}") from error
    except TypeError as error:
        raise ConfigError(f"agent.tools: the `parameters` of {where} cannot be written as JSON: {error}") from error
    more = sorted(parameters.keys() - _KEYWORDS)
    if more:
        raise ConfigError(
            f"agent.tools: the `parameters` of {where} have {more[0]} beside their properties; name every argument under "
            f'"properties" (at the top there can be {", ".join(sorted(_KEYWORDS))})'
        )
    properties = parameters.get("properties", {})
    unnamed = sorted(set(parameters.get("required", ())) - properties.keys())
    if unnamed:
        raise ConfigError(
            f"agent.tools: the `parameters` of {where} require {unnamed[0]}, which is none of their properties"
        )
    if not all(isinstance(schema, Mapping) for schema in properties.values()):
        raise ConfigError(f"agent.tools: the `parameters` of {where} must describe each property by an object")
    missing = sorted(ref for ref in _references(parameters) if not _leads_somewhere(ref, parameters))
    if missing:
        raise ConfigError(f"agent.tools: the `parameters` of {where} refer to {missing[0]}, which is not there")


def _references(schema: Any) -> set[str]:
    """Return what a schema and those in it refer to."""
    if isinstance(schema, Mapping):
        own = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*map(_references, schema.values()))
    return set().union(*map(_references, schema)) if isinstance(schema, list | tuple) else set()


def _leads_somewhere(reference: str, schema: Any) -> bool:
    """Whether a reference names a part of this schema, by its place such as `#/$defs/size`."""
    place, *path = reference.split("/")
    for part in path:
        schema = schema.get(part) if isinstance(schema, Mapping) else None
    return place == "#" and isinstance(schema, Mapping | bool)


def _check_call(tool: Any, where: str) -> None:
    if not inspect.iscoroutinefunction(tool.call):
        raise ConfigError(f"agent.tools: `call` of {where} must be `async def`")
    signature, parameters = inspect.signature(tool.call), tool.parameters
    # Looked up on a class, a plain function still takes the tool itself.
    bound = not isinstance(tool, type) or isinstance(inspect.getattr_static(tool, "call"), staticmethod | classmethod)
    itself = () if bound else (None,)
    names, required = parameters.get("properties", {}), parameters.get("required", ())
    try:
        for arguments in (names, required):
            signature.bind(*itself, **dict.fromkeys(arguments))
    except TypeError as error:
        raise ConfigError(
            f"agent.tools: `call` of {where} does not take what its `parameters` say: {error}; it takes {signature}"
        ) from error


class Toolbox:
    """The tools of a run, as one rollout worker has them."""

    def __init__(self, settings: Sequence[ToolConfig], retriever: Retriever, k: int) -> None:
        """Make the tools. `k` passages come back for a search.

        Raises:
            ConfigError: if one cannot be made, or two have one name, or `open` is among them and the retriever cannot read
                whole documents.
        """
        self._settings = list(settings)
        self._tools = [_make(setting, retriever, k) for setting in settings]
        self.specs = [spec_of(tool, setting.kind) for tool, setting in zip(self._tools, settings, strict=True)]
        names = [spec.name for spec in self.specs]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ConfigError(f"agent.tools: two tools have the name {repeated}, by which the model calls them")

    @asynccontextmanager
    async def episode(self, question: Question) -> AsyncIterator[EpisodeTools]:
        """Set the tools up for one episode, and clean up after it."""
        async with AsyncExitStack() as stack:
            tools = {}
            for tool, spec, setting in zip(self._tools, self.specs, self._settings, strict=True):
                begin: Callable[[Question], AbstractAsyncContextManager[Tool | None]] | None = getattr(
                    tool, "episode", None
                )
                own = None
                if begin is not None:
                    manager = begin(question)
                    if not hasattr(manager, "__aenter__"):
                        raise TypeError(
                            f"agent.tools: `episode` of {setting.kind} must be an @asynccontextmanager (of contextlib)"
                        )
                    own = await stack.enter_async_context(manager)
                tools[spec.name] = _Ready(tool if own is None else own, spec, setting)
            yield EpisodeTools(tools)


def _make(setting: ToolConfig, retriever: Retriever, k: int) -> Any:
    kind = find_tool(setting.kind)
    return kind(retriever, k) if setting.kind in TOOLS else _made(kind, setting)


def _made(kind: Callable[..., Tool], setting: ToolConfig) -> Tool:
    try:
        return kind(**setting.options)
    except Exception as error:  # A user's class may raise anything.
        raise ConfigError(f"agent.tools: {setting.kind} cannot be made: {describe_exception(error)}") from error


@dataclass(frozen=True, slots=True)
class _Ready:
    tool: Any
    spec: ToolSpec
    setting: ToolConfig


def _is_sound(hit: Any) -> bool:
    return (
        isinstance(hit, Hit)
        and isinstance(hit.id, str)
        and isinstance(hit.contents, str)
        and isinstance(hit.score, int | float)
    )


class EpisodeTools:
    """The tools of one episode."""

    def __init__(self, tools: Mapping[str, _Ready]) -> None:
        self._tools = tools

    def _ready(self, action: Action) -> _Ready:
        if action.kind not in self._tools:
            raise KeyError(f"the protocol asked for the tool {action.kind!r}; there is {', '.join(self._tools)}")
        return self._tools[action.kind]

    def most_tokens(self, action: Action, limit: int) -> int:
        """Return how many tokens the result of a call may have, where the episode has room for `limit`."""
        most = self._ready(action).setting.max_tokens
        return limit if most is None else min(limit, most)

    async def call(self, action: Action) -> tuple[str | Sequence[Hit], ToolCall]:
        """Execute a call; return what came back, or what the model is told in its place, and the record of it.

        Raises:
            RetrieverError: if a retriever failed.
            KeyError: if the protocol asks for a tool that there is not.
            TypeError: if the tool returned neither text nor hits.
            Exception: whatever else the tool raises.
        """
        ready = self._ready(action)
        arguments, one = dict(action.arguments), ready.spec.argument
        if one is not None and not arguments:
            arguments = {one: action.argument}
        now = asyncio.get_running_loop().time
        started, seconds = now(), ready.setting.timeout_seconds
        deadline = asyncio.timeout(seconds)
        error, too_late = "", ready.setting.on_error or f"The call was stopped after {seconds or 0:g} seconds."
        result: str | Sequence[Hit]
        try:
            async with deadline:
                result = await ready.tool.call(**arguments)
            # Code that is cancelled may go on all the same.
            if deadline.expired():
                result = error = too_late
        except ToolError as refusal:
            result = error = ready.setting.on_error or str(refusal) or "The call failed."
        # Code that is cancelled may turn that into an exception of its own, and users raise TimeoutError too.
        except Exception:
            if not deadline.expired():
                raise
            result = error = too_late
        took = now() - started
        if isinstance(result, str):
            return result, ToolCall(ready.spec.name, arguments, took, error=error[:_RECORDED])
        if not isinstance(result, Sequence) or not all(map(_is_sound, result)):
            raise TypeError(
                f"the tool {ready.spec.name} ({ready.setting.kind}) returned {type(result).__name__}, and must return a text "
                "or a list of retrievers.base.Hit, whose id and contents are texts and whose score is a number"
            )
        ids, scores = tuple(hit.id for hit in result), tuple(hit.score for hit in result)
        return result, ToolCall(ready.spec.name, arguments, took, ids, scores)
