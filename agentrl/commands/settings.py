"""The settings of a config, explained in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from agentrl.config.reference import SectionPart


def explain(parts: Iterable[SectionPart], console: Console) -> None:
    """Print sections with their settings: each with its type and default, and below it what it means."""
    for part in parts:
        console.print(Text(f"{part.key or 'the whole'}: ", "bold") + Text(part.meaning))
        for setting in part.settings:
            default = f", by default {setting.default}" if setting.default else ""
            console.print(Text(f"  {setting.key}", "cyan") + Text(f"  {setting.type}{default}", "dim"))
            # In a file or a pipe a line is as long as it is, and padding would fill it up.
            console.print(
                Padding(Text(setting.meaning), (0, 0, 0, 6))
                if console.is_terminal
                else Text(f"      {setting.meaning}")
            )
        console.print()
