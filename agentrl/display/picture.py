"""The picture of a run: reward, evaluations and strata over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agentrl.display.history import WINDOW, History
from agentrl.display.scores import read_ceiling, read_evaluations
from agentrl.evaluation.run import Evaluation
from agentrl.runs import RunError, RunFolder
from agentrl.runs.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "learning.png"
"""The picture's file in a run folder."""

# Sets that are evaluated at the same step stand side by side, this share of the axis apart.
_APART = 0.012


def draw_run(folder: RunFolder, path: Path | None = None) -> Path:
    """Draw a run as PNG from its metrics.jsonl and evaluations/ alone, and return the file, by default `NAME` in the folder.

    Above are the reward of each step with its moving mean, and exact match of each evaluation with its 95 % interval at the
    step after which it was made, under the ceiling if it was measured; below the share of each stratum.

    Raises:
        RunError: if the run has neither steps nor evaluations.
        ModuleNotFoundError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    history = History.of(folder.read_metrics())
    evaluations = read_evaluations(folder)
    if not history.steps and not evaluations:
        raise RunError(f"{folder.path}: there is nothing to draw: no steps in {folder.metrics.name} and no evaluations")
    from matplotlib.figure import Figure

    # Without pyplot, which would look for a screen.
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_reward(above, history)
    _draw_evaluations(above, evaluations, read_ceiling(folder))
    above.set_title(folder.path.name, loc="left")
    above.set_ylabel("reward, exact match")
    above.grid(alpha=0.3)
    above.legend(loc="best", fontsize="small")
    _draw_strata(below, history)
    below.set_xlabel("step")
    target = path or folder.path / NAME
    replace_file(target, lambda file: figure.savefig(file, format="png", dpi=150))
    return target


def _draw_reward(axes: Axes, history: History) -> None:
    axes.set_ylim(min(0.0, *history.rewards, 0.0) - 0.02, max(1.0, *history.rewards, 1.0) + 0.02)
    if history.steps:
        axes.plot(history.steps, history.rewards, ".", color="tab:gray", alpha=0.6, label="reward of a step")
        axes.plot(history.steps, history.means, color="tab:blue", linewidth=2, label=f"mean of {WINDOW} steps")


def _draw_evaluations(axes: Axes, evaluations: dict[int, Evaluation], ceiling: Evaluation | None) -> None:
    """Mark the exact match of each set, one colour a set, with its interval, and what a perfect searcher would score."""
    names = list(dict.fromkeys(result.dataset for evaluation in evaluations.values() for result in evaluation.sets))
    span = max(1, *evaluations, 1)
    for position, name in enumerate(names):
        shift = (position - (len(names) - 1) / 2) * _APART * span
        results = [(step, r) for step, e in evaluations.items() for r in e.sets if r.dataset == name]
        axes.errorbar(
            [step + shift for step, _ in results],
            [r.em for _, r in results],
            [[r.em - r.em_low for _, r in results], [r.em_high - r.em for _, r in results]],
            fmt="D",
            capsize=4,
            color=f"C{(position + 1) % 10}",
            label=f"exact match on {name}, 95 %",
        )
        for reached in [r.em for r in ceiling.sets if r.dataset == name] if ceiling else []:
            axes.axhline(reached, color=f"C{(position + 1) % 10}", linestyle="--", label=f"ceiling of {name}")


def _draw_strata(axes: Axes, history: History) -> None:
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("share of episodes")
    if history.shares:
        axes.stackplot(history.steps, *history.shares.values(), labels=list(history.shares), alpha=0.8)
        handles, labels = axes.get_legend_handles_labels()
        # As they lie on one another.
        axes.legend(
            handles[::-1],
            labels[::-1],
            title="stratum",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            fontsize="small",
        )
