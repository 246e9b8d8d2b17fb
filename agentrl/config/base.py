"""What every section of a configuration is."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from agentrl.types import AgentRLError


class ConfigError(AgentRLError):
    """A configuration that cannot be run; the message names the file and the key."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        strict=True,
        allow_inf_nan=False,
        # What stands below a setting says what it means, in `agentrl config` and docs/config.md too.
        use_attribute_docstrings=True,
    )


def _check_finite(value: Any, key: str = "") -> Any:
    """Raise ValueError for infinity and NaN anywhere in a tree of mappings and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key.lstrip('.')}: input should be a finite number")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        _check_finite(item, f"{key}.{name}")
    return value


PlugInOptions = Annotated[dict[str, Any], AfterValidator(_check_finite)]
"""Options of something that the configuration only names; what takes them knows their types."""
