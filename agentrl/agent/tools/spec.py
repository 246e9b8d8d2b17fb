"""What a tool is, how it describes itself, and the check that it can be called as it says."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from agentrl.config import ConfigError
from agentrl.types import ANSWER, INVALID, AgentRLError
from retrievers.base import Hit

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
# The most characters of a schema that a mistake quotes.
_SHOWN = 200
# The tags of protocols, and what an action is that calls no tool.
_TAKEN = (ANSWER, INVALID, "think", "information", "tool_call", "tool_response", "tools")


class ToolError(AgentRLError):
    """A tool refuses a call; the model is told the message, and the episode goes on."""


class Tool(Protocol):
    """What a tool is: a class that is made once in each rollout worker, with the options that `agent.tools` gives it.

    An own tool stands in `agent.tools` as `package.module:Class`. Any number of episodes call it at once. What belongs to one
    episode alone is made by an optional method `episode(question)`: an asynchronous context manager whose value, another
    tool of the same description or None for this one, is called in that episode. It is entered before the first turn and left
    however the episode ends, with the exception that ends it, if one does.
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
    if not isinstance(tool.description, str) or not tool.description.strip():
        raise ConfigError(f"agent.tools: {where} has an empty `description`, by which the model knows the tool")
    _check_schema(tool.parameters, where)
    _check_call(tool, where)
    if inspect.isasyncgenfunction(getattr(tool, "episode", None)):
        raise ConfigError(f"agent.tools: `episode` of {where} must be an @asynccontextmanager (of contextlib)")
    return ToolSpec(tool.name, tool.description, tool.parameters)


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
