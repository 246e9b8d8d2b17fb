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


def only_where_asked(decoder: Any) -> None:
    """Have the last layer leave out its MLP where `tree.asked` does not ask for it.

    A pass without a tree is as before. A layer whose MLP is more than linear layers (experts, convolutions), or that has none
    by that name, keeps its own path.

    Args:
        decoder: a model of transformers without its head; it may be prepared more than once.
    """
    layers = getattr(decoder, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or not _is_plain(mlp) or hasattr(mlp, _MARK):
        return
    rows: torch.Tensor | None = None
    shape = torch.Size()

    def ask(layer: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Also where the layer is computed again in the backward pass, for which other passes may have come between.
        nonlocal rows
        tree = named.get("tree")
        rows = None if tree is None else tree.asked

    def leave_out(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal shape
        if rows is None:
            return None
        hidden, *others = arguments
        shape = hidden.shape
        return hidden[:, rows.to(hidden.device)], *others

    def put_back(layer: torch.nn.Module, arguments: Any, found: torch.Tensor) -> torch.Tensor | None:
        if rows is None:
            return None
        return found.new_zeros(shape).index_copy(1, rows.to(found.device), found)

    layers[-1].register_forward_pre_hook(ask, with_kwargs=True)
    mlp.register_forward_pre_hook(leave_out)
    mlp.register_forward_hook(put_back)
    setattr(mlp, _MARK, True)


def _is_plain(mlp: torch.nn.Module) -> bool:
    holders = [module for module in mlp.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(isinstance(module, torch.nn.Linear | LoraLayer) for module in holders)
