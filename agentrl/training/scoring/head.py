"""Log-probabilities and entropies of a linear output layer, without its logits: these live for some tokens at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch

Entropy = Literal["none", "values", "gradients"]

# Logits that are held at once, in numbers.
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}


def head_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropy: Entropy = "none",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log softmax((hidden weight^T + bias) / temperature) at the targets, and on demand the entropies.

    The gradient of a token's log-probability by its hidden state, (weight[target] - sum_v p_v weight[v]) / temperature, does
    not depend on the loss, nor does that of its entropy. Both are computed beside the values, where the logits are there
    anyway. Memory grows with neither the vocabulary times M nor the number of losses.

    Args:
        hidden: [M, H].
        weight: [V, H].
        bias: [V] or None.
        targets: long [M].
        temperature: above 0.
        entropy: whether to compute entropies, and whether gradients flow through them.

    Returns:
        float32 [M] in nats, and float32 [M] in nats or None.
    """
    logps, entropies = _HeadScores.apply(hidden, weight, bias, targets, temperature, entropy)
    return logps, None if entropy == "none" else entropies if entropy == "gradients" else entropies.detach()


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        entropy: Entropy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(hidden)
        logps = hidden.new_empty(count, dtype=torch.float32)
        entropies = logps.new_empty(0 if entropy == "none" else count)
        by_hidden, of_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        slopes = torch.empty_like(hidden) if by_hidden else None
        entropy_slopes = torch.empty_like(hidden) if by_hidden and entropy == "gradients" else None
        for rows in _chunks(count, weight):
            logits = _logits(hidden[rows], weight, bias, temperature)
            normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            logits -= normaliser
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1)
            probabilities = logits.exp()
            if entropy != "none":
                # 0 times minus infinity is 0 here.
                entropies[rows] = -(probabilities * logits).nan_to_num_().sum(-1)
            if entropy_slopes is not None:
                # d entropy / d logit_v = -p_v (log p_v + entropy)
                weighed = -(probabilities * (logits + entropies[rows, None])).nan_to_num_()
                entropy_slopes[rows] = (weighed.to(weight.dtype) @ weight) / temperature
            if slopes is not None:
                mean = probabilities.to(weight.dtype) @ weight
                slopes[rows] = (weight[targets[rows]] - mean) / temperature
        ctx.save_for_backward(slopes, entropy_slopes, hidden if of_weights else None, weight, bias, targets)
        ctx.temperature, ctx.entropy = temperature, entropy
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, of_logps: torch.Tensor, of_entropies: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes, entropy_slopes, hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden = None
        if slopes is not None:
            of_hidden = (slopes.float() * of_logps[:, None]).to(slopes.dtype)
            if entropy_slopes is not None:
                of_hidden += (entropy_slopes.float() * of_entropies[:, None]).to(slopes.dtype)
        of_weight = of_bias = None
        if hidden is not None:
            # Logits are made again: what they weigh depends on the loss.
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
            of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            for rows in _chunks(len(hidden), weight):
                of_logits = _of_logits(
                    torch.log_softmax(_logits(hidden[rows], weight, bias, ctx.temperature), dim=-1),
                    targets[rows],
                    of_logps[rows],
                    of_entropies[rows] if ctx.entropy == "gradients" else None,
                )
                of_logits = (of_logits / ctx.temperature).to(weight.dtype)
                of_weight += of_logits.T @ hidden[rows]
                if of_bias is not None:
                    of_bias += of_logits.sum(0)
            of_weight = of_weight.to(weight.dtype)
            of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight, of_bias, None, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits / temperature


def _of_logits(
    log_probabilities: torch.Tensor, targets: torch.Tensor, of_logps: torch.Tensor, of_entropies: torch.Tensor | None
) -> torch.Tensor:
    probabilities = log_probabilities.exp()
    gradient = -probabilities * of_logps[:, None]
    gradient.scatter_add_(1, targets[:, None], of_logps[:, None])
    if of_entropies is not None:
        terms = (probabilities * log_probabilities).nan_to_num_()
        gradient -= of_entropies[:, None] * (terms - probabilities * terms.sum(-1, keepdim=True))
    return gradient


def _chunks(count: int, weight: torch.Tensor) -> list[slice]:
    size = max(1, _LOGITS.get(weight.device.type, _LOGITS["cuda"]) // len(weight))
    return [slice(start, start + size) for start in range(0, count, size)]
