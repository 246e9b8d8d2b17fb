"""The MLP of a model's last layer, computed at the tokens that predict alone.

What it returns for a token goes nowhere but into that token's last hidden state, and few tokens of an episode are asked to
predict one of the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

# A model may be prepared twice.
_MARK = "_only_where_asked"


def only_where_asked(decoder: Any) -> bool:
    """Have the last layer leave out its MLP where `tree.asked` does not ask for it, and tell whether it now does so.

    A pass without a tree is as before. A layer whose MLP is more than linear layers (experts, convolutions), or that has none
    by that name, keeps its own path.

    Args:
        decoder: a model of transformers without its head.
    """
    layers = getattr(decoder, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or not _is_plain(mlp):
        return False
    if hasattr(mlp.forward, _MARK):
        return True
    compute, asked = mlp.forward, None

    def before(layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Also where the layer is computed again in the backward pass, for which other passes may have come between.
        nonlocal asked
        tree = named.get("tree")
        asked = None if tree is None else tree.asked

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if asked is None:
            return compute(hidden)
        rows = asked.to(hidden.device)
        found = compute(hidden[:, rows])
        return found.new_zeros(hidden.shape).index_copy(1, rows, found)

    setattr(forward, _MARK, True)
    layers[-1].register_forward_pre_hook(before, with_kwargs=True)
    mlp.forward = forward
    return True


def _is_plain(mlp: torch.nn.Module) -> bool:
    holders = [module for module in mlp.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(isinstance(module, torch.nn.Linear | LoraLayer) for module in holders)
