"""What a loss divides by, so that the parts that packs compute add up to the loss of the whole minibatch."""

from __future__ import annotations

import torch

from agentrl.training.batch import Minibatch

# TRL's names of the losses that are means over all tokens of a minibatch.
_OVER_TOKENS = ("dapo", "cispo", "vespo", "bnpo")


def share_of_loss(loss: str, own: torch.Tensor, batch: Minibatch) -> float:
    """Return what TRL's loss over the episodes with the tokens `own` [n, C] weighs in that over a whole minibatch."""
    if loss in _OVER_TOKENS:
        return int(own.sum()) / int(batch.own.sum())
    return len(own) / len(batch.runs)


def part_of_mean(
    loss: str, values: torch.Tensor, own: torch.Tensor, batch: Minibatch, max_completion_length: int | None
) -> torch.Tensor:
    """Return some episodes' part of the minibatch's mean of `values` [n, C], which are 0 outside `own` [n, C].

    The mean is that of the loss: over tokens (dapo, cispo, vespo, bnpo), over episodes of `max_completion_length` tokens
    (dr_grpo), over episodes of their sums (luspo), else over each episode's tokens and then over episodes.
    """
    if loss in _OVER_TOKENS:
        return values.sum() / batch.own.sum()
    if loss == "dr_grpo":
        return values.sum() / (len(batch.runs) * max_completion_length)
    if loss == "luspo":
        return values.sum() / len(batch.runs)
    return (values.sum(1) / own.sum(1).clamp(min=1)).sum() / len(batch.runs)
