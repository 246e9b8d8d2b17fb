"""What a user sees while a run goes on.

A terminal gets one live view, which fits 80 columns and as many lines as there are. A file or a pipe gets one line a step
and nothing shortened.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from agentrl.advantages import by_stratum, report_table
from agentrl.display.curves import Curves
from agentrl.display.history import REWARD, WINDOW, History
from agentrl.display.text import printable
from agentrl.progress import Progress

_ROWS, _LEAST_ROWS = 12, 3
# The names of what a line shows, and the headings of the same in a table, which has less room.
_COLUMNS = {
    "step": "step",
    "reward": "reward",
    f"mean of {WINDOW}": f"mean\nof {WINDOW}",
    "searches": "searches",
    "strata": "strata: %",
    "tokens/s rollout": "tok/s\nrollout",
    "tokens/s train": "tok/s\ntrain",
    "grad norm": "grad\nnorm",
    "s": "s",
    "left": "left",
}
# What a terminal shows by the width it has at least.
_SHOWN = {80: tuple(_COLUMNS), 28: ("step", "reward", f"mean of {WINDOW}", "s", "left"), 0: ("step", "reward")}


class RunDisplay:
    """Shows the progress of a run of `steps` optimizer steps."""

    def __init__(self, console: Console, steps: int, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """`earlier` are the metrics of steps that the run took before, each with its `step`."""
        self._console = console
        self._steps = steps
        self._metrics = list(earlier)
        self._history = History.of(self._metrics)
        self._rows: list[tuple[str, ...]] = []
        self._advantages: Table | None = None
        self._phase = ""
        self._step_times: list[float] = []
        self._last = 0.0
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=None)
        self._live = Live(self, console=console, refresh_per_second=4) if _is_live(console) else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._advantages is not None and error is None:
            self._console.print(self._advantages)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def height(part: RenderableType) -> int:
            return len(console.render_lines(part, options, pad=False))

        # Shown by what matters most: the bar, some steps, the plots, the advantages, more steps.
        room = options.size.height - height(self._bars)
        parts: list[RenderableType] = [self._bars]
        if self._rows:
            columns = next(columns for width, columns in _SHOWN.items() if options.max_width >= width)
            steps = self._table(_LEAST_ROWS, columns)
            curves = Curves(self._history, self._steps)
            fits = height(steps) + height(curves) <= room
            room -= height(curves) if fits else 0
            if self._advantages is not None and height(steps) + height(self._advantages) <= room:
                parts.insert(0, self._advantages)
                room -= height(self._advantages)
            # A row takes several lines where it has many strata.
            tables = (self._table(rows, columns) for rows in range(_ROWS, _LEAST_ROWS, -1))
            parts.insert(0, next((table for table in tables if height(table) <= room), steps))
            if fits:
                parts.insert(0, curves)
        yield from parts

    def update(self, progress: Progress) -> None:
        if progress.metrics is not None:
            self._add_step(progress.step, progress.metrics)
            return
        if progress.notice:
            # Above the live view, where it stays.
            self._console.print(progress.notice, highlight=False, markup=False, soft_wrap=True)
            return
        phase = progress.phase
        if progress.total and phase in ("rollout", "train"):
            phase = f"step {progress.step + 1} {phase}"
        if phase != self._phase:
            self._phase = phase
            self._bars.reset(self._task, description=phase, total=progress.total or None)
            if self._live is None:
                self._console.print(
                    f"{time.strftime('%H:%M:%S')}  {phase}", highlight=False, markup=False, soft_wrap=True
                )
            if phase.startswith("step") and not self._last:
                self._last = time.monotonic()
        self._bars.update(self._task, completed=progress.done, total=progress.total or None)

    def _add_step(self, step: int, metrics: Mapping[str, float]) -> None:
        prefix = "advantages/"
        report = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        if report:
            self._advantages = report_table(report)
            self._advantages.title = f"advantages by stratum, step {step}"
        self._metrics = [line for line in self._metrics if line["step"] < step] + [{"step": step, **metrics}]
        self._history = History.of(self._metrics)
        now = time.monotonic()
        self._step_times.append(now - self._last)
        self._last = now
        left = (self._steps - step) * sum(self._step_times) / len(self._step_times)
        self._rows.append(
            (
                f"{step}/{self._steps}",
                f"{metrics[REWARD]:.3f}",
                f"{self._history.means[-1]:.3f}",
                f"{metrics['searches/mean']:.2f}",
                strata_shares(metrics),
                f"{metrics['tokens_per_second/rollout']:.0f}",
                f"{metrics['tokens_per_second/train']:.0f}",
                f"{metrics['grad_norm']:.3g}",
                f"{self._step_times[-1]:.0f}",
                f"{left / 60:.0f} min" if left >= 60 else f"{left:.0f} s",
            )
        )
        if self._live is None:
            self._console.print(
                "  ".join(f"{name} {value}" for name, value in zip(_COLUMNS, self._rows[-1], strict=True)),
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def _table(self, rows: int, columns: Sequence[str]) -> Table:
        places = [place for place, name in enumerate(_COLUMNS) if name in columns]
        table = Table(*(_COLUMNS[name] for name in columns), box=None, header_style="bold", padding=(0, 1, 0, 0))
        for row in self._rows[-rows:]:
            table.add_row(*(escape(row[place]) for place in places))
        return table


def _is_live(console: Console) -> bool:
    # On a dumb terminal rich shows a live view at its end alone.
    return console.is_terminal and not console.is_dumb_terminal


def strata_shares(metrics: Mapping[str, float]) -> str:
    """Return the shares of the strata in a step in percent, such as `0:12 1:50 2:38`."""
    return " ".join(
        f"{printable(stratum)}:{100 * values['share']:.0f}" for stratum, values in by_stratum(metrics).items()
    )
