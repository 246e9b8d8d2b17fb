"""PEFT adapters as folders: found, checked against config and model before anything starts, and read for the engines.

Also what engines are given, which is an adapter or a whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.config import Config, ConfigError
from agentrl.models import ModelError
from retrievers.base import RetrieverError
from retrievers.models import resolve_folder

if TYPE_CHECKING:
    import numpy as np

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

WeightFiles = Mapping[str, "bytes | np.ndarray[Any, Any]"]
"""The files of a PEFT adapter, or of a model that takes the place of the one that engines began with, by name.

Those of a model are arrays of bytes, which processes of one machine share in Ray's object store."""

# Settings beyond W + s B A with one rank for all modules, s = alpha / r or (rsLoRA) alpha / sqrt(r), and W as the base model has
# it. vLLM refuses the first three and knows nothing of the others: it would sample from another policy than the one that is
# trained, without a word.
_BEYOND_LORA = (
    "use_dora",
    "modules_to_save",
    "bias",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)

# Ways to start an adapter that also change W.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_folder(config: Config) -> Path | None:
    """Return the folder of the adapter to start from, or None to start from a fresh one.

    Raises:
        ModelError: if there is no such adapter, or it is not a LoRA adapter that the engines can load.
        ConfigError: if it is not what `model.lora` describes; `target_modules: all-linear` leaves these to the adapter.
    """
    if config.model.adapter is None:
        return None
    try:
        folder = resolve_folder(config.model.adapter, marker=CONFIG, files=(CONFIG, WEIGHTS))
    except RetrieverError as error:
        raise ModelError(f"model.adapter {error}; give the folder of a PEFT adapter") from error
    lora = config.model.lora
    made = _read_config(folder / CONFIG, dora=lora.dora)
    asked: dict[str, Any] = {name: getattr(lora, name) for name in ("rank", "alpha", "dropout", "rslora", "dora")}
    found = {
        "rank": made["r"],
        "alpha": made["lora_alpha"],
        "dropout": made["lora_dropout"],
        # Older adapters do not mention these.
        "rslora": bool(made.get("use_rslora")),
        "dora": bool(made.get("use_dora")),
    }
    if isinstance(lora.target_modules, list) and isinstance(made["target_modules"], list):
        asked["target_modules"] = sorted(lora.target_modules)
        found["target_modules"] = sorted(made["target_modules"])
    for name, value in asked.items():
        if value != found[name]:
            raise ConfigError(
                f"model.lora.{name} {value} differs from the {name} {found[name]} of {folder}; set it to {found[name]}"
            )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"model.adapter {folder}: no {WEIGHTS}; give the folder of a PEFT adapter in safetensors form")
    return folder


def check_tensors(folder: Path, model: str) -> None:
    """Check that the tensors of an adapter are those that its config describes for `model`, by name and by shape.

    PEFT and vLLM leave a tensor alone that finds no module, and a module alone that finds no tensor; then the base model is
    sampled in the adapter's name. The model is made without weights, which takes seconds at most.

    Args:
        folder: see `adapter_folder`.
        model: see `agentrl.models.resolve_model`.

    Raises:
        ModelError: naming tensors and modules, if any of them finds no partner.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="np") as opened:
            # Beside an adapter of the embedding PEFT saves the embedding itself, which engines have.
            names = [name for name in opened.keys() if ".base_layer." not in name]  # noqa: SIM118, no dict
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.adapter {folder}: {WEIGHTS} cannot be read: {error}") from error
    wanted, idle = _describe(folder, model)
    homeless, empty = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    problems = []
    if homeless:
        problems.append(f"{len(homeless)} of its {len(found)} tensors find no module in {model}, such as {homeless[0]}")
    if empty:
        problems.append(
            f"{len(empty)} of the {len(wanted)} tensors that its config describes are missing, such as {empty[0]}"
        )
    if idle:
        problems.append(f"its target_modules {', '.join(idle)} are no modules of {model}")
    other = [name for name in sorted(found.keys() & wanted.keys()) if found[name] != wanted[name]]
    if other and not problems:
        problems.append(f"{other[0]} has the shape {list(found[other[0]])}, and {model} needs {list(wanted[other[0]])}")
    if problems:
        raise ModelError(
            f"model.adapter {folder}: {'; '.join(problems)}; give an adapter that was trained on this model"
        )


def read_adapter(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter's folder, by name, as `Engine.load_adapter` takes them."""
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def is_model(files: WeightFiles) -> bool:
    """Tell whether these are the files of a model, and not of an adapter."""
    return "config.json" in files


def read_model(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read the files of a model's folder, by name, as engines get them."""
    import numpy as np

    return {path.name: np.fromfile(path, dtype=np.uint8) for path in sorted(folder.iterdir()) if path.is_file()}


def _read_config(path: Path, *, dora: bool) -> dict[str, Any]:
    """Read the config of an adapter. Raises ModelError if it is more than plain LoRA, or DoRA where `dora` asks for it."""
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged, it is not JSON: {error}; copy the adapter again") from error
    if not isinstance(made, dict) or made.get("peft_type") != "LORA":
        kind = made.get("peft_type") if isinstance(made, dict) else None
        raise ModelError(f"{path} describes an adapter of type {kind}; give one of type LORA")
    kinds = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float, "target_modules": list | str}
    for name, kind in kinds.items():
        if not isinstance(made.get(name), kind):
            raise ModelError(f"{path}: {name} is {made.get(name, 'missing')}; give an adapter that PEFT has saved")
    for name in _BEYOND_LORA:
        if made.get(name) not in (None, False, "none", [], {}) and not (dora and name == "use_dora"):
            advice = "set model.lora.dora to true" if name == "use_dora" else "train an adapter without it"
            raise ModelError(
                f"{path}: {name} {made[name]!r} is more than plain LoRA, which is all that the engines load; {advice}"
            )
    start = str(made.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise ModelError(
            f"{path}: init_lora_weights {start} changes the base model's own weights, which the engines do not; "
            f"save the adapter converted to plain LoRA (path_initial_model_for_weight_conversion in PEFT)"
        )
    return made


def _describe(folder: Path, model: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the tensors that the adapter's config describes for `model`, with their shapes, and targets that it lacks."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = PeftConfig.from_pretrained(str(folder))
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
            settings.base_model_name_or_path = base.name_or_path
            modules = [name for name, _ in base.named_modules()]
            policy = get_peft_model(base, settings)
    # ValueError is PEFT's, if not one of the target modules is in the model; some targets are a regular expression.
    except (ValueError, re.error) as error:
        raise ModelError(f"model.adapter {folder} does not fit {model}: {error}") from error
    state = get_peft_model_state_dict(policy, save_embedding_layers=False)
    # A target may be left out on purpose, by the config's exclude_modules or layers_to_transform.
    targets = settings.target_modules if isinstance(settings.target_modules, set | list) else ()
    idle = [name for name in sorted(targets) if not any(f".{module}".endswith(f".{name}") for module in modules)]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, idle
