"""Importance weights: what corrects for rollouts of another policy than the one that is trained, on plain tensors."""

from __future__ import annotations

from typing import Literal

import torch


def importance_weights(
    logps: torch.Tensor, sampler_logps: torch.Tensor, mode: Literal["truncate", "mask"], cap: float
) -> torch.Tensor:
    """Return w = exp(logp - sampler's logp) for each token [B, C], min(w, cap) or 0 where w is not within 1/cap to cap.

    Truncated importance sampling (Ionides, Journal of Computational and Graphical Statistics 17, 2008) for rollouts of
    older weights: unbiased up to what is cut, and of bounded variance.
    """
    weights = (logps - sampler_logps).exp()
    if mode == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights > cap) | (weights < 1 / cap), 0.0, weights)
