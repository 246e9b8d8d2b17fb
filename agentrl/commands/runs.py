"""What a run has come to: its picture, and a question that it learned to answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.commands.show import show_change
from agentrl.display import evaluation_table
from agentrl.display.history import WINDOW, History
from agentrl.display.scores import read_ceiling, read_evaluations
from agentrl.evaluation.run import read_evaluation
from agentrl.extras import missing_extra
from agentrl.runs import RunError, RunFolder, read_trajectories
from agentrl.training.checkpoints import best_checkpoint


def open_run(path: Path) -> RunFolder:
    """Return the folder of a run to read. Raises RunError if there is none."""
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path}: no run: it has no config.yaml; give the folder that `agentrl train` printed")
    return RunFolder(path)


def plot(path: Path, out: Path | None) -> Path:
    """Draw the picture of a run and return its file; see `agentrl.display.picture.draw_run`.

    Raises:
        RunError: if there is no run, it has nothing to draw, or `out` is a folder.
    """
    from agentrl.display.picture import draw_run

    if out is not None and out.is_dir():
        raise RunError(f"{out}: a folder; give the name of a file with --out")
    return draw_run(open_run(path), out)


def show_learned(folder: RunFolder, console: Console) -> None:
    """Print a question as the run's first evaluation answered it and as its last one did; nothing unless there are two.

    Raises:
        RunError, OSError: if the episodes of an evaluation cannot be read.
    """
    steps = folder.evaluated_steps()
    if len(steps) > 1:
        # All questions were asked after a run whose evaluations on the way asked fewer.
        last_one = steps[-1] if folder.read_evaluation("after") is None else "after"
        first, last = (read_trajectories(folder.evaluated_file(which)) for which in (steps[0], last_one))
        show_change(first, last, console)


def show_run(path: Path, console: Console) -> None:
    """Print how far a run came, its scores by evaluation, a question before and after, and where its error lies if it failed.

    Raises:
        RunError: if there is no run, or what it has is damaged.
        OSError: if a file of it cannot be read.
    """
    folder = open_run(path)
    history = History.of(folder.read_metrics())
    reward = f", reward {history.means[-1]:.3f} over the last {WINDOW}" if history.means else ""
    _tell(console, "steps", f"{history.steps[-1] if history.steps else 0}{reward}")
    scores = {f"step {step}": evaluation for step, evaluation in read_evaluations(folder).items()}
    columns = scores | {"after": read_evaluation(folder, "after"), "ceiling": read_ceiling(folder)}
    if any(columns.values()):
        console.print(evaluation_table(path.resolve().name, columns))
    else:
        _tell(console, "scores", "no evaluation")
    best = best_checkpoint(folder, folder.read_config().evaluation.best)
    if best is not None:
        _tell(console, "best", str(best))
    ending = folder.read_ending()
    if ending is not None:
        _tell(console, "ended", ending_line(ending))
    for back in folder.read_roll_backs():
        _tell(console, "rolled back", f"from step {back['after']} to {back['to']}: {back['reason']}")
    show_learned(folder, console)
    if (folder.path / "error.txt").is_file():
        _tell(console, "failed", f"the traceback is in {folder.path / 'error.txt'}")


def ending_line(ending: Mapping[str, Any]) -> str:
    """Say in words what `RunFolder.read_ending` found."""
    after, kept = ending["after_step"], ending["kept_step"]
    return f"after step {after}: {ending['reason']}" + (
        "" if kept == after else f"; it left the weights of step {kept}"
    )


def finish(folder: RunFolder, console: Console) -> None:
    """Show what a run that has just ended came to: the question, the picture and where everything lies.

    The run is whole whatever happens here: what cannot be shown is named, with what to do.
    """
    try:
        show_learned(folder, console)
    except (RunError, OSError) as error:
        _tell(console, "question", f"none shown: {error}")
    try:
        picture = str(plot(folder.path, None))
    except ModuleNotFoundError as error:
        reason = missing_extra(error)
        if reason is None:
            raise
        picture = f"none drawn: {reason}; then: agentrl runs plot {folder.path}"
    except (RunError, OSError) as error:
        picture = f"none drawn: {error}"
    _tell(console, "picture", picture)
    _tell(console, "run folder", str(folder.path))
    _tell(console, folder.trained.name, str(folder.trained))


def _tell(console: Console, label: str, text: str) -> None:
    console.print(f"{label:<10}  {text}", highlight=False, markup=False, soft_wrap=True)
