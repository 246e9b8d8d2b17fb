"""What a run will take, from its configuration alone: nothing is started and no model is loaded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from rich.table import Table
from safetensors import safe_open

from agentrl.adapters import WEIGHTS, adapter_folder
from agentrl.config import Config
from agentrl.models import model_on_disk
from agentrl.training.adapter import lora_config
from agentrl.training.run import load_inputs

_GIB = 2**30


def plan(config: Config) -> Table:
    """Check the inputs of a run and describe engines, GPUs, tokens and disk as a table.

    Raises:
        AgentRLError, RetrieverError: for whatever would stop the run before its first step.
    """
    inputs = load_inputs(config)
    rollout, agent, training = config.rollout, config.agent, config.training
    episodes = rollout.group_size * rollout.questions_per_step
    engines, indexes = rollout.workers * config.engine.gpus, len(config.retriever.indexes) * config.retriever.gpus
    gpus = f"{engines + indexes + 1:g} ({engines} for engines, {indexes:g} for indexes, 1 for the trainer)"
    adapter = adapter_bytes(config)
    # An optimizer keeps two moments in fp32 beside the weights of each checkpoint.
    copies = 3 * training.keep_checkpoints + 1
    disk = (
        f"{copies} times the adapter, whose size is known once {config.model.path} is downloaded,"
        if adapter is None
        else _size(copies * adapter)
    )
    table = Table("", "", title=f"plan of {config.name}", title_justify="left", show_header=False)
    table.add_row("run folder", str(config.folder))
    table.add_row("engines", f"{rollout.workers} x {config.engine.kind} on {config.device}")
    table.add_row("GPUs", gpus if config.device == "cuda" else "none")
    table.add_row(
        "steps", f"{training.steps}, each {rollout.questions_per_step} questions x {rollout.group_size} episodes"
    )
    table.add_row(
        "tokens a step", f"at most {episodes * agent.max_episode_tokens:,} ({episodes} x {agent.max_episode_tokens})"
    )
    table.add_row("questions", f"{len(inputs.questions)} to train on, {len(inputs.evaluation)} to evaluate")
    table.add_row("disk", f"{disk} for checkpoints and adapter, {_size(free_bytes(config.folder))} free")
    return table


def adapter_bytes(config: Config) -> int | None:
    """Return the size of the adapter in fp32, or None while a model of the hub is not on this disk."""
    start = adapter_folder(config)
    if start is not None:
        with safe_open(start / WEIGHTS, framework="np") as opened:
            return 4 * sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118, no dict
    folder = model_on_disk(config.model.path)
    if folder is None:
        return None
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    # Its config alone says how many weights a model has; on this device there are none.
    with torch.device("meta"):
        policy = get_peft_model(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), lora_config(config)
        )
    return 4 * policy.get_nb_trainable_parameters()[0]


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
