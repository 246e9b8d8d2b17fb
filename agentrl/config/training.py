"""The section `training`: what an update is made of, how steps follow one another, and what ends them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from agentrl.config.base import Section


class OptimizerConfig(Section):
    """What turns gradients into new weights.

    - adamw: AdamW (arXiv 1711.05101).
    - adamw_8bit: AdamW whose two moments have 8 bits (arXiv 2110.02861), from the package bitsandbytes, on device cuda.
    - muon: each weight matrix moves by its momentum (0.95), made orthogonal and scaled to the size of an update of AdamW
      (arXiv 2502.16982), so that `learning_rate` and `weight_decay` mean the same as for AdamW. Both factors of an adapter
      are such matrices. Embeddings, the output layer and vectors have AdamW.

    `betas` and `eps` are AdamW's. An update takes `learning_rate` x `weight_decay` of every matrix off it; vectors have no decay.
    """

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """Which optimizer."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW's."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's."""
    weight_decay: float = Field(0.0, ge=0)
    """An update takes `learning_rate` x `weight_decay` of every matrix off it; vectors have no decay."""


class KlConfig(Section):
    """Holds the policy near the model that training began with, by their KL divergence at the tokens that were sampled."""

    coefficient: float = Field(0.0, ge=0)
    """Weighs it; 0 computes none."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """k1, k2 or k3 of agentrl.training.kl; null is k3 in the loss and k1 in the reward. k1 in the loss has a gradient whose mean
    is 0, and is refused.
    """
    where: Literal["loss", "reward"] = "loss"
    """`loss` adds the mean to the loss. `reward` takes each token's estimate, as it was before the updates on its batch, off the
    token's advantage.
    """

    @property
    def chosen(self) -> Literal["k1", "k2", "k3"]:
        """The estimator that is used."""
        return self.estimator or ("k1" if self.where == "reward" else "k3")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Self:
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has a gradient whose mean is 0, which holds the policy nowhere; set estimator to k2 or k3, or "
                "where to reward"
            )
        return self


class LldsConfig(Section):
    """Keeps the likelihood of good actions from falling (arXiv 2512.04220). It needs more than one update on a batch."""

    weight: float = Field(0.0, ge=0)
    """Of the term in the loss; 0 leaves it out."""
    tolerance: float = Field(1e-3, ge=0)
    """It acts on actions with an advantage of at least 0 whose mean log-probability fell by more than this (nats) since the first
    update on their batch began.
    """


class ImportanceConfig(Section):
    """Corrects for the difference between the policy that sampled and the policy that is trained. A token's advantage is
    multiplied by the ratio of its probability under the policy that the updates on a batch begin with to that under the engine's.
    """

    mode: Literal["truncate", "mask", "mask_episode", "off"] | None = None
    """truncate cuts the ratio at `cap`; mask makes it 0 above `cap` or below 1 / `cap`; mask_episode makes it 0 all over an
    episode whose mean ratio is beyond these. null truncates wherever the two can differ by more than rounding in float32: in
    bfloat16, and where `rollout.max_staleness` allows older weights.
    """
    cap: float = Field(2.0, gt=1)
    """See `mode`."""


class ClipConfig(Section):
    """Bounds the ratio of a token's probability to that before the updates on its batch."""

    low: float = Field(0.2, gt=0, lt=1)
    """The lower bound is 1 - `low`."""
    high: float | None = Field(None, gt=0)
    """The upper bound is 1 + `high`. Above `low` it leaves unlikely tokens room to grow (DAPO, arXiv 2503.14476). Loss cispo cuts
    the ratio itself at `high`. null is `low`, and 5 for cispo.
    """
    dual: float | None = Field(None, gt=1)
    """Bounds the ratio of tokens of negative advantage too (arXiv 1912.09729); null does not."""


