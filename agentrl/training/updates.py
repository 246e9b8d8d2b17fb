"""What an update is made of: how often a batch is trained on, and what is added to TRL's loss."""

from __future__ import annotations

from dataclasses import dataclass

from agentrl.training.importance import Mode
from agentrl.training.kl import Estimator


@dataclass(frozen=True, slots=True)
class Updates:
    """How often a batch is trained on.

    Attributes:
        group_size: the episodes of a group, which stay together.
        epochs: passes over a batch.
        minibatches: parts of a batch, with an update for each.
        seed: of the order in which groups are dealt.
    """

    group_size: int
    epochs: int = 1
    minibatches: int = 1
    seed: int = 0

    @property
    def per_batch(self) -> int:
        return self.epochs * self.minibatches


@dataclass(frozen=True, slots=True)
class Additions:
    """What agentrl adds to TRL's loss.

    Attributes:
        importance: mode and cap of the weights that correct for the policy that sampled, see `importance_weights`; None
            weighs nothing.
        kl_estimator, kl_in_reward: what the KL divergence is estimated by (see agentrl.training.kl), and whether it is taken
            off advantages instead of added to the loss. TRL's `beta` is its coefficient; k3 in the loss is TRL's own term.
        entropy_bonus: times the mean entropy of the trained tokens is taken off the loss.
        llds_weight: the weight of the LLDS term (see agentrl.training.llds), a mean over tokens as the loss takes it. It
            keeps log-probabilities from falling below those before the batch, so it is 0 in the first update on a batch.
        llds_tolerance: in nats per token; an action counts as unchanged if its mean log-probability fell by no more.
    """

    importance: tuple[Mode, float] | None = None
    kl_estimator: Estimator = "k3"
    kl_in_reward: bool = False
    entropy_bonus: float = 0.0
    llds_weight: float = 0.0
    llds_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.llds_weight < 0 or self.llds_tolerance < 0:
            raise ValueError(
                f"llds_weight and llds_tolerance must be at least 0, got {self.llds_weight!r} and {self.llds_tolerance!r}"
            )


NOTHING_ADDED = Additions()
