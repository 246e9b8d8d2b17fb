"""Episodes as a person reads them: question, thoughts, searches with what they found, answer, and what it earned.

A terminal gets columns that fit it, with long passages shortened. A file or a pipe gets every text whole, one labelled line
for each line of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentrl.runs import read_trajectories
from agentrl.types import ActionKind, End, Trajectory, Turn

_TITLE, _PASSAGE = 48, 160
_LABEL = 10
_DOCUMENT = re.compile(r"Doc (\d+)\s*\((?:Id: .*?, )?Title: (.*?)\)\s*(.*)")
_ACTION = re.compile(r"<(search|answer|tool_call)>", re.IGNORECASE)
_THINK = re.compile(r"</?think>", re.IGNORECASE)
_ENVELOPE = re.compile(r"</?(information|tool_response)>", re.IGNORECASE)
# A sampled text can hold any character; some would move the cursor, or cannot be written at all.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Row = tuple[str, Text]
"""A label and what stands beside it."""


def show_files(files: Iterable[Path], limit: int | None, console: Console) -> int:
    """Print the episodes of trajectory files, at most `limit` in all, and return how many.

    Raises:
        RunError: if a file holds no trajectories, or a row of it is none; what stands before it has been printed.
        OSError: if a file cannot be read.
    """
    return show_episodes(islice(_episodes(files), limit), console)


def show_episodes(trajectories: Iterable[Trajectory], console: Console) -> int:
    """Print episodes and return how many."""
    shown = 0
    for trajectory in trajectories:
        console.print(episode(trajectory, whole=not console.is_terminal))
        shown += 1
    return shown


def _episodes(files: Iterable[Path]) -> Iterator[Trajectory]:
    for file in files:
        yield from read_trajectories(file)


def episode(trajectory: Trajectory, *, whole: bool = False) -> RenderableType:
    """Lay one episode out in columns, or as lines with every text `whole`.

    Texts of the model and of the environment are shown as they are, and never read as rich's markup.
    """
    rows = _rows(trajectory, whole)
    if whole:
        heading = _text(f"── {trajectory.id} ──")
        lines = (Text(f"{label:<{_LABEL}}  ") + line for label, text in rows for line in text.split("\n"))
        return Text("\n").join([heading, *lines, Text()])
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return Group(Rule(_text(trajectory.id), align="left", style="dim"), Padding(grid, (0, 0, 1, 0)))


def _rows(trajectory: Trajectory, whole: bool) -> Iterator[Row]:
    yield "question", _text(trajectory.question.text, "bold")
    for number, turn in enumerate(trajectory.turns, start=1):
        yield from _turn_rows(number, turn, whole)
    yield "answer", _text(trajectory.answer, "bold") if trajectory.answer is not None else Text("none", "dim")
    yield "gold", _text(" | ".join(trajectory.question.golden_answers))
    failure, _, traceback = trajectory.failure.partition("\n")
    yield "reward", _outcome(trajectory, failure)
    if trajectory.cause is not None:
        yield "cause", Text(trajectory.cause.value, "red")
    if traceback:
        yield "", _text(traceback.rstrip(), "dim")
    yield "tokens", _text(_tokens(trajectory))


def _turn_rows(number: int, turn: Turn, whole: bool) -> Iterator[Row]:
    kind = turn.action.kind
    thought = _thought(turn)
    if thought:
        yield f"{number} think" if kind is not ActionKind.INVALID else f"{number} wrote", _text(thought, "italic")
    if kind is ActionKind.INVALID:
        yield f"{number} invalid", _text(turn.action.argument, "red")
    elif kind is not ActionKind.ANSWER:
        yield f"{number} {kind.value}", _text(turn.action.argument, "cyan") + _note(turn)
    yield from _observation(turn, whole)


def _thought(turn: Turn) -> str:
    """Return what stands before the action, or all of a turn that has none."""
    text = turn.text
    if turn.action.kind is ActionKind.INVALID:
        return text.strip()
    action = _ACTION.search(text)
    return _THINK.sub("", text[: action.start()] if action else text).strip()


def _note(turn: Turn) -> Text:
    if turn.search is not None:
        return Text(f"  {turn.search.seconds * 1000:.0f} ms", "dim")
    return Text() if turn.observation else Text("  not executed", "yellow")


def _observation(turn: Turn, whole: bool) -> Iterator[Row]:
    """Yield the lines of what came back: passages after their titles, and any other line, shortened unless `whole`.

    The observation of an invalid turn is left out: it tells the model what is shown of that turn already.
    """
    title, passage = (None, None) if whole else (_TITLE, _PASSAGE)
    if turn.action.kind is ActionKind.INVALID:
        return
    for line in _ENVELOPE.sub("", turn.observation).splitlines():
        found = _DOCUMENT.fullmatch(line.strip())
        if found:
            head = _text(_shorten(found[2], title), "green")
            yield f"    {found[1]}", head + "  " + _text(_shorten(found[3], passage), "dim")
        elif line.strip():
            yield "", _text(_shorten(line.strip(), passage), "dim")


def _outcome(trajectory: Trajectory, failure: str) -> Text:
    reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}"
    style = "green" if (trajectory.reward or 0) > 0 else "red"
    ended = Text(f"  {trajectory.end.value}", "default" if trajectory.end is End.ANSWERED else "yellow")
    return Text(reward, style) + ended + (_text(f"  {failure}", "red") if failure else Text())


def _tokens(trajectory: Trajectory) -> str:
    own, around = trajectory.model_tokens, trajectory.environment_tokens
    return f"prompt {len(trajectory.prompt_ids)}, model {own}, environment {around}, in {trajectory.seconds:.1f} s"


def _shorten(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _text(text: str, style: str = "") -> Text:
    return Text(_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text), style)
