"""Episodes as a person reads them: question, thoughts, searches with what they found, answer, and what it earned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from agentrl.runs import read_trajectories
from agentrl.types import ActionKind, End, Trajectory, Turn

_TITLE, _PASSAGE = 48, 160
_DOCUMENT = re.compile(r"Doc (\d+)\s*\((?:Id: .*?, )?Title: (.*?)\)\s*(.*)")
_ACTION = re.compile(r"<(search|answer|tool_call)>", re.IGNORECASE)
_THINK = re.compile(r"</?think>", re.IGNORECASE)
_ENVELOPE = re.compile(r"</?(information|tool_response)>", re.IGNORECASE)
# A sampled text can hold any character; some would move the cursor, or cannot be written at all.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def show_files(files: Iterable[Path], limit: int | None, console: Console) -> int:
    """Print the episodes of trajectory files, at most `limit` in all, and return how many.

    Raises:
        RunError: if a file holds no trajectories.
        OSError: if a file cannot be read.
    """
    shown = 0
    for trajectory in islice(_episodes(files), limit):
        console.print(episode(trajectory))
        shown += 1
    return shown


def _episodes(files: Iterable[Path]) -> Iterator[Trajectory]:
    for file in files:
        yield from read_trajectories(file)


def episode(trajectory: Trajectory) -> Group:
    """Lay one episode out. Its texts are shown as they are and never read as rich's markup."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("question", _text(trajectory.question.text, "bold"))
    for number, turn in enumerate(trajectory.turns, start=1):
        _add_turn(rows, number, turn)
    rows.add_row("answer", _text(trajectory.answer, "bold") if trajectory.answer is not None else Text("none", "dim"))
    rows.add_row("gold", _text(" | ".join(trajectory.question.golden_answers)))
    rows.add_row("reward", _outcome(trajectory))
    rows.add_row("tokens", _text(_tokens(trajectory)))
    return Group(Rule(_text(trajectory.id), align="left", style="dim"), Padding(rows, (0, 0, 1, 0)))


def _add_turn(rows: Table, number: int, turn: Turn) -> None:
    kind = turn.action.kind
    thought = _thought(turn)
    if thought:
        rows.add_row(
            f"{number} think" if kind is not ActionKind.INVALID else f"{number} wrote", _text(thought, "italic")
        )
    if kind is ActionKind.INVALID:
        rows.add_row(f"{number} invalid", _text(turn.action.argument, "red"))
    elif kind is not ActionKind.ANSWER:
        rows.add_row(f"{number} {kind.value}", _text(turn.action.argument, "cyan") + _note(turn))
    for label, line in _observation(turn):
        rows.add_row(label, line)


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


def _observation(turn: Turn) -> Iterator[tuple[str, Text]]:
    """Yield the lines of what came back: passages with their titles, both shortened, and any other text whole.

    What follows an invalid turn only repeats to the model what is shown of that turn already.
    """
    if turn.action.kind is ActionKind.INVALID:
        return
    for line in _ENVELOPE.sub("", turn.observation).splitlines():
        found = _DOCUMENT.fullmatch(line.strip())
        if found:
            head = _text(_shorten(found[2], _TITLE), "green")
            yield f"    {found[1]}", head + "  " + _text(_shorten(found[3], _PASSAGE), "dim")
        elif line.strip():
            yield "", _text(_shorten(line.strip(), _PASSAGE), "dim")


def _outcome(trajectory: Trajectory) -> Text:
    reward = "none" if trajectory.reward is None else f"{trajectory.reward:g}"
    style = "green" if (trajectory.reward or 0) > 0 else "red"
    ended = Text(f"  {trajectory.end.value}", "default" if trajectory.end is End.ANSWERED else "yellow")
    failure = _text(f"  {trajectory.failure}", "red") if trajectory.failure else Text()
    return Text(reward, style) + ended + failure


def _tokens(trajectory: Trajectory) -> str:
    own = sum(trajectory.action_mask)
    around = len(trajectory.completion_ids) - own
    return f"prompt {len(trajectory.prompt_ids)}, model {own}, environment {around}, in {trajectory.seconds:.1f} s"


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _text(text: str, style: str = "") -> Text:
    return Text(_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text), style)
