"""Tools: what the model can call. A run has `search`, `open` and those of its user, each described by a JSON schema."""

from __future__ import annotations

from agentrl.agent.tools.packaged import TOOLS, Open, Search
from agentrl.agent.tools.spec import Tool, ToolError, ToolSpec, describes_itself, spec_of
from agentrl.agent.tools.toolbox import EpisodeTools, Toolbox, check_tool, describe_tools, find_tool

__all__ = [
    "TOOLS",
    "EpisodeTools",
    "Open",
    "Search",
    "Tool",
    "ToolError",
    "ToolSpec",
    "Toolbox",
    "check_tool",
    "describe_tools",
    "describes_itself",
    "find_tool",
    "spec_of",
]
