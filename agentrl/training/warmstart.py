"""The warm start: demonstrations through the real retriever, then a LoRA adapter trained on the model's own tokens."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agentrl.agent.codec import Codec
from agentrl.config import Config, ConfigError, RetrieverConfig
from agentrl.data.questions import read_questions
from agentrl.models import load_tokenizer, resolve_model
from agentrl.runs import read_trajectories, write_trajectories
from agentrl.training.adapter import lora_config, name_base, save_adapter
from agentrl.training.demonstrations import write_demonstrations
from agentrl.types import AgentRLError, Trajectory
from retrievers.base import RetrieverError


@dataclass(frozen=True, slots=True)
class WarmStartResult:
    """What `warm_start` did; written as card.json beside the adapter."""

    demonstrations: int
    searches: dict[str, int]
    tokens: int
    trained_tokens: int
    final_loss: float
    minutes: float


def warm_start(config: Config, console: Console) -> WarmStartResult:
    """Write demonstrations, train the adapter and save both in `warmstart.out`, showing progress.

    Raises:
        ConfigError: if `warmstart.out` exists, or a source yields too few demonstrations.
        RetrieverError: if an index is missing.
    """
    config.require("warmstart")
    out = Path(config.warmstart.out)
    if out.exists():
        raise ConfigError(f"warmstart.out {out}: exists already; remove it or choose another folder")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks = {
            s.name or s.questions: bars.add_task(f"demonstrations {s.name or s.questions}", total=s.count)
            for s in config.warmstart.sources
        }
        demonstrations = _collect_apart(config, lambda name, done, total: bars.update(tasks[name], completed=done))
        # Sources come one after another; training should meet them mixed.
        random.Random(config.seed).shuffle(demonstrations)
        task = bars.add_task("training", total=None)
        result = train_adapter(
            config,
            demonstrations,
            lambda step, steps, loss: bars.update(
                task, completed=step, total=steps, description=f"training, loss {loss:.3f}"
            ),
        )
    console.print(
        f"adapter of {result.demonstrations} demonstrations in {result.minutes:.1f} minutes: {out}", highlight=False
    )
    return result


def _collect_apart(config: Config, on_done: Callable[[str, int, int], None]) -> list[Trajectory]:
    """Collect demonstrations in a process of their own: Java stays out of the one that trains."""
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demonstrations.jsonl.zst"
        process = context.Process(target=_collect_into, args=(config, file, events), daemon=True)
        process.start()
        while process.is_alive() or not events.empty():
            try:
                event = events.get(timeout=0.5)
            except Empty:
                continue
            if isinstance(event, BaseException):
                raise event
            on_done(*event)
        process.join()
        if not file.exists():
            raise AgentRLError(f"the process that writes demonstrations ended with status {process.exitcode}")
        return list(read_trajectories(file))


def _collect_into(config: Config, file: Path, events: Any) -> None:
    try:
        write_trajectories(file, collect_demonstrations(config, lambda *event: events.put(event)))
    except (AgentRLError, RetrieverError, OSError) as error:
        events.put(error)


def collect_demonstrations(config: Config, on_done: Callable[[str, int, int], None]) -> list[Trajectory]:
    """Write the demonstrations of every source, each searching its own index.

    `on_done` is called with the source's name, the number written and the number wanted. Lucene runs in this process, so
    call it in one of its own where torch is loaded.

    Raises:
        ConfigError: if a source yields fewer than half of the demonstrations it asks for.
    """
    from retrievers.backends import open_index

    config.require("warmstart")
    base = config.retriever or RetrieverConfig(index="-")
    codec = Codec(load_tokenizer(resolve_model(config.model.path)))
    written: list[Trajectory] = []
    for position, source in enumerate(config.warmstart.sources):
        questions = read_questions(config.data.resolve(source.questions), name=source.name)
        name = source.name or source.questions
        retriever = open_index(config.data.resolve_index(source.index), **base.options)
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


def train_adapter(
    config: Config, demonstrations: list[Trajectory], on_step: Callable[[int, int, float], None]
) -> WarmStartResult:
    """Train the adapter of `config.model.lora` on demonstrations with TRL's SFTTrainer and save it in `warmstart.out`.

    Only the model's tokens are trained. Batches are made of single episodes, so nothing is padded. The adapter is saved
    in fp16, beside card.json. `on_step` is called with the step, the number of steps and the loss.

    Raises:
        ConfigError: if the folder `warmstart.out` exists.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    settings = config.warmstart
    out = Path(settings.out)
    if out.exists():
        raise ConfigError(f"warmstart.out {out}: exists already; remove it or choose another folder")
    started = time.monotonic()
    set_seed(config.seed)
    if config.device == "cpu":
        torch.set_num_threads(settings.threads)
    model_path = resolve_model(config.model.path)
    rows = [_row(trajectory) for trajectory in demonstrations]

    class OwnTokens(SFTTrainer):
        """SFTTrainer's loss on single episodes, with logits at the trained tokens only."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][0]
            # The logits that predict a token stand one position before it.
            before = torch.nonzero(labels[1:] != -100).squeeze(1)
            outputs = model(input_ids=inputs["input_ids"], logits_to_keep=before, use_cache=False)
            loss = torch.nn.functional.cross_entropy(outputs.logits[0].float(), labels[before + 1], reduction="sum")
            loss = loss / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                on_step(state.global_step, state.max_steps, logs["loss"])

    with tempfile.TemporaryDirectory() as scratch:
        trainer = OwnTokens(
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
            peft_config=lora_config(config),
            callbacks=[Report()],
        )
        # TRL logs through the console as well; the caller shows progress.
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = WarmStartResult(
            demonstrations=len(demonstrations),
            searches={str(n): c for n, c in sorted(Counter(len(t.searches) for t in demonstrations).items())},
            tokens=sum(len(row["input_ids"]) for row in rows),
            trained_tokens=sum(label != -100 for row in rows for label in row["labels"]),
            final_loss=round(sum(losses[-10:]) / len(losses[-10:]), 4),
            minutes=round((time.monotonic() - started) / 60, 1),
        )
        saved = Path(scratch) / "adapter"
        name_base(trainer.model, config)
        save_adapter(trainer.model.half(), saved)
        card = {"config": config.model_dump(mode="json"), "result": asdict(result)}
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
