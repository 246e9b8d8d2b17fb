"""A training run from a config to a run folder: evaluate, train under Ray Train, evaluate again."""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from agentrl.adapters import WEIGHTS, adapter_folder, check_tensors, read_adapter
from agentrl.config import Config, ConfigError
from agentrl.data.inputs import check_index, describe_inputs, evaluation_questions, file_sha256, read_set
from agentrl.data.stream import QuestionStream
from agentrl.engines import require_trainable
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.models import model_on_disk
from agentrl.progress import OnProgress, Progress
from agentrl.rollout.cluster import cluster
from agentrl.rollout.pool import RolloutPool
from agentrl.runs import RunFolder
from agentrl.runs.logs import logged, process_name
from agentrl.training.loop import TrainerError, TrainSettings, train_loop
from agentrl.types import AgentRLError, Question

if TYPE_CHECKING:
    from ray.train.v2.api.exceptions import TrainingFailedError

# The trainer waits when the driver is so many events behind.
_EVENTS = 1000
# An optimizer's state of some gigabytes on a slow disk, after what is left of a micro-batch.
_SAVE_SECONDS = 300.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The questions of a run: those it trains on, in their order, and the evaluation set."""

    questions: QuestionStream
    evaluation: list[Question]


def load_inputs(config: Config) -> Inputs:
    """Read and check everything that a run needs from disk, before anything is started.

    Raises:
        AgentRLError: for whatever is missing or unsound, in one message.
        RetrieverError: if the index is missing or damaged.
    """
    config.require("training", "retriever")
    if not config.data.train:
        raise ConfigError(f"config {config.name!r}: data.train names no question set")
    require_trainable(config)
    _check_adapter(config)
    check_index(config)
    return Inputs(
        questions=QuestionStream([(read_set(config.data, s), s.weight) for s in config.data.train], config.seed),
        evaluation=evaluation_questions(config.data),
    )


def _check_adapter(config: Config) -> None:
    """Raise ModelError unless the adapter to start from is there and fits the model, as far as that is on this disk."""
    start = adapter_folder(config)
    model = None if start is None else model_on_disk(config.model.path)
    if start is not None and model is not None:
        check_tensors(start, str(model))


def check_device(config: Config) -> None:
    """Raise ConfigError if the config wants GPUs and this machine, which is to run it, has none."""
    if config.device == "cpu" or config.ray.address is not None:
        return
    import torch

    if not torch.cuda.is_available():
        instead = f"; on a CPU use --config {config.cpu_config}" if config.cpu_config else ""
        raise ConfigError(
            f"config {config.name!r} asks for device cuda and this machine has no GPU{instead}, or name a cluster that "
            "has GPUs with ray.address"
        )


def train(
    config: Config, *, resume: bool, on_progress: OnProgress
) -> tuple[RunFolder, Evaluation | None, Evaluation | None]:
    """Run `config` from its first step, or with `resume` from its latest checkpoint, and return folder and evaluations.

    SIGTERM, Ctrl-C and an exception of `on_progress` make the trainer save the state of its last whole step first; another
    signal meanwhile ends the run at once.

    Raises:
        AgentRLError: if anything of the run fails; the folder keeps what was done, to resume from, and the traceback in
            error.txt.
        RetrieverError: if the index is missing or damaged.
    """
    check_device(config)
    inputs = load_inputs(config)
    described = describe_inputs(config)
    start = adapter_folder(config)
    if start is not None:
        described["model.adapter"] = {"path": str(start), "sha256": file_sha256(start / WEIGHTS)}
    folder, done = RunFolder.reopen(config, described) if resume else (RunFolder.create(config, described), 0)
    with closing(folder), logged(folder.path):
        before, after = _Run(config, folder, inputs, resume, done, _logging(on_progress)).go()
    return folder, before, after


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose folder is open, with `done` steps behind it."""

    config: Config
    folder: RunFolder
    inputs: Inputs
    resume: bool
    done: int
    on_progress: OnProgress

    def go(self) -> tuple[Evaluation | None, Evaluation | None]:
        """Start the cluster, evaluate, train, evaluate again, and return both evaluations."""
        config, settings = self.config, self.config.evaluation
        if self.folder.changes:
            self._tell(self.done, f"continuing with {'; '.join(self.folder.changes)}")
        recorded = self.folder.read_evaluation(0)
        before = None if recorded is None else Evaluation.from_dict(recorded)
        after = None
        with cluster(
            config, lambda phase: self._tell(self.done, f"starting {phase}"), trains=True, logs=self.folder.logs
        ) as running:
            if settings.before and self.inputs.evaluation and before is None:
                start = adapter_folder(config)
                if start is not None:
                    running.pool.publish(0, read_adapter(start))
                before = self._evaluate(running.pool, 0)
            if self.done < config.training.steps or not self.folder.adapter.exists():
                self._fit(running.pool)
            if settings.after and self.inputs.evaluation:
                # The last step's weights were not published, and after a resume of a finished run none were.
                running.pool.publish(config.training.steps, read_adapter(self.folder.adapter))
                after = self._evaluate(running.pool, config.training.steps)
        return before, after

    def _evaluate(self, pool: RolloutPool, step: int) -> Evaluation:
        total = len(self.inputs.evaluation)
        self.on_progress(Progress(step, "evaluation", 0, total))
        result = evaluate(
            pool,
            self.inputs.evaluation,
            max_failed_share=self.config.rollout.max_failed_share,
            on_episodes=lambda episodes: self.folder.write_evaluated(step, episodes),
            on_done=lambda done: self.on_progress(Progress(step, "evaluation", done, total)),
            on_stall=lambda message: self._tell(step, message),
        )
        self.folder.write_evaluation(step, result.to_dict())
        return result

    def _fit(self, pool: RolloutPool) -> None:
        """Run the training loop in a process of Ray Train, show its progress, and end it in good order whatever happens."""
        # Ray Train asks Ray's dashboard for its own state every second, and there is no dashboard here.
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
        from ray.util.queue import Queue

        events, stop = Queue(maxsize=_EVENTS), Queue(maxsize=1)
        settings = TrainSettings(self.config, self.folder, pool, self.inputs.questions, events, self.resume, stop)
        storage = self.folder.path / "ray_train"
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"settings": settings},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=self.config.device == "cuda"),
            run_config=RunConfig(
                name="run",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": process_name("trainer")},
            ),
        )
        self._tell(self.done, "starting trainer")
        # In the main thread Ray Train would answer Ctrl-C itself, and end the trainer before it has saved its state.
        training = _in_thread(trainer.fit)
        try:
            _relay(events, training, self.on_progress)
            training.result()
        except TrainingFailedError as error:
            raise _cause(error) from _TrainerTraceback(error)
        except (KeyboardInterrupt, SystemExit):
            self._tell(self.done, "stopping: the trainer saves its state; a second signal ends the run at once")
            self._tell(self.done, _stop(training, events, stop))
            raise
        except BaseException:
            _log.error("stopped by an error of the driver: %s", _stop(training, events, stop))
            raise
        finally:
            # What Ray Train keeps there only repeats the run folder.
            shutil.rmtree(storage, ignore_errors=True)

    def _tell(self, step: int, message: str) -> None:
        self.on_progress(Progress(step, message, 0, 0))


