"""A model with a PEFT adapter that is trained: loaded, and the adapter packed as files or merged into the model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentrl.adapters import CONFIG, WEIGHTS, adapter_folder
from agentrl.config import Config
from agentrl.quantization import for_transformers
from agentrl.types import AgentRLError


def load_adapted(config: Config, model: str) -> Any:
    """Load the model in the trainer's precision with the adapter that is to be trained, its weights in fp32.

    Args:
        model: the folder of `model.path`, see `agentrl.models.resolve_model`.
    """
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    quantized = for_transformers(config)
    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, config.model.dtype),
        **({} if quantized is None else {"quantization_config": quantized}),
    )
    start = adapter_folder(config)
    if start is not None:
        policy = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    else:
        policy = get_peft_model(base, lora_config(config))
        _measure_lengths(policy)
    # PEFT names the folder of this machine, and the adapter travels.
    policy.peft_config["default"].base_model_name_or_path = config.model.path
    return policy


def _measure_lengths(policy: Any) -> None:
    """Set the lengths of a fresh DoRA adapter in fp32: PEFT rounds them to the model's precision, which changes the model.

    Raises:
        AgentRLError: if a row of the model has no length, by which DoRA would divide.
    """
    import torch
    from peft.tuners.lora import Linear

    for name, layer in policy.named_modules():
        if isinstance(layer, Linear) and "default" in layer.lora_magnitude_vector:
            lengths = torch.linalg.vector_norm(
                layer.get_base_layer().weight.float(), dim=0 if layer.fan_in_fan_out else 1
            )
            if not lengths.all():
                raise AgentRLError(
                    f"model.lora.dora divides by the length of each row, and {int((lengths == 0).sum())} rows of "
                    f"{name.removeprefix('base_model.model.')} are zeros; leave the layer out of model.lora.target_modules, or "
                    "set dora to false"
                )
            layer.lora_magnitude_vector["default"].weight.data = lengths


def lora_config(config: Config) -> Any:
    """Return PEFT's LoraConfig of a fresh adapter as `model.lora` describes it."""
    from peft import LoraConfig

    lora = config.model.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def adapter_files(policy: Any) -> dict[str, bytes]:
    """Pack the trained adapter of a PeftModel, in memory, as the files that `Engine.load_adapter` takes, by name.

    They have the precision of the model: an engine computes in it, and so does the trainer's forward pass.
    """
    return _pack(policy, policy.get_base_model().dtype)


def _pack(policy: Any, dtype: Any) -> dict[str, bytes]:
    """Pack the trained adapter with weights of a type of torch."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    settings = policy.peft_config["default"].to_dict()
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    settings["inference_mode"] = True
    # "auto", PEFT's default, asks the hub about the base model each time.
    tensors = get_peft_model_state_dict(policy, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    return {
        CONFIG: f"{json.dumps(settings, indent=2, sort_keys=True)}\n".encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def save_adapter(policy: Any, folder: Path) -> None:
    """Write the trained adapter into a folder, which every PEFT tool reads, in the fp32 of its training.

    In bf16 a small update is lost in rounding, and so would the last ones be for whoever trains on from this folder.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _pack(policy, torch.float32).items():
        (folder / name).write_bytes(content)


def merged_weights(policy: Any) -> dict[str, Any]:
    """Return the weights of a PeftModel's model with the adapter merged into them, by the names that the model has for them.

    They are merged in fp32; the policy stays as it is.

    Raises:
        AgentRLError: if the adapter changes one of two weights that the model ties.
    """
    from peft.tuners.lora import LoraLayer

    base = policy.get_base_model()
    found = base.state_dict()
    weights = {name.replace(".base_layer.", "."): found[name] for name in found if ".lora_" not in name}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            if base.config.tie_word_embeddings and layer in (base.get_input_embeddings(), base.get_output_embeddings()):
                raise AgentRLError(
                    f"the adapter changes {name}, which the model ties to another layer, so that it cannot be merged for the "
                    "engines; leave it out of model.lora.target_modules"
                )
            weights[f"{name}.weight"] = _merged(layer)
    return weights


def _merged(layer: Any) -> Any:
    """Return the weight of an adapted layer with its adapter merged into it, in fp32."""
    base = layer.get_base_layer()
    own = base.weight.data
    base.weight.data = own.float()
    try:
        layer.merge(safe_merge=True)
        return base.weight.data
    finally:
        # To subtract what was added would leave rounding behind.
        base.weight.data = own
        layer.merged_adapters.clear()
