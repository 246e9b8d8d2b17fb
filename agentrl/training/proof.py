"""Whether engines sample with the weights that are trained: an engine that ignores them samples a policy that never learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agentrl.types import AgentRLError

# An explanation of what was sampled holds if it is nearer than this share of what training changes. Two cannot hold.
_NEAR = 0.5
# Below it, in nats a token, rounding decides.
_LEAST_EFFECT = 1e-5
# Beyond it, in nats a token, it does not: ten times the difference that is usual between engines and trainers in bf16.
_MOST_ROUNDING = {torch.float32: 0.02, torch.bfloat16: 0.25}


class WeightsNotUsed(AgentRLError):
    """Engines sample from another model than the one that is trained."""


def require_agreement(sampled: torch.Tensor, trained: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that log-probabilities of the same tokens, the sampler's and the trainer's, are those of one model.

    Where nothing else is there to compare with, this is all that can be said: an engine that ignores new weights shows once
    they are far enough from its own.

    Args:
        sampled, trained: [S], in nats.
        dtype: what both compute in.

    Raises:
        WeightsNotUsed: if they differ by more than rounding does.
    """
    difference = (sampled - trained).abs().mean().item()
    if difference > _MOST_ROUNDING[dtype]:
        raise WeightsNotUsed(
            f"the engines do not sample from the weights that are trained: their log-probabilities differ by {difference:.2g} "
            f"nats a token, and rounding explains {_MOST_ROUNDING[dtype]:g}; look for an engine that ignores the weights "
            "published to it or computes this model in another way, and for other weights behind model.path"
        )


@dataclass(frozen=True, slots=True)
class Evidence:
    """Mean distances of log-probabilities at sampled tokens, in nats.

    The untrained model is the one without its adapter, or, where all weights are trained, the one that training began with.

    Attributes:
        effect: of the trainer's from the untrained model's.
        from_trained: of the sampler's from the trainer's.
        from_untrained: of the sampler's from the untrained model's.
    """

    effect: float
    from_trained: float
    from_untrained: float

    @classmethod
    def of(cls, sampled: torch.Tensor, trained: torch.Tensor, untrained: torch.Tensor) -> Evidence:
        """Compare log-probabilities [S] of the same tokens: the sampler's, the trainer's and the untrained model's."""
        return cls(
            effect=(trained - untrained).abs().mean().item(),
            from_trained=(sampled - trained).abs().mean().item(),
            from_untrained=(sampled - untrained).abs().mean().item(),
        )

    def proves_use(self) -> bool:
        """Return True if the trained weights explain what was sampled, False if neither they nor the untrained ones do.

        Raises:
            WeightsNotUsed: if the untrained model explains what was sampled.
        """
        if self.effect < _LEAST_EFFECT:
            return False
        if self.from_trained < _NEAR * self.effect:
            return True
        if self.from_untrained >= _NEAR * self.effect:
            return False
        raise WeightsNotUsed(
            f"the engines do not use the trained weights: what they sampled differs by {self.from_untrained:.2g} nats a token "
            f"from the untrained model and by {self.from_trained:.2g} from the trained one, and training changes "
            f"{self.effect:.2g}; look for an engine that ignores or refuses the weights of a layer, and for other weights "
            "behind model.path"
        )
