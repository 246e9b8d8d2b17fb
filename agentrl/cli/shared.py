"""What the groups of commands share: consoles, arguments, and how a config is read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from agentrl.config import Config

# Wider than any line: in a file or a pipe nothing is wrapped or shortened to fit a screen that is not there.
_UNBOUNDED = 100_000

# FORCE_COLOR makes no terminal of a file.
console = Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED, force_terminal=False)
errors = Console(stderr=True)


def say(text: str, to: Console = console) -> None:
    """Print a text as it stands: paths and names of users are no markup, and a line is never broken."""
    to.print(text, highlight=False, markup=False, soft_wrap=True)


ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A config file, or the name of a packaged one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, a.b=value.")]
AdapterOption = Annotated[str | None, typer.Option(help="Folder of the PEFT adapter; by default the config's own.")]
QuestionsOption = Annotated[
    list[str] | None, typer.Option(help="Question file, in place of data.eval; may be repeated.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use at most this many questions of each file.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def load(config: str, overrides: list[str] | None) -> Config:
    from agentrl.config import load_config
    from agentrl.plug_ins import check_plug_ins

    settings = load_config(config, overrides or [])
    check_plug_ins(settings)
    return settings
