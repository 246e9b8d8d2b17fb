"""Scores of evaluations, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from agentrl.evaluation.run import Evaluation, read_evaluation
from agentrl.runs import RunFolder


def read_evaluations(folder: RunFolder) -> dict[int, Evaluation]:
    """Return the scores of a run's evaluations by the number of steps after which they were made, ascending."""
    read = {step: read_evaluation(folder, step) for step in folder.evaluated_steps()}
    return {step: evaluation for step, evaluation in read.items() if evaluation is not None}


def read_ceiling(folder: RunFolder) -> Evaluation | None:
    """Return what a perfect searcher would score in a run, or None where that was not measured."""
    return read_evaluation(folder, "ceiling")


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
