"""Base weights in 4 bits and optimizers in 8: what a configuration wants of bitsandbytes, and whether this machine has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from agentrl.config import Config, ConfigError


def for_transformers(config: Config) -> Any:
    """Return what `from_pretrained` takes as `quantization_config`; None leaves the weights as they are.

    NF4 with doubly quantised scales, computed with in bf16 (QLoRA, arXiv 2305.14314).
    """
    if config.model.quantization is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def for_vllm(config: Config) -> str | None:
    """Return vLLM's name of the method; None leaves the weights as they are.

    It quantises each matrix while it loads the model, in the way of `for_transformers`, so that both hold the same weights.
    """
    return None if config.model.quantization is None else "bitsandbytes"


def check_quantization(config: Config, *, trains: bool) -> None:
    """Check that this environment has what the config wants of bitsandbytes.

    Args:
        trains: whether there is a trainer, or engines alone.

    Raises:
        ConfigError: if a package is missing, with the key that asks for it.
    """
    quantization, optimizer = config.model.quantization, config.training.optimizer.name if trains else None
    wants = [f"model.quantization {quantization}"] if quantization is not None else []
    wants += ["training.optimizer.name adamw_8bit"] if optimizer == "adamw_8bit" else []
    if wants and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"config {config.name!r}: {wants[0]} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    if quantization is not None and not _vllm_has_it():
        raise ConfigError(
            f"config {config.name!r}: model.quantization {quantization} needs bitsandbytes in vLLM, and the installed vLLM "
            "leaves it to a plug-in: pip install vllm-bnb-plugin"
        )


def _vllm_has_it() -> bool:
    # An import of vLLM takes ten seconds. Version 0.31 has no bitsandbytes of its own, and older ones have.
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or importlib.util.find_spec("vllm_bnb_plugin") is not None:
        # Where there is no vLLM at all, its engine says so.
        return True
    methods = Path("model_executor", "layers", "quantization", "bitsandbytes.py")
    return any((Path(folder) / methods).is_file() for folder in vllm.submodule_search_locations or ())
