"""Which checkpoint of a run is the best one, and which one to go back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from agentrl.evaluation.run import Evaluation, read_evaluation
from agentrl.runs import RunFolder, checkpoint_step
from agentrl.runs.checkpoints import damage

Score = Literal["exact_match", "f1"]
"""The score that decides which checkpoint is the best, see `EvaluationConfig.best`."""


def rank(evaluation: Evaluation, score: Score) -> tuple[float, float]:
    """Return what evaluations are compared by: the mean over sets of `score`, then of the other one."""
    return (evaluation.em, evaluation.f1) if score == "exact_match" else (evaluation.f1, evaluation.em)


def best_checkpoint(folder: RunFolder, score: Score, until: int | None = None) -> Path | None:
    """Return the checkpoint whose evaluation is the best, of those after at most `until` steps; None if none was evaluated.

    The best has the highest `rank`; of several it is the oldest.

    Raises:
        RunError: if the scores of an evaluation are damaged.
    """
    found = []
    for path in folder.complete_checkpoints():
        step = checkpoint_step(path)
        evaluation = read_evaluation(folder, step) if until is None or step <= until else None
        if evaluation is not None:
            found.append((rank(evaluation, score), -step, path))
    return max(found)[-1] if found else None


def step_to_go_back_to(folder: RunFolder, score: Score, until: int) -> int:
    """Return the step of the best checkpoint after at most `until` steps, else of the newest of these, else 0.

    A checkpoint that is not as it was written does not count.

    Raises:
        RunError: if the scores of an evaluation are damaged.
    """
    best = best_checkpoint(folder, score, until)
    if best is not None and damage(best) is None:
        return checkpoint_step(best)
    older = (path for path in folder.complete_checkpoints() if checkpoint_step(path) <= until)
    return next((checkpoint_step(path) for path in older if damage(path) is None), 0)


def learning_rate(configured: float, folder: RunFolder) -> float:
    """Return the learning rate of a run: half of what is configured for each time that it went back."""
    return configured * 0.5 ** len(folder.read_roll_backs())


def set_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Set the rate that `scheduler` schedules, a LambdaLR, wherever it is in its schedule. A checkpoint holds the old one."""
    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, now in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = rate, now
