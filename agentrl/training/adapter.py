"""PEFT adapters: made or loaded for training, and packed as files for the engines."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from agentrl.config import Config, ConfigError
from agentrl.models import ModelError


def adapter_folder(config: Config) -> Path | None:
    """Return the folder of the adapter to start from, or None to start from a fresh one.

    Raises:
        ModelError: if the folder holds no PEFT adapter.
        ConfigError: if it is not what `model.lora` describes; `target_modules: all-linear` leaves these to the adapter.
    """
    if config.model.adapter is None:
        return None
    folder = Path(config.model.adapter)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(
            f"model.adapter {config.model.adapter}: no adapter_config.json in {folder}; give the folder of a PEFT adapter"
        )
    lora, made = config.model.lora, json.loads(path.read_text(encoding="utf-8"))
    if made.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds an adapter of type {made.get('peft_type')}; give one of type LORA")
    asked: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout}
    found = {"rank": made["r"], "alpha": made["lora_alpha"], "dropout": made["lora_dropout"]}
    if isinstance(lora.target_modules, list) and isinstance(made["target_modules"], list):
        asked["target_modules"] = sorted(lora.target_modules)
        found["target_modules"] = sorted(made["target_modules"])
    for name, value in asked.items():
        if value != found[name]:
            raise ConfigError(
                f"model.lora.{name} {value} differs from the {name} {found[name]} of {folder}; set it to {found[name]}"
            )
    return folder


def load_policy(config: Config, model: str) -> Any:
    """Load the model in the trainer's precision with the adapter that is to be trained, its weights in fp32."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.model.dtype))
    start = adapter_folder(config)
    if start is not None:
        return PeftModel.from_pretrained(base, str(start), is_trainable=True)
    lora = config.model.lora
    return get_peft_model(
        base,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def adapter_files(policy: Any) -> dict[str, bytes]:
    """Pack the trained adapter as the files that `Engine.load_adapter` takes."""
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        return read_adapter(Path(folder))


def read_adapter(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter folder.

    Raises:
        ModelError: if the weights are missing.
    """
    names = ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: no {missing[0]}; give the folder of a PEFT adapter in safetensors form")
    return {name: (folder / name).read_bytes() for name in names}
