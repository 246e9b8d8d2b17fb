"""`agentrl runs`: what runs came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentrl.cli.shared import RunArgument, console, say

commands = typer.Typer(no_args_is_help=True, help="What runs came to.")


@commands.command("show")
def runs_show(run: RunArgument) -> None:
    """Print a run's scores, and a question as it was answered before and after."""
    from agentrl.commands.runs import show_run

    show_run(run, console)


@commands.command("plot")
def runs_plot(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The PNG file to write; by default RUN/learning.png.")] = None,
) -> None:
    """Draw reward, evaluations and strata of a run by step, from its metrics and evaluations."""
    from agentrl.commands.runs import plot

    say(f"picture     {plot(run, out)}")
