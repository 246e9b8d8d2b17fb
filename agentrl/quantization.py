"""What of a configuration the package bitsandbytes computes, and whether this machine has it."""

from __future__ import annotations

import importlib.util

from agentrl.config import Config, ConfigError


def check_quantization(config: Config) -> None:
    """Check that what the config wants of bitsandbytes can be had in this environment.

    Raises:
        ConfigError: if a package is missing, with the key that asks for it.
    """
    wanted = []
    if config.training is not None and config.training.optimizer.name == "adamw_8bit":
        wanted.append("training.optimizer.name adamw_8bit")
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"config {config.name!r}: {' and '.join(wanted)} needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes"
        )
