"""Importance weights: what corrects for rollouts of another policy than the one that is trained, on plain tensors."""

from __future__ import annotations

from typing import Literal

import torch

Mode = Literal["truncate", "mask", "mask_episode"]


def importance_weights(
    logps: torch.Tensor, sampler_logps: torch.Tensor, own: torch.Tensor, mode: Mode, cap: float
) -> torch.Tensor:
    """Return w = exp(logp - sampler's logp) for each token [B, C], bounded in one of three ways.

    truncate: min(w, cap), truncated importance sampling (Ionides, Journal of Computational and Graphical Statistics 17,
        2008): unbiased up to what is cut, and of bounded variance.
    mask: 0 where w is not within 1/cap to cap.
    mask_episode: 0 all over an episode whose geometric mean of w is not within 1/cap to cap, else min(w, cap).

    Args:
        logps, sampler_logps: [B, C], under the policy that is trained before this batch, and under the one that sampled.
        own: bool [B, C], true at the model's own tokens; what is returned elsewhere means nothing.
        mode: see above.
        cap: above 1.
    """
    change = logps - sampler_logps
    weights = change.exp()
    if mode == "truncate":
        return weights.clamp(max=cap)
    if mode == "mask":
        return torch.where((weights > cap) | (weights < 1 / cap), 0.0, weights)
    mean = (change * own).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)
    return torch.where((mean.exp() > cap) | (mean.exp() < 1 / cap), 0.0, weights.clamp(max=cap))