class WatchConfig(Section):
    """Looks for a collapse of the policy in means over some steps, and says in a sentence what it finds: mean reward or answered
    episodes that fell; no search any more; one stratum alone; entropy that is gone or tripled; a KL divergence, a share of groups
    without signal or of repetition above a limit; correct episodes that became unlikely.
    """

    on_collapse: Literal["warn", "stop", "roll_back"] = "warn"
    """warn goes on, stop ends the run with its state kept, and roll_back goes on with half the learning rate from an older
    checkpoint: the best evaluated one, else the newest, of those before the window.
    """
    window: int = Field(5, ge=2)
    """The steps of a mean."""
    max_roll_backs: int = Field(3, ge=1)
    """After so many roll-backs the run stops."""
    fall: float = Field(0.5, gt=0, lt=1)
    """Mean reward or answered episodes collapse when they fall by more than this share of their best."""
    max_kl: float = Field(1.0, gt=0)
    """In nats a token, where a KL divergence is computed."""
    max_no_signal: float = Field(0.95, gt=0, le=1)
    """The share of groups without signal from which on it is a collapse."""
    max_repetition: float = Field(0.5, gt=0, le=1)
    """The share of repeated n-grams from which on it is a collapse."""


class TrainingConfig(Section):
    """A step samples a batch and trains on it."""

    steps: int = Field(ge=1)
    """How many steps a run takes."""
    learning_rate: float = Field(1e-5, gt=0)
    """The highest rate of the schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Batches over which the rate rises from 0."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the rate changes over the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What turns gradients into new weights."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo", "vespo"] = "dapo"
    """One of TRL's. gspo is grpo with the ratio of a whole episode, and luspo takes that too."""
    updates_per_batch: int = Field(1, ge=1)
    """Passes over a batch."""
    minibatches: int = Field(1, ge=1)
    """Parts of whole groups that each pass is made in, with an optimizer update for each."""
    clip: ClipConfig = ClipConfig()
    """Bounds of the ratio."""
    kl: KlConfig = KlConfig()
    """Holds the policy near where it began."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Times the mean entropy, is taken off the loss."""
    llds: LldsConfig = LldsConfig()
    """Keeps good actions likely."""
    importance: ImportanceConfig = ImportanceConfig()
    """Corrects for what sampled."""
    mask_overlong: bool = False
    """Whether an episode whose turns, tokens or time ran out is compared with the others and not trained on (DAPO, arXiv
    2503.14476, section 3.4).
    """
    max_grad_norm: float = Field(1.0, gt=0)
    """The norm that gradients are cut to."""
    tokens_per_micro_batch: int | None = Field(None, ge=1)
    """The most tokens whose activations are held at once; null picks it by memory. No gradient changes by more than rounding."""
    packing: Literal["prefix_tree", "episodes", "none"] = "prefix_tree"
    """How episodes share a pass of the model: prefix_tree computes what they have in common once, episodes lays them side by
    side, none runs each by itself. No gradient changes by more than rounding.
    """
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, for less memory and more time."""
    checkpoint_every: int = Field(5, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest stay, beside the best."""
    workers: int = Field(1, ge=1)
    """Trainer processes that share each update, every one with the whole model: they compute the gradients of their own groups,
    dealt by tokens, and add them up.
    """
    shard: bool = False
    """Whether each keeps a share of weights, gradients and moments, and layers are put together where they are computed (FSDP);
    for `model.lora: null` alone.
    """
    threads: int = Field(2, ge=1)
    """Of each trainer process on a CPU."""
    watch: WatchConfig = WatchConfig()
    """Looks for a collapse."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                "schedule constant has no warm-up; set schedule to constant_with_warmup, or warmup_steps to 0"
            )
        if self.shard and self.workers == 1:
            raise ValueError(
                "shard deals weights out to several trainer processes; set workers above 1, or shard to false"
            )
        if self.llds.weight and self.updates_per_batch * self.minibatches == 1:
            raise ValueError(
                "llds acts only where a batch has several updates; set updates_per_batch or minibatches above 1, or "
                "llds.weight to 0"
            )
        return self
