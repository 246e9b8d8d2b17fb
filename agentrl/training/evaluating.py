"""An evaluation of a run: shown while it goes on, and written to the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentrl.config import Config
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.progress import OnProgress, Progress
from agentrl.runs import RunFolder
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
) -> Evaluation:
    """Evaluate the weights that the engines have as those after `step` steps.

    `check`, which may raise, is called after each question; nobody else samples from `pool` meanwhile.

    Raises:
        EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
        OSError: if the results cannot be written.
    """
    total = len(questions)

    def on_done(done: int) -> None:
        on_progress(Progress(step, "evaluation", done, total))
        check()

    on_progress(Progress(step, "evaluation", 0, total))
    result = evaluate(
        pool,
        questions,
        max_failed_share=config.rollout.max_failed_share,
        on_episodes=lambda episodes: folder.write_evaluated(step, episodes),
        on_done=on_done,
        on_stall=lambda message: on_progress(Progress(step, message, 0, 0)),
    )
    folder.write_evaluation(step, result.to_dict())
    return result