def _logging(on_progress: OnProgress) -> OnProgress:
    """Return an `on_progress` that also logs each new phase and step."""
    last = ""

    def tell(progress: Progress) -> None:
        nonlocal last
        if progress.phase != last:
            last = progress.phase
            _log.info("step %d: %s", progress.step, last)
        on_progress(progress)

    return tell


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a daemon thread, since a pool's threads would be waited for when the process ends."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001, whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=call, name="ray-train", daemon=True).start()
    return future


def _relay(events: Any, training: Future[Any], on_progress: OnProgress, seconds: float = math.inf) -> None:
    """Hand on what the trainer tells until its training is over and everything is told, or `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if training.done() and events.empty():
                return
            progress = events.get(timeout=0.1)
        except Empty:
            continue
        except RayError:
            # The queue died with the cluster, and so does the training.
            return
        on_progress(progress)


def _stop(training: Future[Any], events: Any, stop: Any) -> str:
    """Ask the trainer to save its state, wait until it has, and return what it says."""
    try:
        stop.put("stop")
        # The trainer would wait for ever for room in a full queue.
        _relay(events, training, lambda progress: None, _SAVE_SECONDS)
        error = training.exception(timeout=0)
    except (RayError, TimeoutError) as problem:
        return f"the trainer does not answer ({type(problem).__name__}); --resume continues after the latest checkpoint"
    return "the training had ended" if error is None else str(_cause(error))


class _TrainerTraceback(Exception):
    """What happened in the trainer's process, as text, since exceptions lose their tracebacks on the way to another one."""

    def __init__(self, error: TrainingFailedError) -> None:
        super().__init__("\n".join(map(str, _failures(error))) or str(error))


def _cause(error: BaseException) -> BaseException:
    """Return the error that the training loop raised, out of what Ray Train wrapped around it."""
    for failure in _failures(error):
        # What ended the whole process comes as it is.
        raised = failure.error if isinstance(failure, TrainerError) else failure
        if isinstance(raised, (AgentRLError, OSError)):
            return raised
        # Errors of libraries go on for many lines, which error.txt keeps.
        first = str(raised).strip().partition("\n")[0]
        return AgentRLError(f"training failed: {type(raised).__name__}: {first}")
    return error


def _failures(error: BaseException) -> list[BaseException]:
    """Return what the trainer's process failed with; nothing if it is Ray Train itself that failed."""
    return list(getattr(error, "worker_failures", {}).values())
