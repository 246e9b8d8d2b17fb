"""LoRA layers at the cost of one product forward and one backward.

PEFT computes W x and then B A x beside it, and autograd runs back through each of these. The sum is W' x with
W' = W + s B A, and its exact gradients are

    dx = W'^T dy        dA = s (B^T dy) x^T        dB = s dy (A x)^T

W' is made anew when A or B have changed; both are thin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear


class _MergedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        merged: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        return torch.nn.functional.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        of_x = gradient @ merged if ctx.needs_input_grad[0] else None
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        of_a = (gradient @ b).mul_(ctx.scaling).T @ x
        of_b = gradient.T @ (x @ a.T).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None


def merge_lora(model: torch.nn.Module, adapter: str = "default") -> int:
    """Have each LoRA layer of `adapter` compute with merged weights, and return how many do.

    Values and gradients stay those of PEFT, up to rounding. Layers that PEFT computes otherwise (dropout, DoRA, quantised or
    transposed weights, an adapter on embeddings) keep its own path, and so does every layer while its adapter is switched
    off or is another than `adapter`. A merged layer holds its weights twice; the base weights must not change.
    """
    layers = [module for module in model.modules() if _is_plain(module, adapter)]
    for layer in layers:
        layer.forward = _forward_merged(layer, layer.forward, adapter)
    return len(layers)


def _is_plain(module: torch.nn.Module, adapter: str) -> bool:
    # A subclass may compute anything.
    if type(module) is not LoraLinear or adapter not in module.lora_A:
        return False
    return (
        type(module.get_base_layer()) is torch.nn.Linear
        and isinstance(module.lora_dropout[adapter], torch.nn.Identity)
        and not module.fan_in_fan_out
        and not module.lora_bias[adapter]
        and adapter not in module.lora_variant
    )


def _forward_merged(layer: LoraLinear, original: Callable[..., torch.Tensor], adapter: str) -> Callable[..., Any]:
    merged: torch.Tensor | None = None
    made_of: tuple[torch.Tensor, ...] = ()

    def forward(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal merged, made_of
        if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter] or arguments or named:
            return original(x, *arguments, **named)
        base = layer.get_base_layer()
        a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        # Values are compared, because a fused optimizer changes weights without a new version of them.
        if merged is None or not (a.equal(made_of[0]) and b.equal(made_of[1])):
            made_of = a.detach().clone(), b.detach().clone()
            with torch.no_grad():
                merged = torch.addmm(base.weight, b, a, alpha=scaling)
        return _MergedLora.apply(x, merged, base.bias, a, b, scaling)

    return forward
