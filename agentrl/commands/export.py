"""What a run trained as a folder for others: weights, tokenizer and model card, for transformers, PEFT and vLLM."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from agentrl.commands.model_card import model_card
from agentrl.commands.runs import open_run
from agentrl.config import Config
from agentrl.models import load_tokenizer, resolve_model
from agentrl.runs import RunError, RunFolder
from retrievers.models import is_hub_name


def export_run(path: Path, out: Path | None, *, merged: bool) -> Path:
    """Write the adapter of a run, or the model where all its weights were trained, into a new folder; return the folder.

    Args:
        path: the run's folder.
        out: by default RUN/export/adapter, or RUN/export/model for a whole model. It appears whole or not at all.
        merged: whether to write the model with the adapter merged into it, in `model.dtype`, in place of the adapter.

    Raises:
        RunError: if there is no such run, it has not ended, there is nothing that can be merged, or `out` is there already.
        ModelError: if the base model is not on this machine and cannot be had; an adapter needs of it only the tokenizer.
        OSError: if `out` cannot be written.
    """
    run = open_run(path)
    config = run.read_config()
    if not run.trained.is_dir():
        raise RunError(f"{path}: has no {run.trained.name} yet; let the run end, with agentrl train --resume")
    if merged:
        _check_mergeable(path, config)
    whole = merged or config.model.lora is None
    out = out or run.path / "export" / ("model" if whole else "adapter")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: already there; give another folder with --out, or remove it first")
    base = resolve_model(config.model.path, weights=merged)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = out.absolute().with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if merged:
            _write_merged(run, config, base, partial)
        else:
            shutil.copytree(run.trained, partial)
        load_tokenizer(base).save_pretrained(partial)
        (partial / "README.md").write_text(model_card(run, config, Path(base), whole=whole), encoding="utf-8")
        os.replace(partial, out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return out


def _check_mergeable(path: Path, config: Config) -> None:
    if config.model.lora is None:
        raise RunError(f"{path}: all weights were trained, so there is no adapter to merge; leave out --merged")
    if config.model.quantization is not None:
        raise RunError(
            f"{path}: the adapter was trained on weights in model.quantization {config.model.quantization}, and merged into "
            "others it would be another policy; leave out --merged"
        )


def _write_merged(run: RunFolder, config: Config, base: str, folder: Path) -> None:
    import torch

    from agentrl.training.policy import load_policy, save_model

    trained = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(run.adapter)})})
    save_model(load_policy(trained, base), folder, getattr(torch, config.model.dtype))


def check_name(name: str) -> None:
    """Raise RunError unless `name` can be a repository of the hub."""
    if not is_hub_name(name):
        raise RunError(f"--push {name}: no name of a repository on the hub, or a folder here; write it as owner/name")


def push_folder(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face hub as the repository `name`; return its address.

    A repository that is not there yet is made, and is private.

    Raises:
        RunError: if the hub cannot be reached or refuses; the folder stays as it is.
    """
    import httpx
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except (OSError, httpx.HTTPError, RuntimeError) as error:
        # huggingface_hub raises RuntimeError where its client is closed, such as in offline mode.
        raise RunError(
            f"{folder} is exported, and cannot be pushed to {name}: {str(error).splitlines()[0]}; see to the network and to "
            f"`hf auth login`, then: hf upload {name} {folder}"
        ) from error
    return f"{hub.endpoint}/{name}"
