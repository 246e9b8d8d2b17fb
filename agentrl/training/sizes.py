"""The numbers of a model and its adapter that decide how much memory they take; no weight is loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentrl.adapters import adapter_folder
from agentrl.config import Config
from agentrl.models import model_on_disk
from agentrl.training.adapter import lora_config
from agentrl.training.policy import is_adapted


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers that decide how much memory a model and its adapter take; without one, all weights are trained.

    Attributes:
        layers: of the model.
        hidden, intermediate: widths of a layer.
        queries, keys: the heads of a layer times their width.
        vocabulary: of the output layer.
        weights: of the model.
        adapted_weights: of its layers that have an adapter beside them.
        adapted_inputs: what these layers and the second factors of their adapters read of one token, all layers together.
        adapter: weights of the adapter; 0 without one.
        linear_weights: of all linear layers but the output layer, which `model.quantization` holds in 4 bits.
        dora_outputs: what layers with DoRA give of one token, all layers together.
    """

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    weights: int
    adapted_weights: int
    adapted_inputs: int
    adapter: int
    linear_weights: int
    dora_outputs: int = 0

    @property
    def whole(self) -> bool:
        """Whether the model's own weights are trained."""
        return not self.adapter

    @property
    def trained(self) -> int:
        """How many weights are trained."""
        return self.adapter or self.weights


def read_sizes(config: Config) -> Sizes | None:
    """Return the sizes of the model and the adapter of `config`, or None while a model of the hub is not on this disk.

    The model is made without weights, which takes seconds.

    Raises:
        ModelError: if there is no such model.
    """
    folder = model_on_disk(config.model.path)
    if folder is None:
        return None
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if config.model.lora is None:
            return sizes_of(base)
        start = adapter_folder(config)
        settings = lora_config(config) if start is None else PeftConfig.from_pretrained(str(start))
        settings.base_model_name_or_path = base.name_or_path
        policy = get_peft_model(base, settings)
    return sizes_of(policy)


def sizes_of(policy: Any) -> Sizes:
    """Return the sizes of a PeftModel or a model of transformers, with weights or without.

    Weights in 4 bits are counted as they are packed.
    """
    import torch

    base = policy.get_base_model() if is_adapted(policy) else policy
    output = base.get_output_embeddings()
    output = getattr(output, "base_layer", output)
    named = dict(policy.named_parameters())
    adapter = sum(p.numel() for name, p in named.items() if ".lora_" in name)
    adapted = [module for module in policy.modules() if getattr(module, "lora_A", None)]
    text = base.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=text.num_attention_heads * width,
        keys=text.num_key_value_heads * width,
        vocabulary=text.vocab_size,
        weights=sum(parameter.numel() for parameter in named.values()) - adapter,
        adapted_weights=sum(module.get_base_layer().weight.numel() for module in adapted),
        adapted_inputs=sum(module.in_features + module.r["default"] for module in adapted),
        adapter=adapter,
        linear_weights=sum(
            module.weight.numel()
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and ".lora_" not in name and module is not output
        ),
        dora_outputs=sum(module.out_features for module in adapted if module.lora_magnitude_vector),
    )
