"""What a run will take, from its configuration alone: nothing is started and no model is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.table import Table

from agentrl.config import Config
from agentrl.training.memory import (
    card_bytes,
    check_memory,
    checkpoint_bytes,
    engine_memory,
    most_utilization,
    size,
    store_bytes,
    tokens_held,
    tokens_that_fit,
    trainer_memory,
    trainer_room,
)
from agentrl.training.run import load_inputs
from agentrl.training.sizes import Sizes, read_sizes


def plan(config: Config) -> Table:
    """Check the inputs of a run and describe engines, GPUs, tokens, disk and memory as a table.

    Raises:
        AgentRLError, RetrieverError: for whatever would stop the run before its first step.
    """
    inputs = load_inputs(config)
    rollout, agent, training = config.rollout, config.agent, config.training
    episodes = rollout.group_size * rollout.questions_per_step
    indexes = len(config.retriever.indexes) * config.retriever.gpus
    what = "model" if config.model.lora is None else "adapter"
    sizes = read_sizes(config)
    # A new checkpoint is written before an old one goes, and the best may be an older one.
    kept = training.keep_checkpoints + 1 + (config.evaluation.every is not None)
    disk = (
        f"{kept} times {what} and optimizer, whose size is known once {config.model.path} is downloaded,"
        if sizes is None
        else size(kept * checkpoint_bytes(config, sizes) + 4 * sizes.trained)
    )
    table = Table("", "", title=f"plan of {config.name}", title_justify="left", show_header=False)
    table.add_row("run folder", str(config.folder))
    sleeps = ", which sleep while the trainer trains" if config.engine.sleep else ""
    table.add_row("engines", f"{rollout.workers} x {config.engine.kind} on {config.device}{sleeps}")
    table.add_row("GPUs", _gpus(config, indexes))
    table.add_row(
        "steps", f"{training.steps}, each {rollout.questions_per_step} questions x {rollout.group_size} episodes"
    )
    table.add_row(
        "tokens a step", f"at most {episodes * agent.max_episode_tokens:,} ({episodes} x {agent.max_episode_tokens})"
    )
    table.add_row("questions", f"{len(inputs.questions)} to train on, {len(inputs.evaluation)} to evaluate")
    table.add_row("disk", f"{disk} for checkpoints and {what}, {size(free_bytes(config.folder))} free")
    for name, text in _memory(config, sizes):
        table.add_row(name, text)
    return table


def _gpus(config: Config, indexes: float) -> str:
    engines = config.rollout.workers * config.engine.gpus if config.device == "cuda" else 0
    trainer = config.training.workers * config.trainer_gpus
    total = round(engines + indexes + trainer, 4)
    if not total:
        return "none"
    return f"{total:g} ({engines:g} for engines, {indexes:g} for indexes, {trainer:g} for the trainer)"


def _memory(config: Config, sizes: Sizes | None) -> list[tuple[str, str]]:
    """Return the rows about memory. Raises ConfigError if something does not fit a card of this machine."""
    card = card_bytes(config)
    if sizes is None:
        return [("memory", f"known once {config.model.path} is downloaded")]
    if card is not None:
        check_memory(config, sizes, card)
    tokens = tokens_held(config, sizes, card)
    engine, trainer = engine_memory(config, sizes, card), trainer_memory(config, sizes, tokens)
    cache = (
        f"{size(engine.token)} for keys and values of each token"
        if engine.cache is None
        else f"at most {size(engine.cache)} for keys and values of {engine.cache // engine.token:,} tokens"
    )
    rows = [
        ("memory of " + ("a card" if config.device == "cuda" else "the machine"), _available(config, card)),
        (
            "an engine",
            f"{size(engine.weights)} for {'model and adapters' if config.model.publishes_adapter else 'the model'}, {cache}",
        ),
        (
            "the trainer",
            f"about {size(trainer.peak)}: {size(trainer.weights)} for the model, {size(trainer.trained)} for "
            f"{'' if sizes.whole else 'adapter, '}gradients and moments, {size(trainer.activations)} for {tokens:,} tokens "
            f"at once, {size(trainer.logits)} for logits, {size(trainer.context)} for "
            f"{'CUDA' if config.device == 'cuda' else 'libraries'}",
        ),
    ]
    if card is not None:
        room = trainer_room(config, card)
        most = tokens_that_fit(
            sizes,
            room - trainer.resident - trainer.logits,
            config.model.dtype,
            checkpointing=config.training.gradient_checkpointing,
        )
        rows.append(("the trainer's room", f"{size(room)}, enough for about {most:,} tokens at once"))
        if config.engine.shares_card:
            rows.append(
                (
                    "engine.gpu_memory_utilization",
                    f"{config.engine.memory_utilization:.2g}, and {most_utilization(config, sizes, card):.2g} at most",
                )
            )
    rows.append(("Ray's object store", f"at least {size(store_bytes(config, sizes))} on each machine"))
    return rows


def _available(config: Config, card: int | None) -> str:
    if config.device == "cpu":
        return size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return "not known: this machine has no card, or is not the one that will train" if card is None else size(card)


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
