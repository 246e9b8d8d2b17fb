"""The trainer's process under Ray Train, as the driver sees it: started early, told to begin, followed, and stopped."""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from agentrl.config import Config
from agentrl.data.stream import QuestionStream
from agentrl.progress import OnProgress
from agentrl.rollout.pool import RolloutPool
from agentrl.runs import RunFolder
from agentrl.runs.logs import process_name
from agentrl.training.loop import TrainerError, TrainSettings, train_loop
from agentrl.types import AgentRLError, Question

if TYPE_CHECKING:
    from ray.train.v2.api.exceptions import TrainingFailedError

# The trainer waits when the driver is so many events behind.
_EVENTS = 1000
# Processes wait for the first one while it waits for a rollout, or for an evaluation. Ray Train notices those that died.
_COLLECTIVE_SECONDS = 7 * 24 * 3600
# An optimizer's state of some gigabytes on a slow disk, after what is left of a micro-batch.
_SAVE_SECONDS = 300.0

_log = logging.getLogger(__name__)


def environment(device: str) -> dict[str, str]:
    """Return the environment variables that the trainer's process needs from its start."""
    # Packs differ in length, and of segments that cannot grow the allocator keeps one for each length that it met.
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if device == "cuda" else {}


class TrainerProcess:
    """A trainer that loads its libraries, model and adapter while the engines come up, and trains when it is told to."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        questions: QuestionStream,
        evaluation: Sequence[Question],
        *,
        resume: bool,
    ) -> None:
        """Start nothing yet; Ray need not run. The arguments are those of `TrainSettings`."""
        self._config, self._folder, self._resume = config, folder, resume
        self._questions, self._evaluation = questions, evaluation
        self._storage: Path = folder.path / "ray_train"
        self._training: Future[Any] | None = None
        self._events: Any = None
        self._orders: Any = None

    def start(self) -> None:
        """Start the process, which needs Ray, and return at once."""
        # Ray Train asks Ray's dashboard for its own state every second, and there is no dashboard here.
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"
        # One more process, which looks for machines that are about to be taken away; the run ends there either way.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        # Beside engines that start, a process takes its time. Its default is a minute.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self._config.start_seconds)
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.util.queue import Queue

        from agentrl.training.cards import OwnCards

        self._events, self._orders = Queue(maxsize=_EVENTS), Queue()
        settings = TrainSettings(
            self._config, self._folder, self._questions, self._events, self._resume, self._orders, self._evaluation
        )
        gpus = self._config.trainer_gpus
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"settings": settings},
            torch_config=OwnCards(timeout_s=_COLLECTIVE_SECONDS),
            scaling_config=ScalingConfig(
                num_workers=self._config.training.workers,
                use_gpu=gpus > 0,
                resources_per_worker={"GPU": gpus} if gpus else None,
            ),
            run_config=RunConfig(
                name="run",
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": environment(self._config.device) | process_name("trainer")},
            ),
        )
        # In the main thread Ray Train would answer Ctrl-C itself, and end the trainer before it has saved its state.
        self._training = _in_thread(trainer.fit)

    def check(self) -> None:
        """Raise what ended the process, if it was started and has ended before it was told to begin."""
        if self._training is not None and self._training.done():
            self._result()
            raise AgentRLError("the trainer's process ended before it was told to begin")

    def train(self, pool: RolloutPool, on_progress: OnProgress, tell: Callable[[str], None]) -> None:
        """Have the process train on episodes of `pool`, hand on what it tells, and return when it has taken its last step.

        Whatever is raised meanwhile in this process makes the trainer save the state of its last whole step first.

        Args:
            pool: nobody else samples from it until this returns.
            on_progress: is called with what the trainer tells.
            tell: is called with a line about how stopping goes.

        Raises:
            AgentRLError: if the training failed.
        """
        try:
            self._orders.put(pool)
            self._relay(on_progress)
            self._result()
        except (KeyboardInterrupt, SystemExit):
            tell("stopping: the trainer saves its state; a second signal ends the run at once")
            tell(self._stop())
            raise
        except BaseException:
            if not self._training.done():
                _log.error("stopped by an error of the driver: %s", self._stop())
            raise

    def close(self) -> None:
        """Remove what Ray Train has written, which only repeats the run folder."""
        shutil.rmtree(self._storage, ignore_errors=True)

    def _relay(self, on_progress: OnProgress, seconds: float = math.inf) -> None:
        """Hand on what the trainer tells until its training is over and everything is told, or `seconds` have passed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self._training.done() and self._events.empty():
                    return
                progress = self._events.get(timeout=0.1)
            except Empty:
                continue
            except RayError:
                # The queue died with the cluster, and so does the training.
                return
            on_progress(progress)

    def _result(self) -> None:
        """Wait for the training to end, and raise what made it fail."""
        from ray.train.v2.api.exceptions import TrainingFailedError

        try:
            self._training.result()
        except TrainingFailedError as error:
            raise _cause(error) from _TrainerTraceback(error)

    def _stop(self) -> str:
        """Ask the trainer to save its state, wait until it has, and return what it says."""
        try:
            self._orders.put(None)
            # The trainer would wait for ever for room in a full queue.
            self._relay(lambda progress: None, _SAVE_SECONDS)
            error = self._training.exception(timeout=0)
        except (RayError, TimeoutError) as problem:
            return f"the trainer does not answer ({type(problem).__name__}); --resume continues after the latest checkpoint"
        return "the training had ended" if error is None else str(_cause(error))


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
