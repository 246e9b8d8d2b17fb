"""A training run from a config to a run folder: evaluate, train under Ray Train, evaluate again."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from typing import Any

from ray.exceptions import RayError, RayTaskError

from agentrl.adapters import adapter_folder, read_adapter
from agentrl.config import Config, ConfigError
from agentrl.data.inputs import check_index, evaluation_questions, read_set
from agentrl.data.stream import QuestionStream
from agentrl.engines import require_trainable
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.progress import OnProgress, Progress
from agentrl.rollout.cluster import Cluster, cluster
from agentrl.rollout.pool import RolloutPool
from agentrl.runs import RunFolder
from agentrl.training.loop import TrainSettings, train_loop
from agentrl.types import AgentRLError, Question

# How long a trainer that is asked to stop may take to save its state.
_STOP_SECONDS = 60.0


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
    adapter_folder(config)
    check_index(config)
    return Inputs(
        questions=QuestionStream([(read_set(config.data, s), s.weight) for s in config.data.train], config.seed),
        evaluation=evaluation_questions(config.data),
    )


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

    Raises:
        AgentRLError: if anything of the run fails; the folder keeps what was done, to resume from.
        RetrieverError: if the index is missing or damaged.
    """
    check_device(config)
    inputs = load_inputs(config)
    folder, done = RunFolder.reopen(config) if resume else (RunFolder.create(config), 0)
    settings = config.evaluation
    recorded = folder.read_evaluation(0)
    before = None if recorded is None else Evaluation.from_dict(recorded)
    after = None
    with cluster(config, lambda phase: on_progress(Progress(done, f"starting {phase}", 0, 0)), trains=True) as running:
        if settings.before and inputs.evaluation and before is None:
            start = adapter_folder(config)
            if start is not None:
                running.pool.publish(0, read_adapter(start))
            before = _evaluate(config, running.pool, inputs.evaluation, folder, 0, on_progress)
        if done < config.training.steps or not folder.adapter.exists():
            _fit(config, folder, running, inputs.questions, resume, on_progress)
        if settings.after and inputs.evaluation:
            # The last step published its adapter; after a resume of a finished run the engines have none yet.
            running.pool.publish(config.training.steps, read_adapter(folder.adapter))
            after = _evaluate(config, running.pool, inputs.evaluation, folder, config.training.steps, on_progress)
    return folder, before, after


def _evaluate(
    config: Config, pool: RolloutPool, questions: list[Question], folder: RunFolder, step: int, on_progress: OnProgress
) -> Evaluation:
    total = len(questions)
    on_progress(Progress(step, "evaluation", 0, total))
    result = evaluate(
        pool,
        questions,
        max_failed_share=config.rollout.max_failed_share,
        on_done=lambda done: on_progress(Progress(step, "evaluation", done, total)),
        on_stall=lambda message: on_progress(Progress(step, message, 0, 0)),
    )
    folder.write_evaluation(step, result.to_dict(), result.trajectories)
    return result


def _fit(
    config: Config,
    folder: RunFolder,
    running: Cluster,
    questions: QuestionStream,
    resume: bool,
    on_progress: OnProgress,
) -> None:
    """Run the training loop in a Ray Train worker and relay its progress; who stops this process stops the trainer first.

    Raises:
        AgentRLError, OSError: whatever ended the training before its last step.
    """
    # Ray Train asks Ray's dashboard for its own state every second, and there is no dashboard here.
    os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    events, stop = Queue(), Queue()
    storage = folder.path / "ray_train"
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"settings": TrainSettings(config, folder, running.pool, questions, events, resume, stop)},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=config.device == "cuda"),
        run_config=RunConfig(name="run", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)),
    )
    on_progress(Progress(0, "starting trainer", 0, 0))
    ended: Future[None] = Future()
    # In the main thread Ray Train would take Ctrl-C for itself and kill the trainer before it has saved anything.
    threading.Thread(target=_settle, args=(ended, trainer.fit), name="ray-train", daemon=True).start()
    try:
        _relay(events, ended, on_progress)
    except BaseException as error:
        with suppress(RayError):
            stop.put(None)
            _relay(events, ended, lambda progress: None, _STOP_SECONDS)
        # Where this process was stopped, what the trainer says at its end tells where its state is.
        if isinstance(error, Exception) or not ended.done():
            raise
    finally:
        # What Ray Train keeps there only repeats the run folder.
        shutil.rmtree(storage, ignore_errors=True)
    if error := ended.exception():
        raise _cause(error) from error


def _settle(ended: Future[None], call: Callable[[], Any]) -> None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001, it is raised where the future is read
        ended.set_exception(error)
    else:
        ended.set_result(None)


def _relay(events: Any, ended: Future[None], on_progress: OnProgress, seconds: float = math.inf) -> None:
    """Hand on what the trainer says until it has ended, or `seconds` are over."""
    end = time.monotonic() + seconds
    while not (ended.done() and events.empty()) and time.monotonic() < end:
        try:
            on_progress(events.get(timeout=0.5))
        except Empty:
            continue
        except RayError:
            # The queue died with the cluster, so nothing more will come; the trainer's own end follows.
            return


def _cause(error: BaseException) -> BaseException:
    """Return the error that the training loop raised, out of what Ray Train wrapped around it."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = failure.as_instanceof_cause() if isinstance(failure, RayTaskError) else failure
        cause = getattr(cause, "cause", cause)
        if isinstance(cause, (AgentRLError, OSError)):
            return cause
        return AgentRLError(f"training failed: {cause.__class__.__name__}: {cause}")
    return error
