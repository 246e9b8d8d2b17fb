"""The policy that is trained: a model of transformers, all of whose weights are trained, or one with a PEFT adapter.

What differs between the two stands here: how a policy is loaded, what engines get of it, how it is saved and read again, and
what it is compared with.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from agentrl.adapters import WeightFiles, read_adapter, read_model
from agentrl.config import Config
from agentrl.engines.scratch import ScratchFolder
from agentrl.models import resolve_model
from agentrl.training.adapter import adapter_files, load_adapted, merged_weights, save_adapter


def load_policy(config: Config, model: str) -> Any:
    """Load what is to be trained, its trained weights in fp32.

    Args:
        model: the folder of `model.path`, see `agentrl.models.resolve_model`.

    Returns:
        A PeftModel over the model in the precision of `model.dtype`; with `model.lora: null` the model itself.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    # A bar for each time that weights are read or written would run through displays and logs.
    disable_progress_bar()
    if config.model.lora is not None:
        return load_adapted(config, model)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def is_adapted(policy: Any) -> bool:
    """Tell whether a policy is a model with an adapter, and not one whose own weights are trained."""
    return hasattr(policy, "peft_config")


def engine_files(config: Config, policy: Any, weights: dict[str, Any] | None = None) -> WeightFiles:
    """Return what engines need to sample with a policy, in the precision that they compute in.

    That is the adapter; with all weights trained, or an adapter that engines cannot load, it is a whole model.

    Args:
        weights: of a policy that does not hold all of them itself.
    """
    if config.model.publishes_adapter:
        return adapter_files(policy)
    import torch

    # A trainer that is killed meanwhile leaves no gigabytes behind.
    scratch = ScratchFolder()
    try:
        save_model(policy, scratch.path, getattr(torch, config.model.dtype), weights)
        return read_model(scratch.path)
    finally:
        scratch.close()


def saved_files(config: Config, folder: Path) -> WeightFiles:
    """Return what engines need to sample with a policy that `save_policy` has written into `folder`."""
    if config.model.publishes_adapter:
        return read_adapter(folder)
    if config.model.lora is None:
        return read_model(folder)
    section = config.model.model_copy(update={"adapter": str(folder)})
    saved = config.model_copy(update={"model": section})
    return engine_files(saved, load_policy(saved, resolve_model(config.model.path)))


def save_policy(policy: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Write the trained weights into a folder in the fp32 of their training: an adapter of PEFT or a model of transformers.

    In bf16 a small update is lost in rounding, and so would the last ones be for whoever trains on from this folder.

    Args:
        weights: of a policy that does not hold all of them itself.
    """
    import torch

    if is_adapted(policy):
        save_adapter(policy, folder)
    else:
        save_model(policy, folder, torch.float32, weights)


def restore_policy(policy: Any, folder: Path) -> None:
    """Give a policy the weights that `save_policy` has written into `folder`."""
    if is_adapted(policy):
        policy.load_adapter(str(folder), "default", is_trainable=True)
        policy.set_adapter("default")
    else:
        policy.load_state_dict(read_weights(folder))


def read_weights(folder: Path) -> dict[str, Any]:
    """Read the weights of a model that `save_policy` has written into `folder`, by the names that the model has for them."""
    import torch
    from transformers import AutoModelForCausalLM

    # Its reader knows files in parts and weights that are tied.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def frozen_copy(config: Config, policy: Any) -> Any | None:
    """Return the reference of the KL term where all weights are trained: the model as it is now, in `model.dtype`.

    Returns:
        None where nothing needs it: without a KL term, and where the adapter can be switched off.
    """
    import torch

    if is_adapted(policy) or not config.training.kl.coefficient:
        return None
    return copy.deepcopy(policy).to(getattr(torch, config.model.dtype)).requires_grad_(False).eval()


def switch_off_dropout(policy: Any) -> None:
    """Set the rates of dropout to 0 that models apply as a function; TRL does so with modules of torch."""
    for module in policy.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def drop_needless_reference(policy: Any) -> None:
    """Remove the copy of the adapter that TRL keeps for the KL term, if that adapter has not been trained yet.

    Such an adapter changes nothing, so the model without one is the same reference.
    """
    if not is_adapted(policy) or "ref" not in policy.peft_config:
        return
    if not any(p.any() for name, p in policy.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name):
        policy.delete_adapter("ref")


def reference_adapter(policy: Any) -> AbstractContextManager[Any]:
    """Have a PeftModel compute as when training began, until the end of the block."""
    # TRL copies an adapter that training starts from under the name "ref"; without one, the base model is the reference.
    from trl.trainer.utils import use_adapter

    return use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)


def save_model(policy: Any, folder: Path, dtype: Any, weights: dict[str, Any] | None = None) -> None:
    """Write a whole model, with the adapter merged into it in fp32 if there is one, with weights of a type of torch.

    Args:
        weights: of a policy that does not hold all of them itself.

    Raises:
        AgentRLError: if the adapter changes one of two weights that the model ties.
    """
    adapted = is_adapted(policy)
    model = policy.get_base_model() if adapted else policy
    if weights is None:
        weights = merged_weights(policy) if adapted else policy.state_dict()
    found: dict[str, Any] = {}
    written: dict[Any, Any] = {}
    for name, tensor in weights.items():
        # Tied weights stay one tensor, and are written once.
        place = tensor.data_ptr(), tensor.shape
        if place not in written:
            written[place] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        found[name] = written[place]
    model.save_pretrained(folder, state_dict=found)
