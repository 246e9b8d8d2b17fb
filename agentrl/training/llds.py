"""LLDS: keeps what the policy did well from becoming less likely (arXiv 2512.04220, equation 4), on plain tensors.

    delta = old_logp - logp                                         for each token, in nats
    penalty = [A >= 0] [mean of delta over the action > tolerance] max(0, delta)

An action is the model's tokens of one turn. Rollouts with an advantage of exactly 0 are kept as well, as in the paper:
nothing trains them, but what other rollouts train can make them less likely. Two things differ from the paper. It gates
at a fall of more than 0; here a tolerance lies between, because rounding alone moves log-probabilities and
max(0, delta) has its full slope at any delta > 0. And it averages over the rollouts with A >= 0; here the caller chooses
the average.

Both log-probabilities are the trainer's own: `old_logp` is that before the first update on the batch, in which the penalty
is 0 therefore. It acts in later updates on the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Displacement:
    """How far the likelihood of B episodes of C tokens fell.

    Attributes:
        penalty: [B, C], in nats, at least 0, exactly 0 wherever LLDS does not act; differentiable in the log-probabilities.
        actions: [], the number of actions with a token of A >= 0.
        fallen: [], how many of these fell.
    """

    penalty: torch.Tensor
    actions: torch.Tensor
    fallen: torch.Tensor


def displacement(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    own: torch.Tensor,
    turn_index: torch.Tensor,
    tolerance: float,
) -> Displacement:
    """Return the LLDS penalty of each token, which lowers no likelihood: its gradient is -1 where it acts, else 0.

    Args:
        logps: [B, C], log-probabilities under the policy that is trained; finite where `own`.
        old_logps: [B, C], those before the first update on the batch; finite where `own`.
        advantages: [B] for each episode or [B, C] for each token.
        own: bool [B, C], true at the model's own tokens of episodes that are trained.
        turn_index: long [B, C], the turn that each token belongs to, 0 to C-1; any of these at padding.
        tolerance: the mean fall in nats per token, at least 0, up to which an action counts as unchanged.
    """
    # where, not a product, because what stands at other positions need not be finite.
    delta = torch.where(own, old_logps - logps, 0.0)
    # No episode has more turns than tokens, so C places hold the sums by turn.
    by_turn = torch.zeros_like(delta)
    change = by_turn.scatter_add(1, turn_index, delta.detach())
    length = by_turn.scatter_add(1, turn_index, own.to(delta.dtype))
    fell = change > tolerance * length
    preserved = own & (per_token(advantages, own) >= 0)
    penalty = torch.where(preserved & fell.gather(1, turn_index), torch.relu(delta), 0.0)
    actions = by_turn.scatter_add(1, turn_index, preserved.to(delta.dtype)) > 0
    return Displacement(penalty, actions.sum(), (actions & fell).sum())


def per_token(advantages: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return advantages, [B] for each episode or [B, C] for each token, as [B, C], the shape of `like`."""
    return advantages if advantages.dim() == 2 else advantages[:, None].expand_as(like)
