"""An evaluation of a run: shown while it goes on, and written to the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentrl.config import Config
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.progress import OnProgress, Progress
from agentrl.runs import RunFolder
from agentrl.runs.folder import Evaluated
from agentrl.types import Question

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool


def evaluate_step(
    config: Config,
    folder: RunFolder,
    pool: RolloutPool,
    questions: Sequence[Question],
    step: int,
    on_progress: OnProgress,
    check: Callable[[], None] = lambda: None,
    recorded_as: Evaluated | None = None,
) -> Evaluation:
    """Evaluate the weights that the engines have as those after `step` steps.

    Args:
        config, folder: of the run.
        pool: nobody else samples from it meanwhile.
        questions: what is asked.
        step: how many steps were taken.
        on_progress: is told how far it has come.
        check: is called after each question, and may raise.
        recorded_as: the name of the evaluation in the folder; None for that of its step.

    Raises:
        EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
        OSError: if the results cannot be written.
    """
    name = step if recorded_as is None else recorded_as
    settings = config.evaluation
    total = len(questions) * settings.samples

    def on_done(done: int) -> None:
        on_progress(Progress(step, "evaluation", done, total))
        check()

    on_progress(Progress(step, "evaluation", 0, total))
    result = evaluate(
        pool,
        questions,
        max_failed_share=config.rollout.max_failed_share,
        temperature=settings.temperature,
        samples=settings.samples,
        on_episodes=lambda episodes: folder.write_evaluated(name, episodes),
        on_done=on_done,
        on_stall=lambda message: on_progress(Progress(step, message, 0, 0)),
    )
    folder.write_evaluation(name, result.to_dict())
    return result
