"""The tools of a run at work: found by their names, made in each rollout worker, set up and called in each episode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentrl.agent.tools.packaged import TOOLS
from agentrl.agent.tools.spec import Tool, ToolError, ToolSpec, describes_itself, spec_of
from agentrl.config import ConfigError, ToolConfig
from agentrl.registry import call_problem, look_up
from agentrl.types import Action, Question, ToolCall
from retrievers.base import Hit, Retriever
from retrievers.names import describe_exception

# The most characters of a refusal that a record keeps.
_RECORDED = 1000


def find_tool(name: str) -> Callable[..., Tool]:
    """Return the class of a packaged tool, or of an import path such as `package.module:Class`.

    Raises:
        ConfigError: if there is none.
    """
    return look_up(name, TOOLS, "tool", lambda message: ConfigError(f"agent.tools: {message}"))


def describe_tools(settings: Sequence[ToolConfig]) -> list[ToolSpec]:
    """Return how the tools of a run describe themselves, by their classes where these say it; else one is made for that.

    Raises:
        ConfigError: if there is no such tool, or it does not describe itself.
    """
    found = []
    for setting in settings:
        kind: Any = find_tool(setting.kind)
        found.append(_spec(kind if describes_itself(kind) else _made(kind, setting), setting))
    return found


def check_tool(setting: ToolConfig) -> None:
    """Check what can be known of a tool without making it: its options and, where its class says it, its description.

    Raises:
        ConfigError: if it cannot be used so.
    """
    kind: Any = find_tool(setting.kind)
    if setting.kind in TOOLS:
        if setting.options:
            raise ConfigError(f"agent.tools: {setting.kind} takes no options; its settings stand in `retriever`")
        return
    problem = call_problem(kind, **setting.options)
    if problem is not None:
        raise ConfigError(f"agent.tools: {setting.kind} cannot be called so: {problem}")
    if describes_itself(kind):
        _spec(kind, setting)


def _spec(tool: Any, setting: ToolConfig) -> ToolSpec:
    spec = spec_of(tool, setting.kind)
    if spec.name in TOOLS and setting.kind not in TOOLS:
        raise ConfigError(
            f"agent.tools: {setting.kind} has the name of a packaged tool, {spec.name}, whose calls are counted and described as "
            "searches; give it another name, or put it behind `search` as a retriever of your own (retriever.target)"
        )
    return spec


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
        self.specs = [_spec(tool, setting) for tool, setting in zip(self._tools, settings, strict=True)]
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
                own = await _begun(tool, setting, question, stack)
                tools[spec.name] = _Ready(tool if own is None else own, spec, setting)
            yield EpisodeTools(tools)


async def _begun(tool: Any, setting: ToolConfig, question: Question, stack: AsyncExitStack) -> Any:
    """Return the tool of this episode, or None where it is that of all."""
    if not hasattr(tool, "episode"):
        return None
    manager = tool.episode(question)
    if not hasattr(manager, "__aenter__"):
        raise TypeError(f"agent.tools: `episode` of {setting.kind} must be an @asynccontextmanager (of contextlib)")
    return await stack.enter_async_context(manager)


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
