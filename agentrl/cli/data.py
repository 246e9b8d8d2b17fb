"""`agentrl data`: question files and the demo world."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agentrl.cli.shared import console, errors, say

commands = typer.Typer(no_args_is_help=True, help="Question files and the demo world.")


class Mix(StrEnum):
    practise = "practise"
    distract = "distract"


@commands.command("demo")
def data_demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("data/demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the demo world: passages and questions of one, two and three hops about real countries and cities."""
    from agentrl.demo.world import write_demo

    summary = write_demo(out, seed)
    say(
        f"wrote {summary.passages} passages and "
        f"{', '.join(f'{n} {split}' for split, n in summary.questions.items())} questions to {out}",
    )


@commands.command("mix")
def data_mix(
    mix: Annotated[
        Mix, typer.Argument(help="What it rewards: a second search once practised, or not being distracted.")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default data/MIX.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a mix of questions for the pocket policy, and the made-up world that they are about."""
    from agentrl.pocket.mixes import write_mix

    folder = out or Path("data", mix.value)
    summary = write_mix(mix.value, folder, seed)
    say(
        f"wrote {summary.passages} passages and "
        f"{', '.join(f'{n} {split}' for split, n in summary.questions.items())} questions to {folder}",
    )


@commands.command("validate")
def data_validate(files: Annotated[list[Path], typer.Argument(help="Question files.")]) -> None:
    """Check question files and name every bad row."""
    from agentrl.data.questions import validate_files

    problems = validate_files(files)
    for problem in problems:
        say(problem, errors)
    if problems:
        raise typer.Exit(1)
    console.print(f"{len(files)} file(s) sound")
