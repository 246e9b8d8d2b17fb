"""Scores of evaluations, side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from agentrl.display.text import printable
from agentrl.evaluation.run import Evaluation, read_evaluation
from agentrl.runs import RunFolder

_HEADINGS = ("set", "when", "n", "EM", "95 % interval", "F1", "searches", "ends")
# In this order columns go where there is no room for all; exact match stays.
_LEAST_FIRST = ("ends", "searches", "F1", "95 % interval", "n", "set", "when")
# A set, and when it was evaluated, are folded to no fewer cells than this.
_NAME = 7


def read_evaluations(folder: RunFolder) -> dict[int, Evaluation]:
    """Return the scores of a run's evaluations by the number of steps after which they were made, ascending."""
    read = {step: read_evaluation(folder, step) for step in folder.evaluated_steps()}
    return {step: evaluation for step, evaluation in read.items() if evaluation is not None}


def read_ceiling(folder: RunFolder) -> Evaluation | None:
    """Return what a perfect searcher would score in a run, or None where that was not measured."""
    return read_evaluation(folder, "ceiling")


def evaluation_table(title: str, columns: Mapping[str, Evaluation | None]) -> RenderableType:
    """Compare evaluations of the same sets: exact match with its 95 % interval, F1, searches and ends of each.

    Below stands how many questions of a set have no score, by cause. Where there is little room, names are folded and the
    less important columns left out, so that each number shown is whole.
    """
    present = {name: e for name, e in columns.items() if e is not None}
    rows, failures = [], []
    sets = next(iter(present.values())).sets if present else ()
    for position, first in enumerate(sets):
        dataset = printable(first.dataset)
        for name, evaluation in present.items():
            result = evaluation.sets[position]
            cells = (
                dataset,
                name,
                str(result.n),
                f"{result.em:.3f}",
                f"{result.em_low:.3f} to {result.em_high:.3f}",
                f"{result.f1:.3f}",
                f"{result.searches:.2f}",
                ", ".join(f"{end} {share:.0%}" for end, share in result.ends.items()),
            )
            rows.append(dict(zip(_HEADINGS, cells, strict=True)))
            if result.failed:
                causes = ", ".join(f"{cause} {count}" for cause, count in result.causes.items())
                failures.append(f"{dataset}, {name}: {result.n} (+{result.failed} failed): {causes}")
    return _Scores(printable(title), tuple(rows), tuple(failures))


@dataclass(frozen=True, slots=True)
class _Scores:
    """A table of as many columns as there is room for; `rows` hold their cells by heading, `failures` stand below."""

    title: str
    rows: tuple[dict[str, str], ...]
    failures: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
        # As text of its own, which is not searched for markup or emoji.
        table.title = Text(self.title, "table.title")
        table.caption = Text("\n".join(self.failures), "table.caption") if self.failures else None
        widths = self._widths(options.max_width)
        for heading, width in widths.items():
            table.add_column(heading, overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(row[heading]) for heading in widths))
        yield table

    def _widths(self, room: int) -> dict[str, int]:
        """Return the columns to show in `room` cells, one cell apart, and how wide each is."""
        full = {heading: max(map(cell_len, self._column(heading))) for heading in _HEADINGS}
        widths = full | {heading: min(full[heading], _NAME) for heading in ("set", "when")}
        # An end with its share is as good as a number.
        ends = [part for cell in self._column("ends") for part in re.findall(r"[^,]+,?", cell)]
        widths["ends"] = max(cell_len(part.strip()) for part in ends)
        for heading in _LEAST_FIRST:
            if sum(widths.values()) + len(widths) - 1 > room:
                del widths[heading]
        for _ in range(room - sum(widths.values()) - (len(widths) - 1)):
            narrow = [heading for heading in widths if widths[heading] < full[heading]]
            if narrow:
                widths[min(reversed(narrow), key=widths.__getitem__)] += 1
        return widths

    def _column(self, heading: str) -> list[str]:
        return [heading, *(row[heading] for row in self.rows)]
