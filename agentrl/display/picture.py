"""The picture of a run: reward, evaluations and strata over its steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.display.history import WINDOW, History
from agentrl.display.scores import read_ceiling, read_evaluations
from agentrl.display.text import printable
from agentrl.evaluation.run import Evaluation
from agentrl.runs import RunError, RunFolder
from agentrl.runs.files import replace_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import Container
    from matplotlib.figure import Figure

    _Entry = tuple[Artist | Container, str]
    """What was drawn, and its name in the legend."""

NAME = "learning.png"
"""The picture's file in a run folder."""

# Sets that are evaluated at the same step stand side by side, this share of the axis apart.
_APART = 0.012


def draw_run(folder: RunFolder, path: Path | None = None) -> Path:
    """Draw a run as PNG (see `figure_of`) and return the file, by default `NAME` in the folder.

    Raises:
        RunError: if the run has neither steps nor evaluations.
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    figure = figure_of(folder)
    target = path or folder.path / NAME
    with warnings.catch_warnings():
        # A character that the font lacks becomes a box, one warning for each, and the user cannot mend it.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        replace_file(target, lambda file: figure.savefig(file, format="png", dpi=150))
    return target


def figure_of(folder: RunFolder) -> Figure:
    """Return the picture of a run, made from its metrics.jsonl and evaluations/ alone.

    Above are the reward of each step with its moving mean, and exact match of each evaluation with its 95 % interval at the
    step after which it was made, under the ceiling if it was measured; below the share of each stratum.

    Raises:
        RunError: if the run has neither steps nor evaluations.
        ModuleNotFoundError: if matplotlib is not installed.
    """
    history = History.of(folder.read_metrics())
    evaluations = read_evaluations(folder)
    if not history.steps and not evaluations:
        raise RunError(f"{folder.path}: there is nothing to draw: no steps in {folder.metrics.name} and no evaluations")
    from matplotlib.figure import Figure

    # Without pyplot, which would look for a screen.
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    entries = [*_draw_reward(above, history), *_draw_evaluations(above, evaluations, read_ceiling(folder))]
    above.set_title(printable(folder.path.name), loc="left", parse_math=False)
    above.set_ylabel("reward, exact match")
    above.grid(alpha=0.3)
    _legend(above, entries, loc="best")
    strata = _draw_strata(below, history)
    # As they lie on one another.
    _legend(below, strata[::-1], title="stratum", loc="center left", bbox_to_anchor=(1.0, 0.5))
    below.set_xlabel("step")
    return figure


def _legend(axes: Axes, entries: Sequence[_Entry], **options: Any) -> None:
    """Name what was drawn. The names are the user's: none is left out, as labels with `_` would be, or read as a formula."""
    if entries:
        legend = axes.legend(*zip(*entries, strict=True), fontsize="small", **options)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_reward(axes: Axes, history: History) -> list[_Entry]:
    axes.set_ylim(min(0.0, *history.rewards, 0.0) - 0.02, max(1.0, *history.rewards, 1.0) + 0.02)
    if not history.steps:
        return []
    (rewards,) = axes.plot(history.steps, history.rewards, ".", color="tab:gray", alpha=0.6)
    (means,) = axes.plot(history.steps, history.means, color="tab:blue", linewidth=2)
    return [(rewards, "reward of a step"), (means, f"mean of {WINDOW} steps")]


def _draw_evaluations(axes: Axes, evaluations: dict[int, Evaluation], ceiling: Evaluation | None) -> list[_Entry]:
    """Mark the exact match of each set, one colour a set, with its interval, and what a perfect searcher would score."""
    names = list(dict.fromkeys(result.dataset for evaluation in evaluations.values() for result in evaluation.sets))
    span = max(1, *evaluations, 1)
    entries: list[_Entry] = []
    for position, name in enumerate(names):
        shift = (position - (len(names) - 1) / 2) * _APART * span
        results = [(step, r) for step, e in evaluations.items() for r in e.sets if r.dataset == name]
        color = f"C{(position + 1) % 10}"
        # A bound may lie beyond its mean by a rounding error, and matplotlib refuses a bar of less than nothing.
        bars = axes.errorbar(
            [step + shift for step, _ in results],
            [r.em for _, r in results],
            [[max(0.0, r.em - r.em_low) for _, r in results], [max(0.0, r.em_high - r.em) for _, r in results]],
            fmt="D",
            capsize=4,
            color=color,
        )
        entries.append((bars, f"exact match on {printable(name)}, 95 %"))
        for reached in [r.em for r in ceiling.sets if r.dataset == name] if ceiling else []:
            entries.append((axes.axhline(reached, color=color, linestyle="--"), f"ceiling of {printable(name)}"))
    return entries


def _draw_strata(axes: Axes, history: History) -> list[_Entry]:
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("share of episodes")
    if not history.shares:
        return []
    layers = axes.stackplot(history.steps, *history.shares.values(), alpha=0.8)
    return [(layer, printable(name)) for layer, name in zip(layers, history.shares, strict=True)]
