"""Engines sample token ids from a language model: `base` is the contract, each other module one implementation.

Importing this package loads neither torch nor vLLM.
"""

from __future__ import annotations

from typing import Any

from agentrl.config import Config, ConfigError
from agentrl.engines.base import Engine
from agentrl.quantization import for_vllm
from retrievers.names import import_path

# Kind: module and class. These modules import what they run on only when an engine is made.
_ENGINES = {
    "vllm": ("agentrl.engines.vllm", "VllmEngine"),
    "transformers": ("agentrl.engines.transformers", "TransformersEngine"),
    "openai": ("agentrl.engines.openai", "OpenAIEngine"),
}


def engine_class(kind: str) -> Any:
    """Return the class behind `engine.kind`."""
    module, name = _ENGINES[kind]
    return import_path(f"{module}:{name}")


def environment(config: Config) -> dict[str, str]:
    """Return the environment variables that an engine's process needs from its start."""
    module, _ = _ENGINES[config.engine.kind]
    return import_path(f"{module}:environment")(config.engine, config.device)


def check_device(config: Config) -> None:
    """Raise ConfigError if the config wants GPUs and this machine, which is to run it, has none."""
    if config.device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        instead = f"; on a CPU use --config {config.cpu_config}" if config.cpu_config else ""
        raise ConfigError(
            f"config {config.name!r} asks for device cuda and this machine has no GPU{instead}, or train and evaluate on a "
            "cluster that has GPUs with ray.address"
        )


def require_trainable(config: Config) -> None:
    """Raise ConfigError if the config's engine returns ids that must not be trained on."""
    kind = config.engine.kind
    if not engine_class(kind).trainable:
        trainable = ", ".join(name for name in _ENGINES if engine_class(name).trainable)
        raise ConfigError(
            f"engine.kind {kind} is for evaluation only: its ids and log-probabilities are not exactly those that were "
            f"sampled; train with one of: {trainable}"
        )


def make_engine(config: Config, model_path: str) -> Engine:
    """Make the engine. Must be called inside the event loop that will use it.

    Args:
        model_path: the resolved model, see `agentrl.models.resolve_model`; of it an endpoint needs only the tokenizer.

    Raises:
        ConfigError: if the environment lacks what the config names.
    """
    engine = engine_class(config.engine.kind)
    if config.engine.kind == "openai":
        return engine(model_path, config.engine)
    limits = {"max_tokens": config.agent.max_episode_tokens, "seed": config.seed}
    if config.engine.kind == "vllm":
        limits["lora_rank"] = config.model.lora.rank if config.model.publishes_adapter else None
        limits["quantization"] = for_vllm(config)
    return engine(model_path, config.engine, device=config.device, dtype=config.model.dtype, **limits)
