"""What a user sees while a run goes on and when it ends.

A terminal gets one live view, whose tables fit 80 columns. A file or a pipe gets one line a step and nothing shortened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from agentrl.advantages import by_stratum, report_table
from agentrl.evaluation.run import Evaluation
from agentrl.progress import Progress

_ROWS = 12
# The names of what a line shows, and the headings of the same in a table, which has less room.
_COLUMNS = {
    "step": "step",
    "reward": "reward",
    "searches": "searches",
    "strata": "strata: %",
    "tokens/s rollout": "tok/s\nrollout",
    "tokens/s train": "tok/s\ntrain",
    "grad norm": "grad\nnorm",
    "s": "s",
    "left": "left",
}


class RunDisplay:
    """Shows the progress of a run of `steps` optimizer steps."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
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
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None

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

    def __rich__(self) -> Group:
        parts = [self._table()] if self._rows else []
        if self._advantages is not None:
            parts.append(self._advantages)
        return Group(*parts, self._bars)

    def update(self, progress: Progress) -> None:
        if progress.metrics is not None:
            self._add_step(progress.step, progress.metrics)
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
        now = time.monotonic()
        self._step_times.append(now - self._last)
        self._last = now
        left = (self._steps - step) * sum(self._step_times) / len(self._step_times)
        self._rows.append(
            (
                f"{step}/{self._steps}",
                f"{metrics['reward/mean']:.3f}",
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

    def _table(self) -> Table:
        table = Table(*_COLUMNS.values(), box=None, header_style="bold", padding=(0, 1, 0, 0))
        for row in self._rows[-_ROWS:]:
            table.add_row(*map(escape, row))
        return table


def strata_shares(metrics: Mapping[str, float]) -> str:
    """Return the shares of the strata in a step in percent, such as `0:12 1:50 2:38`."""
    return " ".join(f"{stratum}:{100 * values['share']:.0f}" for stratum, values in by_stratum(metrics).items())


def evaluation_table(title: str, columns: Mapping[str, Evaluation | None]) -> Table:
    """Compare evaluations of the same sets: exact match with its 95 % interval, F1, searches and ends of each.

    Below stands how many questions of a set have no score, by cause.
    """
    present: dict[str, Any] = {name: e for name, e in columns.items() if e is not None}
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("set", "when", "n", "EM", "95 % interval", "F1", "searches", "ends"):
        table.add_column(heading, overflow="fold", no_wrap=heading not in ("set", "ends"))
    failures = []
    sets = next(iter(present.values())).sets if present else ()
    for position, first in enumerate(sets):
        for name, evaluation in present.items():
            result = evaluation.sets[position]
            table.add_row(
                escape(first.dataset),
                name,
                str(result.n),
                f"{result.em:.3f}",
                f"{result.em_low:.3f} to {result.em_high:.3f}",
                f"{result.f1:.3f}",
                f"{result.searches:.2f}",
                ", ".join(f"{end} {share:.0%}" for end, share in result.ends.items()),
            )
            if result.failed:
                causes = ", ".join(f"{cause} {count}" for cause, count in result.causes.items())
                failures.append(f"{first.dataset}, {name}: {result.n} (+{result.failed} failed): {causes}")
    table.caption, table.caption_justify = escape("\n".join(failures)) or None, "left"
    return table
