"""What the trainer tells and is told between the steps of TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from agentrl.training.checkpoints import set_rate
from agentrl.training.loop import TrainSettings

if TYPE_CHECKING:
    from agentrl.training.session import TrainingSession


def is_evaluated(settings: TrainSettings, step: int) -> bool:
    """Tell whether the weights after `step` steps are evaluated before the next step."""
    every = settings.config.evaluation.every
    due = every is not None and 0 < step < settings.config.training.steps and step % every == 0
    return due and bool(settings.evaluation)


class StepCallback(TrainerCallback):
    """Tells the session how far TRL is within a step."""

    def __init__(self, session: TrainingSession) -> None:
        self._session = session

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._session.begin_update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        # TRL also logs a summary when training ends.
        if "loss" in logs:
            self._session.record(logs)


class SavingCallback(TrainerCallback):
    """Has a checkpoint written of each step whose weights are evaluated."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, updates = divmod(state.global_step, args.logging_steps)
        # An update of many on a batch is no step.
        if not updates and is_evaluated(self._settings, step):
            control.should_save = True


class RateCallback(TrainerCallback):
    """Sets the learning rate once a checkpoint is read, which holds the rate that it was made with."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        set_rate(found["optimizer"], found["lr_scheduler"], self._rate)
