"""Supervised training of a LoRA adapter on the model's own tokens of recorded episodes, with TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from agentrl.config import Config
from agentrl.models import load_tokenizer, resolve_model
from agentrl.progress import OnProgress, Progress
from agentrl.training.adapter import load_adapted, save_adapter
from agentrl.types import Trajectory

_NOT_TRAINED = -100
"""The label of a token without a loss, as in torch's cross entropy."""


class OwnTokensTrainer(SFTTrainer):
    """SFTTrainer on single episodes, which are never padded, with logits at the trained tokens only."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean cross entropy of the trained tokens of an optimizer step, of which this episode holds some.

        `num_items_in_batch` is the number of the step's trained tokens; without it, the episode's own are counted.
        """
        labels = inputs["labels"][0]
        # The logits that predict a token stand one position before it.
        before = torch.nonzero(labels[1:] != _NOT_TRAINED).squeeze(1)
        outputs = model(input_ids=inputs["input_ids"], logits_to_keep=before, use_cache=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits[0].float(), labels[before + 1], reduction="sum")
        loss = loss / (len(before) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class ReportSteps(TrainerCallback):
    """Tells `on_progress` of the beginning and of every optimizer step, and keeps the steps' losses."""

    def __init__(self, on_progress: OnProgress) -> None:
        self.losses: list[float] = []
        self._on_progress = on_progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._on_progress(Progress(0, "training", 0, state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self._on_progress(Progress(state.global_step, "training", state.global_step, state.max_steps))


class SupervisedTraining:
    """Trains an adapter on episodes as `config.warmstart` says.

    Attributes:
        tokens: the number of tokens in all episodes, prompts included.
        trained_tokens: of these, the model's own, which have a loss.
    """

    def __init__(self, config: Config, episodes: Sequence[Trajectory], on_progress: OnProgress) -> None:
        rows = [_row(episode) for episode in episodes]
        self.tokens = sum(len(row["input_ids"]) for row in rows)
        self.trained_tokens = sum(label != _NOT_TRAINED for row in rows for label in row["labels"])
        # A fresh adapter is drawn here.
        set_seed(config.seed)
        if config.device == "cpu":
            torch.set_num_threads(config.warmstart.threads)
        model = resolve_model(config.model.path)
        self._scratch = tempfile.TemporaryDirectory()
        self._report = ReportSteps(on_progress)
        self._trainer = OwnTokensTrainer(
            model=load_adapted(config, model),
            args=_sft_config(config, self._scratch.name),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(model),
            callbacks=[self._report],
        )
        # The caller shows progress; TRL would print each step as well.
        self._trainer.remove_callback(PrinterCallback)

    def run(self) -> list[float]:
        """Train, and return the loss of each optimizer step in nats a token."""
        with self._scratch:
            self._trainer.train()
        return self._report.losses

    def save(self, folder: Path) -> None:
        """Save the adapter in fp16."""
        save_adapter(self._trainer.accelerator.unwrap_model(self._trainer.model).half(), folder)


def _sft_config(config: Config, scratch: str) -> SFTConfig:
    settings = config.warmstart
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.batch,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        seed=config.seed,
        use_cpu=config.device == "cpu",
        bf16=config.model.dtype == "bfloat16",
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )


def _row(episode: Trajectory) -> dict[str, list[int]]:
    completion, mask = episode.completion_ids, episode.action_mask
    labels = [token if own else _NOT_TRAINED for token, own in zip(completion, mask, strict=True)]
    return {
        "input_ids": [*episode.prompt_ids, *completion],
        "labels": [_NOT_TRAINED] * len(episode.prompt_ids) + labels,
    }
