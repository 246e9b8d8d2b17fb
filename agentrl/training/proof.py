"""Whether engines sample with the adapter that is trained: an engine that ignores it samples a policy that never learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentrl.types import AgentRLError

# An explanation of what was sampled holds if it is nearer than this share of what the adapter changes. Two cannot hold.
_NEAR = 0.5
# Below it, in nats a token, rounding decides.
_LEAST_EFFECT = 1e-5


class AdapterNotUsed(AgentRLError):
    """Engines sample from the model without its adapter."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Mean distances of log-probabilities at sampled tokens, in nats.

    Attributes:
        effect: of the trainer's with the adapter from its own without.
        with_adapter: of the sampler's from the trainer's with the adapter.
        without_adapter: of the sampler's from the trainer's without.
    """

    effect: float
    with_adapter: float
    without_adapter: float

    @classmethod
    def of(cls, sampled: torch.Tensor, adapted: torch.Tensor, plain: torch.Tensor) -> Evidence:
        """Compare log-probabilities of the same tokens: the sampler's, and the trainer's with and without the adapter."""
        return cls(
            effect=(adapted - plain).abs().mean().item(),
            with_adapter=(sampled - adapted).abs().mean().item(),
            without_adapter=(sampled - plain).abs().mean().item(),
        )

    def proves_use(self) -> bool:
        """Return True if the adapter explains what was sampled, False if neither it nor its absence does.

        Raises:
            AdapterNotUsed: if the model without it explains what was sampled.
        """
        if self.effect < _LEAST_EFFECT:
            return False
        if self.with_adapter < _NEAR * self.effect:
            return True
        if self.without_adapter >= _NEAR * self.effect:
            return False
        raise AdapterNotUsed(
            f"the engines do not use the adapter: what they sampled differs by {self.without_adapter:.2g} nats a token from the "
            f"model without it and by {self.with_adapter:.2g} from the model with it, which changes {self.effect:.2g}; look "
            "for an engine that ignores or refuses the adapter's layers, and for other weights behind model.path"
        )
