"""Two small plots of a run's steps, made of characters: the reward with its moving mean, and the shares of the strata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from agentrl.display.history import WINDOW, History
from agentrl.display.text import printable

HEIGHT = 6
"""Rows of a plot, without the line above it and the one below."""

# Two plots stand side by side from this width on; below there is room for the reward alone, and below the least for none.
_BOTH, _LEAST = 60, 20
_GAP = 3
_REWARD, _MEAN = Style(color="yellow"), Style(color="cyan", bold=True)
_STRATA = tuple(Style(color=color) for color in ("red", "yellow", "green", "cyan", "blue", "magenta"))
_BRAILLE = 0x2800
# The dots of a braille character by column and row from above.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_OTHER = "#"
Line = list[Segment]


@dataclass(frozen=True, slots=True)
class Curves:
    """A renderable of the steps so far in a run of `total`, as wide as there is room, with time from left to right."""

    history: History
    total: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if not self.history.steps or width < _LEAST:
            return
        both = width >= _BOTH and bool(self.history.shares)
        right = (width - _GAP) // 2 if both else 0
        left = width - right - (_GAP if both else 0)
        lines = list(self._reward(left, options.ascii_only))
        if both:
            pairs = zip(lines, self._strata(right), strict=True)
            lines = [[*_fit(one, left), Segment(" " * _GAP), *_fit(two, right)] for one, two in pairs]
        for line in lines:
            yield from _fit(line, width)
            yield Segment.line()

    def _reward(self, width: int, ascii_only: bool) -> Iterator[Line]:
        history = self.history
        low, high = min(0.0, *history.rewards, 0.0), max(1.0, *history.rewards)
        labels = {0: f"{high:.2f} ", HEIGHT - 1: f"{low:.2f} "}
        margin = max(map(len, labels.values()))
        canvas = _Canvas(width - margin, HEIGHT, fine=not ascii_only)
        spans = self._spans(canvas.columns)
        previous: int | None = None
        for column, members in enumerate(spans):
            for member in members:
                canvas.dot(column, _level(history.rewards[member], low, high, canvas.rows), mean=False)
            if members:
                level = _level(_mean([history.means[m] for m in members]), low, high, canvas.rows)
                canvas.bar(column, level if previous is None else previous, level)
                previous = level
        mark, line = ("." if ascii_only else "⠂"), ("*" if ascii_only else "⠤")
        yield [
            Segment("reward: "),
            Segment(mark, _REWARD),
            Segment(" step, "),
            Segment(line, _MEAN),
            Segment(f" mean of {WINDOW}"),
        ]
        for row in range(HEIGHT):
            yield [Segment(labels.get(row, "").rjust(margin)), *canvas.line(row)]
        yield self._axis(margin, width)

    def _strata(self, width: int) -> Iterator[Line]:
        names = [printable(name) for name in self.history.shares]
        shares = list(self.history.shares.values())
        marks = _marks(names)
        if len(marks) < len(names):
            rest = [sum(step) for step in zip(*shares[len(marks) - 1 :], strict=True)]
            names = [*names[: len(marks) - 1], "other"]
            shares = [*shares[: len(marks) - 1], tuple(rest)]
        titles = [mark if mark == name else f"{mark}={name}" for mark, name in zip(marks, names, strict=True)]
        yield [Segment(f"strata: {'  '.join(titles)}")]
        styles = {mark: _STRATA[position % len(_STRATA)] for position, mark in enumerate(marks)}
        columns = []
        for members in self._spans(width):
            column = _stack([_mean([share[m] for m in members]) for share in shares]) if members else []
            columns.append([marks[place] for place in column])
        for row in range(HEIGHT - 1, -1, -1):
            cells = [column[row] if row < len(column) else " " for column in columns]
            yield [Segment(cell, styles.get(cell)) for cell in cells]
        yield self._axis(0, width)

    def _axis(self, margin: int, width: int) -> Line:
        return [Segment(f"{' ' * margin}1{f'step {self.total}':>{max(1, width - margin - 1)}}", Style(dim=True))]

    def _spans(self, columns: int) -> list[list[int]]:
        """Return for each column the places in the history of the steps that it stands for; none of steps yet to come."""
        places = {step: place for place, step in enumerate(self.history.steps)}
        spans = []
        for column in range(columns):
            first = column * self.total // columns
            last = max(first + 1, (column + 1) * self.total // columns)
            spans.append([places[step + 1] for step in range(first, last) if step + 1 in places])
        return spans


@dataclass(slots=True)
class _Canvas:
    """Dots on `width` × `height` characters: eight in each where `fine`, else one."""

    width: int
    height: int
    fine: bool
    _rewards: set[tuple[int, int]] = field(default_factory=set)
    _means: set[tuple[int, int]] = field(default_factory=set)

    @property
    def columns(self) -> int:
        return self.width * (2 if self.fine else 1)

    @property
    def rows(self) -> int:
        return self.height * (4 if self.fine else 1)

    def dot(self, column: int, level: int, *, mean: bool) -> None:
        """Set a dot; `level` counts from below."""
        (self._means if mean else self._rewards).add((column, self.rows - 1 - level))

    def bar(self, column: int, start: int, end: int) -> None:
        """Set the dots of the mean in a column, from the level of the column before, so that the line has no holes."""
        step = 1 if end >= start else -1
        for level in [*range(start + step, end, step), end]:
            self.dot(column, level, mean=True)

    def line(self, row: int) -> Iterator[Segment]:
        for column in range(self.width):
            if not self.fine:
                place = (column, row)
                mark = "*" if place in self._means else "." if place in self._rewards else " "
                yield Segment(mark, _MEAN if mark == "*" else _REWARD)
                continue
            dots = {(2 * column + x, 4 * row + y): bit for x, bits in enumerate(_DOTS) for y, bit in enumerate(bits)}
            means = sum(bit for place, bit in dots.items() if place in self._means)
            rewards = sum(bit for place, bit in dots.items() if place in self._rewards)
            yield Segment(chr(_BRAILLE + (means | rewards)) if means | rewards else " ", _MEAN if means else _REWARD)


def _level(value: float, low: float, high: float, rows: int) -> int:
    return round((value - low) / (high - low) * (rows - 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stack(shares: Sequence[float]) -> list[int]:
    """Return which stratum each row of a column shows, from below: each as many as its share, to the nearest row."""
    column: list[int] = []
    total = 0.0
    for place, share in enumerate(shares):
        total += share
        column += [place] * (round(total * HEIGHT) - len(column))
    return column


def _marks(names: Sequence[str]) -> list[str]:
    """Return one character for each stratum: how its name begins where that tells all apart, else a letter.

    Where there are more strata than letters, the last mark stands for all that are left.
    """
    first = [name[:1] for name in names]
    if len(set(first)) == len(names) and all(mark.isalnum() and cell_len(mark) == 1 for mark in first):
        return first
    return list(_LETTERS[: len(names)]) if len(names) <= len(_LETTERS) else [*_LETTERS, _OTHER]


def _fit(line: Line, width: int) -> Line:
    """Cut or fill a line to a width in cells."""
    return Segment.adjust_line_length(line, width)
