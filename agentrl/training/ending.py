"""How training ends: after its last step or before it for want of progress, and with which weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agentrl.config import EvaluationConfig
from agentrl.evaluation.run import read_evaluation
from agentrl.runs import RunFolder
from agentrl.training.checkpoints import rank
from agentrl.training.policy import is_adapted, read_weights, restore_policy, save_policy


class Stalled(Exception):
    """The policy has got no better for `evaluation.patience` evaluations, and training is over."""


def stalled(folder: RunFolder, settings: EvaluationConfig, done: int) -> str | None:
    """Return why a run is over after `done` steps, which its evaluations decide; None if it goes on.

    Raises:
        RunError: if the scores of an evaluation are damaged.
    """
    if settings.patience is None or settings.every is None:
        return None
    steps = [step for step in folder.evaluated_steps() if 0 < step <= done and step % settings.every == 0]
    ranked = [(rank(read_evaluation(folder, step), settings.best), step) for step in steps]
    if not ranked:
        return None
    # Of equal ones the oldest is the best.
    best = max(ranked, key=lambda found: (found[0], -found[1]))[1]
    since = sum(step > best for step in steps)
    if since < settings.patience:
        return None
    worse = "an evaluation was" if since == 1 else f"{since} evaluations in a row were"
    return f"{worse} not better than the one after step {best}"


def write_trained(folder: RunFolder, policy: Any, tokenizer: Any, weights: Any, checkpoint: Path | None) -> None:
    """Write the adapter, or the model with its tokenizer, into the run folder, under another name until it is whole.

    Args:
        folder: of the run.
        policy: what was trained.
        tokenizer: goes with a model.
        weights: of a policy that does not hold all of them itself, as after the last step.
        checkpoint: whose weights are written; None for those of the last step.
    """
    whole = not is_adapted(policy)
    target = folder.model if whole else folder.adapter
    partial = target.with_name(f".{target.name}.part")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    if checkpoint is not None and whole:
        weights = read_weights(checkpoint)
    elif checkpoint is not None:
        restore_policy(policy, checkpoint)
    save_policy(policy, partial, weights)
    if whole:
        tokenizer.save_pretrained(partial)
    partial.replace(target)
