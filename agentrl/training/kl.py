"""The KL divergence of the policy p from its reference p_ref, estimated at sampled tokens, on plain tensors.

With r = p_ref / p at a token that p sampled (Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html):

    k1 = -log r        k2 = (log r)^2 / 2        k3 = r - 1 - log r

The mean of k1 and of k3 is KL(p || p_ref), and that of k2 is near it where p is near p_ref. Which of them has its gradient is
another question (Tang and Munos, arXiv 2506.09477; Liu et al., arXiv 2510.01555). With w = p / p_old, the ratio to the policy
that the token was sampled with, the means over what that policy samples in one place are

    in the loss      E[grad(w k3)] = E[w grad k2] = grad KL(p || p_ref)        E[w grad k1] = 0
    in the reward    E[w k1 grad log p] = grad KL(p || p_ref)
                     E[w k3 grad log p] = grad KL(p || p_ref) - grad KL(p_ref || p)

The last one is 0 to first order near p_ref, and so is that of k2 in the reward.
"""

from __future__ import annotations

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def kl_estimates(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Return an estimate in nats for each token [...], from its log-probabilities under the policy and the reference."""
    log_ratio = ref_logps - logps
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1
