"""Protocols: how the model is asked, where a turn stops, what an action is and how an observation is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agentrl.agent.codec import Codec
from agentrl.agent.protocols.base import Protocol
from agentrl.agent.protocols.chat_tools import ChatTools
from agentrl.agent.protocols.json_tools import JsonTools
from agentrl.agent.protocols.search_r1 import SearchR1
from agentrl.agent.protocols.tags import SearchTags
from agentrl.agent.tools import ToolSpec, describe_tools
from agentrl.config import AgentConfig, ConfigError
from agentrl.registry import look_up

__all__ = ["PROTOCOLS", "ChatTools", "JsonTools", "Protocol", "SearchR1", "SearchTags", "find_protocol", "get_protocol"]

PROTOCOLS: dict[str, Callable[..., Any]] = {
    "search_tags": SearchTags,
    "json_tools": JsonTools,
    "chat_tools": ChatTools,
    "search_r1": SearchR1,
}


def find_protocol(name: str) -> Callable[..., Any]:
    """Return the class of a registered name or of an import path such as `package.module:Class`.

    Raises:
        ConfigError: if there is none.
    """
    return look_up(name, PROTOCOLS, "protocol", lambda message: ConfigError(f"agent.protocol: {message}"))


def get_protocol(config: AgentConfig, codec: Codec, tools: Sequence[ToolSpec] | None = None) -> Protocol:
    """Make the protocol that `agent.protocol` names, for `tools` or for those that `agent.tools` describes.

    Raises:
        ConfigError: if there is none, or it cannot work with these settings or this tokenizer.
    """
    made = find_protocol(config.protocol)(config, codec, describe_tools(config.tools) if tools is None else tools)
    for part in ("stop", "prompt", "parse", "observation", "correction", "answer"):
        if not hasattr(made, part):
            raise ConfigError(f"agent.protocol {config.protocol} has no `{part}`; see agentrl.agent.protocols.Protocol")
    return made
