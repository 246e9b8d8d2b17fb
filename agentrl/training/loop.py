"""What Ray Train runs in the trainer's process, importable without torch."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.config import Config
from agentrl.data.stream import QuestionStream
from agentrl.rollout.devices import check_granted
from agentrl.runs import RunFolder
from agentrl.types import Question


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the trainer's process is given.

    Attributes:
        config, folder, questions: of the run.
        events: a queue that the trainer puts a `Progress` into for each thing that happens.
        resume: whether to go on after the latest checkpoint of `folder`.
        orders: a queue of a RolloutPool, which lets the training begin and is what it samples from, and of None, which asks
            the trainer to save its state and to end.
        evaluation: the questions of evaluations during the training.
    """

    config: Config
    folder: RunFolder
    questions: QuestionStream
    events: Any
    resume: bool
    orders: Any
    evaluation: Sequence[Question] = ()


class TrainerError(Exception):
    """What ended the training: `error`, and as this one's own text its whole traceback.

    On the way to another process an exception loses its traceback and its cause, and Ray Train cuts what it keeps of them.
    """

    def __init__(self, error: BaseException, text: str) -> None:
        super().__init__(error, text)
        self.error, self._text = error, text

    def __str__(self) -> str:
        return self._text


def train_loop(loop_config: dict[str, Any]) -> None:
    """Train as `loop_config["settings"]`, a TrainSettings, says.

    Raises:
        TrainerError: if training ends before its last step, for whatever reason: a RunError if this node does not see the
            run folder, a TrainingFailed once the session runs.
    """
    settings: TrainSettings = loop_config["settings"]
    try:
        # Ray Train starts the trainer on any node, and elsewhere the steps of days would be written where nobody looks.
        settings.folder.check_shared()
        if settings.config.device == "cuda":
            check_granted("the trainer's process", settings.config.trainer_gpus)
        # Here, because the driver imports this module and needs no torch.
        from agentrl.training.ranks import Ranks, hide_ranks
        from agentrl.training.session import TrainingSession, follow

        ranks = Ranks.of_this_process()
        if ranks.size > 1:
            hide_ranks()
        if ranks.rank == 0:
            settings.folder.hold_as_trainer()
            TrainingSession(settings, ranks).run()
        else:
            follow(settings, ranks)
    except BaseException as error:
        raise TrainerError(error, traceback.format_exc()) from error
