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

from agentrl.display.text import printable
from agentrl.rewards import exact_match
from agentrl.runs import read_trajectories
from agentrl.types import INVALID, End, Trajectory, Turn

# The most characters of a title and of a passage, by how much room there is; None is no limit.
_Limits = tuple[int | None, int | None]
_WHOLE, _COLUMNS, _SCREEN = (None, None), (48, 160), (32, 100)
_LABEL = 10
_DOCUMENT = re.compile(r"Doc (\d+)\s*\((?:Id: .*?, )?Title: (.*?)\)\s*(.*)")
_THINK = re.compile(r"</?think>", re.IGNORECASE)
_ENVELOPE = re.compile(r"</?(information|tool_response)>", re.IGNORECASE)

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
    rows = _rows(trajectory, _WHOLE if whole else _COLUMNS)
    if whole:
        return Text("\n").join([_text(f"── {trajectory.id} ──"), *_lines(rows), Text()])
    return Group(Rule(_text(trajectory.id), align="left", style="dim"), Padding(_grid(rows), (0, 0, 1, 0)))


def show_change(before: Iterable[Trajectory], after: Iterable[Trajectory], console: Console) -> Trajectory | None:
    """Print one question as it was answered in two evaluations, turn by turn, and return its second episode.

    It is the first question, in the order of `after`, whose answer did not match exactly before and does after. Where there
    is none, a line says so, and the return is None. Of a question that several episodes answered, the first is taken.
    Passages are shortened, so that both episodes fit a screen.
    """
    earlier, later = _first_of_each(before), _first_of_each(after)
    pairs = [(earlier[key], episode) for key, episode in later.items() if key in earlier]
    turned = [(old, new) for old, new in pairs if not _right(old) and _right(new)]
    back = sum(_right(old) and not _right(new) for old, new in pairs)
    counts = f"of {len(pairs)} questions {len(turned)} were wrong before and right after, {back} the other way round"
    if not turned:
        _print(_text(counts), console)
        return None
    old, new = turned[0]
    _print(_text(f"{counts}; the first of the {len(turned)}:"), console)
    rows = [
        ("question", _text(new.question.text, "bold")),
        ("gold", _gold(new)),
        ("before", Text("reward ") + _outcome(old, "")),
        *_episode_rows(old, _SCREEN),
        ("after", Text("reward ") + _outcome(new, "")),
        *_episode_rows(new, _SCREEN),
    ]
    _print(Padding(_grid(rows), (0, 0, 1, 0)) if console.is_terminal else Text("\n").join(_lines(rows)), console)
    return new


def _first_of_each(episodes: Iterable[Trajectory]) -> dict[tuple[str, str], Trajectory]:
    """Return the first valid episode of each question, in their order."""
    found: dict[tuple[str, str], Trajectory] = {}
    for episode in episodes:
        if episode.valid:
            found.setdefault(_key(episode), episode)
    return found


def _key(trajectory: Trajectory) -> tuple[str, str]:
    return trajectory.question.dataset, trajectory.question.id


def _right(trajectory: Trajectory) -> bool:
    return exact_match(trajectory) == 1.0


def _print(part: RenderableType, console: Console) -> None:
    console.print(part, highlight=False, soft_wrap=not console.is_terminal)


def _grid(rows: Iterable[Row]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _lines(rows: Iterable[Row]) -> Iterator[Text]:
    """Yield one labelled line for each line of text."""
    for label, text in rows:
        for line in text.split("\n"):
            yield Text(f"{label:<{_LABEL}}  ") + line


def _rows(trajectory: Trajectory, limits: _Limits) -> Iterator[Row]:
    yield "question", _text(trajectory.question.text, "bold")
    yield from _episode_rows(trajectory, limits)
    yield "gold", _gold(trajectory)
    failure, _, traceback = trajectory.failure.partition("\n")
    yield "reward", _outcome(trajectory, failure)
    if trajectory.cause is not None:
        yield "cause", Text(trajectory.cause.value, "red")
    if traceback:
        yield "", _text(traceback.rstrip(), "dim")
    yield "tokens", _text(_tokens(trajectory))


def _episode_rows(trajectory: Trajectory, limits: _Limits) -> Iterator[Row]:
    """Yield what the policy did, turn by turn, and what it answered."""
    for number, turn in enumerate(trajectory.turns, start=1):
        yield from _turn_rows(number, turn, limits)
    yield "answer", _text(trajectory.answer, "bold") if trajectory.answer is not None else Text("none", "dim")


def _gold(trajectory: Trajectory) -> Text:
    return _text(" | ".join(trajectory.question.golden_answers))


def _turn_rows(number: int, turn: Turn, limits: _Limits) -> Iterator[Row]:
    kind = turn.action.kind
    thought = _thought(turn)
    if thought:
        yield f"{number} think" if kind != INVALID else f"{number} wrote", _text(thought, "italic")
    if kind == INVALID:
        yield f"{number} invalid", _text(turn.action.argument, "red")
    elif turn.action.calls:
        yield f"{number} {kind}", _text(turn.action.argument, "cyan") + _note(turn)
    yield from _observation(turn, limits)


def _thought(turn: Turn) -> str:
    """Return what stands before the action, or all of a turn that has none."""
    text = turn.text
    if turn.action.kind == INVALID:
        return text.strip()
    action = re.search(rf"<({turn.action.kind}|tool_call)>", text, re.IGNORECASE)
    return _THINK.sub("", text[: action.start()] if action else text).strip()


def _note(turn: Turn) -> Text:
    if turn.calls:
        return Text(f"  {sum(call.seconds for call in turn.calls) * 1000:.0f} ms", "dim")
    return Text() if turn.observation else Text("  not executed", "yellow")


def _observation(turn: Turn, limits: _Limits) -> Iterator[Row]:
    """Yield the lines of what came back: passages after their titles, and any other line, shortened to `limits`.

    The observation of an invalid turn is left out: it tells the model what is shown of that turn already.
    """
    title, passage = limits
    if turn.action.kind == INVALID:
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
    return Text(reward, style) + _parts(trajectory) + ended + (_text(f"  {failure}", "red") if failure else Text())


def _parts(trajectory: Trajectory) -> Text:
    """Return what the rewards came to, unless the only one is what the episode earned."""
    parts = trajectory.reward_parts
    if list(parts.values()) in ([], [trajectory.reward]):
        return Text()
    return _text(f"  ({', '.join(f'{name} {value:g}' for name, value in parts.items())})", "dim")


def _tokens(trajectory: Trajectory) -> str:
    own, around = trajectory.model_tokens, trajectory.environment_tokens
    return f"prompt {len(trajectory.prompt_ids)}, model {own}, environment {around}, in {trajectory.seconds:.1f} s"


def _shorten(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text, keep="\t\n"), style)
