"""The training loop as Ray Train runs it in the trainer's process."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentrl.config import Config
from agentrl.data.stream import QuestionStream
from agentrl.progress import Progress
from agentrl.runs import RunFolder, checkpoint_step
from agentrl.types import AgentRLError, Trajectory

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the trainer's process is given; `events` is a queue for progress."""

    config: Config
    folder: RunFolder
    pool: RolloutPool
    questions: QuestionStream
    events: Any
    resume: bool


def train_loop(loop_config: dict[str, Any]) -> None:
    """Train; `loop_config["settings"]` is a TrainSettings. Runs in Ray Train's worker, hence the imports inside."""
    import torch
    from transformers import TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    from agentrl.models import load_tokenizer, resolve_model
    from agentrl.training.adapter import adapter_files, load_policy
    from agentrl.training.prefetch import Prefetch
    from agentrl.training.sampling import ScoredBatch, StepSampler
    from agentrl.training.trainer import StratifiedTrainer, grpo_config

    settings: TrainSettings = loop_config["settings"]
    config, folder, training = settings.config, settings.folder, settings.config.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard)
    if config.device == "cpu":
        torch.set_num_threads(training.threads)
    checkpoint = folder.latest_checkpoint() if settings.resume else None
    episodes = config.rollout.group_size * config.rollout.questions_per_step
    accumulation = episodes // training.micro_batch
    model_path = resolve_model(config.model.path)

    done = checkpoint_step(checkpoint) if checkpoint else 0
    waiting = threading.Event()

    def tell(phase: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        settings.events.put(Progress(trainer.state.global_step, phase, done, total, metrics))

    def record(step: int, trajectories: Sequence[Trajectory]) -> None:
        folder.append_trajectories(step, trajectories)

    def tell_rollout(finished: int) -> None:
        # What is made ahead goes on behind the training that is shown.
        if waiting.is_set():
            tell("rollout", finished, episodes)

    sampler = StepSampler(
        config,
        settings.pool,
        settings.questions,
        on_batch=record,
        on_done=tell_rollout,
        on_stall=lambda message: tell(message, 0, 0),
        history=folder.read_metrics(),
    )
    prefetch = Prefetch(lambda step: sampler(step, episodes), done + 1, training.steps, config.rollout.max_staleness)

    def next_batch(count: int) -> ScoredBatch:
        if count != episodes:
            raise RuntimeError(f"TRL asks for {count} episodes, and a step has {episodes}")
        started = time.monotonic()
        waiting.set()
        batch = prefetch.take(trainer.state.global_step + 1)
        waiting.clear()
        batch.metrics.update({"seconds/wait": time.monotonic() - started, **settings.pool.counters})
        return batch

    class Spine(TrainerCallback):
        """Publishes the adapter when training begins and after each optimizer step, and records metrics."""

        def __init__(self) -> None:
            self.publish_seconds = 0.0
            self.micro_batches = 0
            self.failure: AgentRLError | None = None

        def _publish(self, version: int) -> None:
            started = time.monotonic()
            settings.pool.publish(version, adapter_files(trainer.accelerator.unwrap_model(trainer.model)))
            self.publish_seconds = time.monotonic() - started
            prefetch.published(version)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._publish(state.global_step)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.micro_batches += 1
            tell("train", self.micro_batches * training.micro_batch, episodes)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.micro_batches = 0
            try:
                self._publish(state.global_step)
            except AgentRLError as error:
                # Raised once the step is recorded, or a resumed run would take its questions again.
                self.failure = error

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            metrics = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            # TRL's step_time holds the wait for the rollout, which it knows nothing of.
            metrics["seconds/train"] = metrics.pop("step_time") - metrics["seconds/wait"]
            metrics["tokens_per_second/train"] = metrics["tokens/trained"] / metrics["seconds/train"]
            metrics["seconds/publish"] = self.publish_seconds
            folder.append_metrics(state.global_step, metrics)
            tell("step", state.global_step, training.steps, metrics)
            if self.failure is not None:
                raise self.failure

    # A fresh adapter is drawn here.
    set_seed(config.seed)
    trainer = StratifiedTrainer(
        model=load_policy(config, model_path),
        processing_class=load_tokenizer(model_path),
        questions=training.steps * config.rollout.questions_per_step,
        llds_weight=training.llds.weight,
        llds_tolerance=training.llds.tolerance,
        # Fresh rollouts need no correction; the difference between engine and trainer is numerical noise.
        importance=(training.importance.mode, training.importance.cap) if config.rollout.max_staleness else None,
        sample=next_batch,
        args=grpo_config(
            output_dir=str(folder.checkpoints),
            per_device_train_batch_size=training.micro_batch,
            gradient_accumulation_steps=accumulation,
            num_generations=config.rollout.group_size,
            max_steps=training.steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            loss_type=training.loss,
            max_completion_length=config.agent.max_episode_tokens,
            beta=training.kl_coefficient,
            temperature=config.agent.temperature,
            gradient_checkpointing=training.gradient_checkpointing,
            bf16=config.model.dtype == "bfloat16",
            use_cpu=config.device == "cpu",
            seed=config.seed,
            save_strategy="steps",
            save_steps=training.checkpoint_every,
            save_total_limit=training.keep_checkpoints,
            report_to=["tensorboard"],
        ),
        callbacks=[Spine()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AgentRLError:
        # The steps that were taken are kept; the optimizer stands between two of them, since what failed is a rollout.
        if trainer.state.global_step > done:
            trainer.save_checkpoint()
        raise
    # Under another name until it is whole: where there is no adapter, a resumed run writes it.
    partial = folder.adapter.with_name(".adapter.part")
    for old in (partial, folder.adapter):
        shutil.rmtree(old, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial, selected_adapters=["default"])
    partial.replace(folder.adapter)
