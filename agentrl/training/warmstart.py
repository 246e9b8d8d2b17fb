"""The warm start: demonstrations through the real retriever, then a LoRA adapter trained on the model's own tokens."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.agent.codec import Codec
from agentrl.config import Config, ConfigError, RetrieverConfig
from agentrl.data.questions import read_questions
from agentrl.models import load_tokenizer, resolve_model
from agentrl.training.demonstrations import write_demonstrations
from agentrl.types import Trajectory


@dataclass(frozen=True, slots=True)
class WarmStartResult:
    """What `warm_start` did; written as card.json beside the adapter."""

    demonstrations: int
    searches: dict[int, int]
    tokens: int
    trained_tokens: int
    final_loss: float
    minutes: float


def collect_demonstrations(config: Config, on_done: Callable[[str, int, int], None]) -> list[Trajectory]:
    """Write the demonstrations of every source, each searching its own index.

    `on_done` is called with the source's name, the number written and the number wanted. Lucene runs in this process, so
    call it in one of its own where torch is loaded.

    Raises:
        ConfigError: if a source yields fewer than half of the demonstrations it asks for.
    """
    from retrievers.lucene import LuceneRetriever

    config.require("warmstart")
    base = config.retriever or RetrieverConfig(index="-")
    codec = Codec(load_tokenizer(resolve_model(config.model.path)))
    written: list[Trajectory] = []
    for position, source in enumerate(config.warmstart.sources):
        questions = read_questions(config.data.resolve(source.questions), name=source.name)
        name = source.name or source.questions
        retriever = LuceneRetriever(
            str(config.data.resolve(source.index)), k1=base.k1, b=base.b, threads=base.threads, heap=base.heap
        )
        new = asyncio.run(
            write_demonstrations(
                questions,
                source.count,
                config=config.agent,
                codec=codec,
                retriever=retriever,
                k=base.k,
                seed=config.seed + position,
                on_done=lambda done, name=name, source=source: on_done(name, done, source.count),
            )
        )
        if 2 * len(new) < source.count:
            raise ConfigError(
                f"warmstart.sources.{position}: {len(questions)} questions gave {len(new)} demonstrations, not "
                f"{source.count}; ask for fewer, or check that the index holds their gold passages"
            )
        written += new
    return written


def train_adapter(config: Config, demonstrations: list[Trajectory], on_step: Callable[[int, int, float], None]) -> WarmStartResult:
    """Train the adapter of `config.model.lora` on demonstrations with TRL's SFTTrainer and save it in `warmstart.out`.

    Only the model's tokens are trained. Batches are made of single episodes, so nothing is padded. The adapter is saved
    in fp16, beside card.json. `on_step` is called with the step, the number of steps and the loss.

    Raises:
        ConfigError: if the folder `warmstart.out` exists.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    settings, lora = config.warmstart, config.model.lora
    out = Path(settings.out)
    if out.exists():
        raise ConfigError(f"warmstart.out {out}: exists already; remove it or choose another folder")
    started = time.monotonic()
    set_seed(config.seed)
    if config.device == "cpu":
        torch.set_num_threads(settings.threads)
    model_path = resolve_model(config.model.path)
    rows = [_row(trajectory) for trajectory in demonstrations]

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                on_step(state.global_step, state.max_steps, logs["loss"])

    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, config.model.dtype)),
            args=SFTConfig(
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
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(model_path),
            peft_config=LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            callbacks=[Progress()],
        )
        # TRL logs through the console as well; the caller shows progress.
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = WarmStartResult(
            demonstrations=len(demonstrations),
            searches=dict(sorted(Counter(len(t.searches) for t in demonstrations).items())),
            tokens=sum(len(row["input_ids"]) for row in rows),
            trained_tokens=sum(label != -100 for row in rows for label in row["labels"]),
            final_loss=sum(losses[-10:]) / len(losses[-10:]),
            minutes=(time.monotonic() - started) / 60,
        )
        saved = Path(scratch) / "adapter"
        trainer.model.half().save_pretrained(saved)
        _portable_adapter_config(saved, config.model.path)
        card = {"config": config.model_dump(mode="json"), "result": _as_dict(result)}
        (saved / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        shutil.copytree(saved, out)
    return result


def _row(trajectory: Trajectory) -> dict[str, list[int]]:
    completion, mask = trajectory.completion_ids, trajectory.action_mask
    labels = [token if own else -100 for token, own in zip(completion, mask, strict=True)]
    return {
        "input_ids": [*trajectory.prompt_ids, *completion],
        "labels": [-100] * len(trajectory.prompt_ids) + labels,
    }


def _portable_adapter_config(folder: Path, model: str) -> None:
    """PEFT records the path that the model was loaded from; the adapter travels, so it names the model instead."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = model
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _as_dict(result: WarmStartResult) -> dict[str, Any]:
    return {
        "demonstrations": result.demonstrations,
        "searches": {str(k): v for k, v in result.searches.items()},
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "final_loss": round(result.final_loss, 4),
        "minutes": round(result.minutes, 1),
    }
