"""What a run will take, from its configuration alone: nothing is started and no model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.table import Table

from agentrl.adapters import adapter_folder
from agentrl.config import Config
from agentrl.models import model_on_disk
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
    disk = None if adapter is None else (3 * training.keep_checkpoints + 1) * adapter
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
    table.add_row("disk", f"{_size(disk)} for checkpoints and adapter, {_size(free_bytes(config.folder))} free")
    return table


def adapter_bytes(config: Config) -> int | None:
    """Return the size of the adapter in fp32, or None while the model is not on this disk and its shapes are unknown."""
    start = adapter_folder(config)
    if start is not None:
        return _parameters(start / "adapter_model.safetensors") * 4
    folder = model_on_disk(config.model.path)
    shards = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not shards or config.model.lora.target_modules != "all-linear":
        return None
    layers = [
        shape for shard in shards for name, shape in _shapes(shard).items() if ".layers." in name and len(shape) == 2
    ]
    # Where layers have other names, nothing is known of them.
    return 4 * config.model.lora.rank * sum(rows + columns for rows, columns in layers) or None


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk where `path` is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _shapes(file: Path) -> dict[str, list[int]]:
    # A safetensors file begins with the length of its JSON header, little-endian in eight bytes.
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _parameters(file: Path) -> int:
    total = 0
    for shape in _shapes(file).values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _size(size: int | None) -> str:
    if size is None:
        return "unknown size"
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
