"""What every section of a configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from agentrl.types import AgentRLError


class ConfigError(AgentRLError):
    """A configuration that cannot be run; the message names the file and the key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)
