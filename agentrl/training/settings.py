"""A configuration as the settings of TRL, of the scoring pass and of the updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig

from agentrl.config import Config, OptimizerConfig
from agentrl.training.memory import later_bytes, pack_tokens
from agentrl.training.optimizers import make_muon
from agentrl.training.scoring import Scorer
from agentrl.training.sizes import sizes_of
from agentrl.training.updates import Additions, Updates

# The names of TRL's losses, and what each takes its ratios over.
LOSSES = {
    "grpo": ("grpo", "token"),
    "bnpo": ("bnpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "cispo": ("cispo", "token"),
    "gspo": ("grpo", "sequence"),
    "sapo": ("sapo", "token"),
    "luspo": ("luspo", "sequence"),
    "vespo": ("vespo", "token"),
}


def grpo_config(**settings: Any) -> GRPOConfig:
    """TRL's settings with those that agentrl's batches rely on; `loss` is one of `LOSSES`.

    Raises:
        ValueError: if the loss is dr_grpo and `max_completion_length`, the constant that it divides by, is not given.
    """
    loss, level = LOSSES[settings.pop("loss", "dapo")]
    # No other loss uses it: sequence-length limits are enforced while an episode runs.
    settings.setdefault("max_completion_length", None)
    if loss == "dr_grpo" and settings["max_completion_length"] is None:
        raise ValueError("loss dr_grpo divides by max_completion_length, which must be given")
    return GRPOConfig(
        loss_type=loss,
        importance_sampling_level=level,
        # TRL counts updates by batches of its own data, which it wants in groups; agentrl's minibatches are its own.
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=1,
        # The data order is agentrl's own.
        shuffle_dataset=False,
        # transformers would replace a loss that is not finite by the mean of those before.
        logging_nan_inf_filter=False,
        # agentrl writes its own metrics.
        report_to=[],
        remove_unused_columns=False,
        logging_first_step=False,
        log_completions=False,
        disable_tqdm=True,
        # Of a mixture of experts the loss is the policy's alone; no loss that balances them is computed.
        router_aux_loss_coef=0.0,
        # What is trained must be the policy that sampled.
        disable_dropout=True,
        **settings,
    )


def run_settings(config: Config, checkpoints: Path) -> GRPOConfig:
    """TRL's settings for the run that `config` describes; `checkpoints` is the folder that TRL writes them into."""
    training = config.training
    each = run_updates(config).per_batch
    return grpo_config(
        output_dir=str(checkpoints),
        max_steps=training.steps * each,
        logging_steps=each,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps * each,
        **_optimizer_settings(training.optimizer),
        max_grad_norm=training.max_grad_norm,
        loss=training.loss,
        epsilon=training.clip.low,
        epsilon_high=training.clip.high or (5.0 if training.loss == "cispo" else training.clip.low),
        delta=training.clip.dual,
        max_completion_length=config.agent.max_episode_tokens,
        beta=training.kl.coefficient,
        temperature=config.agent.temperature,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.model.dtype == "bfloat16",
        use_cpu=config.device == "cpu",
        seed=config.seed,
        save_strategy="steps",
        save_steps=training.checkpoint_every * each,
    )


def _optimizer_settings(settings: OptimizerConfig) -> dict[str, Any]:
    first, second = settings.betas
    # TRL picks the AdamW that is fastest. What builds muon is `run_optimizer`.
    named = {"optim": "adamw_8bit"} if settings.name == "adamw_8bit" else {}
    return named | {
        "adam_beta1": first,
        "adam_beta2": second,
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def run_optimizer(config: Config) -> Callable[[torch.nn.Module], torch.optim.Optimizer] | None:
    """Return what makes the optimizer of a model for the run that `config` describes; None if TRL makes it."""
    settings = config.training.optimizer
    if settings.name != "muon":
        return None
    return functools.partial(
        make_muon,
        rate=config.training.learning_rate,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def run_updates(config: Config) -> Updates:
    """How often the run that `config` describes trains on a batch."""
    training = config.training
    return Updates(config.rollout.group_size, training.updates_per_batch, training.minibatches, config.seed)


def run_additions(config: Config) -> Additions:
    """What the run that `config` describes adds to TRL's loss."""
    training, importance = config.training, config.training.importance
    mode = importance.mode
    if mode is None:
        # In fp32 and on fresh rollouts, engine and trainer differ by no more than rounding.
        mode = "truncate" if config.model.dtype != "float32" or config.rollout.max_staleness else "off"
    return Additions(
        importance=None if mode == "off" else (mode, importance.cap),
        kl_estimator=training.kl.chosen,
        kl_in_reward=training.kl.where == "reward",
        entropy_bonus=training.entropy_bonus,
        llds_weight=training.llds.weight,
        llds_tolerance=training.llds.tolerance,
    )


def make_scorer(config: Config, model: Any) -> Scorer:
    """Make the scorer of the run that `config` describes, and compare it with the model's own pass.

    Raises:
        ScoringError: if the model does not compute in packs what it computes of each episode alone.
    """
    training, sizes = config.training, sizes_of(model)
    free = torch.cuda.mem_get_info()[0] - later_bytes(config, sizes) if config.device == "cuda" else 0
    scorer = Scorer(
        model,
        tokens=pack_tokens(config, sizes, free),
        packing=training.packing,
        temperature=config.agent.temperature,
        # Merged in bf16, small updates of an adapter would be lost in rounding.
        merge=config.model.dtype == "float32",
        dtype=getattr(torch, config.model.dtype),
    )
    scorer.check()
    return scorer
