"""The trainer's side of a run. One step: publish weights, take a batch, train on it, record it.

TRL drives the steps. `TrainingSession.next_batch` is where a step begins, `TrainingSession.record` where it ends.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayError
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from agentrl.evaluation.run import read_evaluation
from agentrl.models import load_tokenizer, resolve_model
from agentrl.progress import Progress
from agentrl.quantization import check_quantization
from agentrl.rollout.pool import RolloutPool
from agentrl.runs import checkpoint_step, read_trajectories
from agentrl.training.callbacks import RateCallback, SavingCallback, StepCallback, is_evaluated
from agentrl.training.checkpoints import best_checkpoint, learning_rate, step_to_go_back_to
from agentrl.training.ending import Stalled, stalled, write_trained
from agentrl.training.evaluating import evaluate_step
from agentrl.training.loggers import Loggers
from agentrl.training.loop import TrainSettings
from agentrl.training.memory import peak_bytes
from agentrl.training.policy import engine_files, frozen_copy, is_adapted, load_policy
from agentrl.training.prefetch import Prefetch
from agentrl.training.ranks import ALONE, FirstRankFailed, Ranks
from agentrl.training.sampling import ScoredBatch, StepSampler
from agentrl.training.settings import make_scorer, run_additions, run_optimizer, run_settings, run_updates
from agentrl.training.sharded import ShardedTrainer
from agentrl.training.trainer import StratifiedTrainer
from agentrl.training.watch import CollapseError, RollBack, Watch, forecast
from agentrl.types import AgentRLError


class TrainingFailed(AgentRLError):
    """Training ended before its last step; the message says why, and where the state of the last whole step is."""


class TrainingStopped(AgentRLError):
    """The trainer was asked to stop."""


class TrainingSession:
    """Trains one run from its first step, or from its latest checkpoint, to its last."""

    def __init__(self, settings: TrainSettings, ranks: Ranks = ALONE) -> None:
        """Load policy and data; nothing is sampled or trained before `run`.

        This is the first of `ranks`; the others `follow`.
        """
        config, folder, training = settings.config, settings.folder, settings.config.training
        self._settings, self._config, self._folder = settings, config, folder
        self._episodes = config.rollout.group_size * config.rollout.questions_per_step
        self._checkpoint = start_of(settings)
        done = checkpoint_step(self._checkpoint) if self._checkpoint else 0
        # Both come when training begins.
        self._pool: RolloutPool | None = None
        self._sampler: StepSampler | None = None
        self._watch: Watch | None = None
        self._prefetch = Prefetch(self._sample, done + 1, training.steps, config.rollout.max_staleness)
        self._waits_for_batch = threading.Event()
        self._stopping = threading.Event()
        # What the watch found to end the run for, before the next step begins.
        self._collapse: str | None = None
        # False while the optimizer changes the weights and until the step is recorded.
        self._whole = True
        self._generators = _generators()
        self._trainer = make_trainer(
            settings, ranks, sample=self.next_batch, on_trained=self.trained, callbacks=[StepCallback(self)]
        )
        # Last, because they tell things at the step that the trainer has come to.
        self._loggers = Loggers(config, folder, self._tell, first_step=done + 1)

    @property
    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def step(self) -> int:
        """The number of steps that were taken: batches that were trained on to the end."""
        return self._trainer.batches

    def run(self) -> None:
        """Wait for the order to begin, train to the last step and write what was trained.

        Raises:
            TrainingFailed: if that did not work out or somebody asked to stop. The state of the last whole step is kept.
        """
        try:
            self._begin()
            reason = self._take_steps()
            self.save_policy(reason)
            self._wake_engines()
        except RollBack:
            # Of the state that it leaves nothing is needed.
            raise
        except Exception as error:
            # A traceback may follow the first line; all of it stays in the chain of exceptions.
            reason = str(error).strip().partition("\n")[0]
            if not isinstance(error, AgentRLError):
                reason = f"{type(error).__name__}: {reason}"
            raise TrainingFailed(f"{reason}; {self.keep_state()}") from error
        except BaseException as error:
            # Whoever ends the process this way reads no message.
            error.add_note(self.keep_state())
            raise
        finally:
            self._loggers.close()

    def _begin(self) -> None:
        """Wait for the pool to sample from, and from then on for the order to stop."""
        self._pool = self._settings.orders.get()
        if self._pool is None:
            raise TrainingStopped("the training was stopped before it began")
        history = self._folder.read_metrics()
        self._watch = Watch(self._config.training.watch, history)
        before = read_evaluation(self._folder, 0)
        if before is not None and not history:
            self._loggers.log_evaluation(0, before, read_trajectories(self._folder.evaluated_file(0)))
            self._forecast(before.em, "the exact match before training,")
        self._sampler = StepSampler(
            self._config,
            self._pool,
            self._settings.questions,
            on_batch=self._folder.append_trajectories,
            on_done=self._show_rollout,
            on_stall=lambda message: self._show(message, 0, 0),
            history=history,
        )
        threading.Thread(target=self._await_stop, name="stop", daemon=True).start()

    def _take_steps(self) -> str:
        """Train until no more steps are to be taken, and return why."""
        try:
            self._trainer.train(resume_from_checkpoint=str(self._checkpoint) if self._checkpoint else None)
        except Stalled as end:
            self._tell(f"step {self.step}: {end}; training ends here, as evaluation.patience says")
            return str(end)
        return "its last step was taken"

    # One step, in the order in which it happens.

    def next_batch(self) -> ScoredBatch:
        """Publish the weights that the step before left, and return the batch to train on.

        Raises:
            CollapseError, RollBack: if the watch found a collapse in the step before, and the run is to end for that.
            Stalled: if evaluations say that the steps before were the last ones.
        """
        if self._collapse is not None:
            self._end_for(self._collapse)
        self._check_progress()
        started = time.monotonic()
        self._wake_engines()
        # Engines run one stream at a time, and these weights must be evaluated before others are published.
        evaluates = self.evaluates and self._folder.read_evaluation(self.step) is None
        with self._prefetch.paused() if evaluates else nullcontext():
            self.publish()
            published = time.monotonic()
            if evaluates:
                self._evaluate()
                self._check_progress()
        waiting = time.monotonic()
        self._waits_for_batch.set()
        batch = self._prefetch.take(self.step + 1)
        self._waits_for_batch.clear()
        self.check_stop()
        if self._config.engine.sleep:
            self._pool.sleep()
        batch.metrics.update(
            {
                "seconds/publish": published - started,
                "seconds/wait": time.monotonic() - waiting,
                **self._pool.counters,
            }
        )
        return batch

    def publish(self) -> None:
        """Load the weights into every engine, as the version of the steps that were taken."""
        # Where all weights are trained, the first version is the model that the engines have begun with.
        if self.step or is_adapted(self._policy):
            self._pool.publish(self.step, engine_files(self._config, self._policy, self._trainer.weights))
        self._prefetch.published(self.step)

    def _wake_engines(self) -> None:
        if self._config.engine.sleep:
            # What the allocator keeps for later is what they take back.
            torch.cuda.empty_cache()
            self._pool.wake()

    def trained(self, episodes: int) -> None:
        """Show how much of a pass over the batch is done."""
        self._show("train", episodes, self._episodes)
        self.check_stop()

    def begin_update(self) -> None:
        """Take note that the optimizer is about to change the weights."""
        self._whole = False

    def record(self, logs: Mapping[str, Any]) -> None:
        """Write and show the metrics of the step that was taken. A metric that is not finite is left out: JSON has none."""
        metrics = {
            name: value for name, value in logs.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        metrics["tokens_per_second/train"] = metrics["tokens/trained"] / metrics["seconds/train"]
        metrics["memory/trainer_gib"] = peak_bytes(self._config.device) / 2**30
        self._folder.append_metrics(self.step, metrics)
        self._whole = True
        # TRL draws the order of the next batch from them, and may be cut off after that.
        self._generators = _generators()
        self._loggers.log(self.step, metrics)
        self._show("step", self.step, self._config.training.steps, metrics)
        self._look_for_collapse(metrics)

    # What is looked at between steps.

    @property
    def evaluates(self) -> bool:
        """Whether the weights after the steps that were taken are evaluated before the next; the last step's are not."""
        return is_evaluated(self._settings, self.step)

    def _evaluate(self) -> None:
        settings = self._settings
        result = evaluate_step(
            self._config, self._folder, self._pool, settings.evaluation, self.step, settings.events.put, self.check_stop
        )
        self._loggers.log_evaluation(self.step, result)
        so_far = ", the best so far" if _best_step(settings) == self.step else ""
        self._tell(f"step {self.step}: exact match {result.em:.3f}, F1 {result.f1:.3f}{so_far}")

    def _check_progress(self) -> None:
        """Raise Stalled if the evaluations so far end the training."""
        reason = stalled(self._folder, self._config.evaluation, self.step)
        if reason is not None:
            end = Stalled(reason)
            self._prefetch.fail(end)
            raise end

    def _look_for_collapse(self, metrics: Mapping[str, float]) -> None:
        if self.step == 1 and read_evaluation(self._folder, 0) is None:
            # A forecast is about answers, whatever else is rewarded.
            self._forecast(metrics["correct/share"], "the share of right answers in the first step,")
        found = self._watch.see(metrics)
        for reason in found:
            self._tell(f"step {self.step}: {reason}")
        if found and self._config.training.watch.on_collapse != "warn":
            self._collapse = "; ".join(found)

    def _forecast(self, accuracy: float, source: str) -> None:
        self._tell(forecast(accuracy, self._config.rollout.group_size, source))

    def _end_for(self, reason: str) -> None:
        """Raise what ends the run, or this part of it, for a collapse."""
        watch, backs = self._config.training.watch, len(self._folder.read_roll_backs())
        if watch.on_collapse == "roll_back" and backs < watch.max_roll_backs:
            target = step_to_go_back_to(self._folder, self._config.evaluation.best, self.step - watch.window)
            raise RollBack(reason, self.step, target)
        times = f" after {backs} roll-backs" if backs else ""
        raise CollapseError(f"step {self.step}: {reason}; training.watch.on_collapse ends the run{times}")

    # What is left when training ends.

    def save_policy(self, reason: str) -> None:
        """Write the weights that the run is to leave into its folder, with a note of why training is over."""
        kept = self.step
        if self._config.evaluation.keeps_best and self._settings.evaluation:
            if self._folder.read_evaluation(self.step) is None:
                self._wake_engines()
                self.publish()
                self._evaluate()
            kept = _best_step(self._settings)
        # First, because a run that has a trained policy is over.
        self._folder.write_ending(self.step, kept, reason)
        checkpoint = None if kept == self.step else self._folder.checkpoint(kept)
        tokenizer = self._trainer.processing_class
        write_trained(self._folder, self._policy, tokenizer, self._trainer.weights, checkpoint)
        if checkpoint is not None:
            self._tell(f"the run leaves the weights of step {kept}, its best")

    def keep_state(self) -> str:
        """Save the state of the last whole step, unless a checkpoint has it, and say in words where the newest state is."""
        found = []
        if not self._whole:
            found.append("the step under way had begun to change the weights and is not kept")
        elif self._config.training.shard:
            found.append("the other processes hold their shares of the weights, so that checkpoints alone are kept")
        elif self.step > _step_of(self._folder.latest_checkpoint()):
            try:
                _set_generators(self._generators)
                self._trainer.save_checkpoint()
            except Exception as error:  # noqa: BLE001, what ended the training must not be lost behind it
                found.append(f"the state after step {self.step} cannot be saved: {type(error).__name__}: {error}")
        newest = self._folder.latest_checkpoint()
        if newest is None:
            return "; ".join([*found, "there is no checkpoint yet, and --resume begins at the first step"])
        return "; ".join([*found, f"--resume continues after step {_step_of(newest)}, from {newest}"])

    # Stopping.

    def check_stop(self) -> None:
        """Raise TrainingStopped if somebody asked the trainer to stop."""
        if self._stopping.is_set():
            raise TrainingStopped("the training was stopped")

    def _await_stop(self) -> None:
        try:
            self._settings.orders.get()
        except RayError:
            # The queue ended with the cluster, and this process is about to.
            return
        self._stopping.set()
        self._prefetch.fail(TrainingStopped("the training was stopped"))

    # Progress.

    def _sample(self, step: int) -> ScoredBatch:
        return self._sampler(step, self._episodes)

    def _show(self, phase: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        self._settings.events.put(Progress(self.step, phase, done, total, metrics))

    def _tell(self, notice: str) -> None:
        self._settings.events.put(Progress(self.step, "notice", 0, 0, notice=notice))

    def _show_rollout(self, done: int) -> None:
        # While the trainer trains, that is what is shown, and not the batches that are made ahead.
        if self._waits_for_batch.is_set():
            self._show("rollout", done, self._episodes)


def follow(settings: TrainSettings, ranks: Ranks) -> None:
    """Train beside the first of `ranks`, on what that one samples, to its last step or until it ends.

    Raises:
        AgentRLError: if this process begins with other weights than the first one.
    """
    trainer = make_trainer(settings, ranks, sample=_first_rank_samples, on_trained=lambda episodes: None, callbacks=[])
    # It says by itself why it ended.
    with suppress(FirstRankFailed):
        start = start_of(settings)
        trainer.train(resume_from_checkpoint=str(start) if start else None)


def start_of(settings: TrainSettings) -> Path | None:
    """Return the checkpoint that a run begins with, or None for its first step."""
    return settings.folder.latest_checkpoint() if settings.resume else None


def make_trainer(
    settings: TrainSettings,
    ranks: Ranks,
    *,
    sample: Callable[[], ScoredBatch],
    on_trained: Callable[[int], None],
    callbacks: list[TrainerCallback],
) -> StratifiedTrainer:
    """Load the policy and set up its training; only the first of `ranks` writes checkpoints, to which all add shares.

    Raises:
        AgentRLError: if ranks begin with different weights, or this machine lacks what the configuration wants.
    """
    config, training = settings.config, settings.config.training
    # On a cluster no other process can tell.
    check_quantization(config, trains=True)
    if config.device == "cpu":
        torch.set_num_threads(training.threads)
    # The weights of a fresh adapter are drawn after this.
    set_seed(config.seed)
    model = resolve_model(config.model.path)
    arguments = run_settings(config, settings.folder.checkpoints)
    if ranks.rank and not training.shard:
        arguments.save_strategy = SaveStrategy.NO
    policy = load_policy(config, model)
    if ranks.size > 1 and len(set(ranks.gathered(_digest(policy)))) > 1:
        raise AgentRLError("the trainer's processes begin with different weights; they need the same model and adapter")
    trainer = (ShardedTrainer if training.shard else StratifiedTrainer)(
        model=policy,
        reference=frozen_copy(config, policy),
        processing_class=load_tokenizer(model),
        sample=sample,
        scorer=functools.partial(make_scorer, config),
        updates=run_updates(config),
        additions=run_additions(config),
        optimizer=run_optimizer(config),
        on_trained=on_trained,
        keep_checkpoints=training.keep_checkpoints,
        best=functools.partial(_best_step, settings),
        ranks=ranks,
        args=arguments,
        callbacks=[
            RateCallback(learning_rate(training.learning_rate, settings.folder)),
            *callbacks,
            *([] if ranks.rank and not training.shard else [SavingCallback(settings)]),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _digest(model: torch.nn.Module) -> str:
    """Return what tells whether two processes train the same weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _first_rank_samples() -> ScoredBatch:
    raise RuntimeError("only the first trainer process samples")


def _best_step(settings: TrainSettings) -> int | None:
    best = best_checkpoint(settings.folder, settings.config.evaluation.best)
    return None if best is None else checkpoint_step(best)


def _step_of(checkpoint: Path | None) -> int:
    return checkpoint_step(checkpoint) if checkpoint else 0


def _generators() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the states of torch's random number generators, of the CPU and of each GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_generators(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
