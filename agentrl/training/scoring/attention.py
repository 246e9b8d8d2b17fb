"""Attention over a prefix tree, under a name that transformers' models can be set to.

A CPU computes it block by block (see `blocks`) with PyTorch's flash kernel, and keeps of each layer no more than a plain
pass does. CUDA uses FlexAttention, which skips the blocks of 128 x 128 tokens that hold no pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from agentrl.training.scoring.blocks import Block, tree_blocks
from agentrl.training.scoring.tree import Pack

IMPLEMENTATION = "agentrl_prefix_tree"

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(slots=True, eq=False)
class Tree:
    """Who sees whom in a pack, in the form that attention takes, made once for each width of a window."""

    position_ids: torch.Tensor
    ends: torch.Tensor
    _made: dict[int | None, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pack: Pack) -> Tree:
        return cls(pack.position_ids[0], pack.ends)

    def blocks(self, window: int | None) -> list[Block]:
        if window not in self._made:
            self._made[window] = tree_blocks(self.position_ids, self.ends, window)
        return self._made[window]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Return FlexAttention's block mask."""
        if window not in self._made:
            from torch.nn.attention.flex_attention import create_block_mask

            ends, depths, size = self.ends.to(device), self.position_ids.to(device), len(self.ends)

            def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                seen = (key <= query) & (query < ends[key])
                return seen if window is None else seen & (depths[query] - depths[key] < window)

            self._made[window] = create_block_mask(sees, None, None, size, size, device=device)
        return self._made[window]


class _BlockAttention(torch.autograd.Function):
    """Attention [1, H, N, D] of queries over keys and values [1, K, N, D] that H/K heads share, block by block."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        # In this layout the models read the heads of a token side by side.
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        normalisers = []
        for block in blocks:
            found, normaliser = _forward(
                query[:, :, block.start : block.stop],
                _seen(key, block),
                _seen(value, block),
                is_causal=block.mask is None,
                attn_mask=block.mask,
                scale=scale,
            )
            out[:, :, block.start : block.stop] = found
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *normalisers = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for block, normaliser in zip(ctx.blocks, normalisers, strict=True):
            asking = slice(block.start, block.stop)
            of_query[:, :, asking], keys, values = _backward(
                gradient[:, :, asking],
                query[:, :, asking],
                _seen(key, block),
                _seen(value, block),
                out[:, :, asking],
                normaliser,
                0.0,
                block.mask is None,
                attn_mask=block.mask,
                scale=ctx.scale,
            )
            _add(of_key, keys, block)
            _add(of_value, values, block)
        return of_query, of_key, of_value, None, None


def _seen(values: torch.Tensor, block: Block) -> torch.Tensor:
    if isinstance(block.ancestors, int):
        return values[:, :, block.ancestors : block.stop]
    return torch.cat([values[:, :, block.ancestors], values[:, :, block.start : block.stop]], dim=2)


def _add(total: torch.Tensor, part: torch.Tensor, block: Block) -> None:
    """Add gradients of what a block sees, [1, K, P + Q, D], where they belong in [1, K, N, D]."""
    if isinstance(block.ancestors, int):
        total[:, :, block.ancestors : block.stop] += part
        return
    before = len(block.ancestors)
    # A block sees each token once, so that no two of these are the same.
    total[:, :, block.ancestors] += part[:, :, :before]
    total[:, :, block.start : block.stop] += part[:, :, before:]


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree: Tree | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a tree of N tokens; the arguments and the result [1, N, H, D] are those of transformers' functions.

    Raises:
        RuntimeError: if the model does not hand on `tree` to its layers.
    """
    if tree is None:
        raise RuntimeError(f"{type(module).__name__} was not given the tree that its tokens form")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotation leaves these in fp32 where weights in fp32 compute in bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        out = _BlockAttention.apply(query, key, value, tree.blocks(sliding_window), scale)
    else:
        out = _flex()(
            query, key, value, block_mask=tree.block_mask(sliding_window, query.device), scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2), None


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _no_mask(*arguments: Any, **named: Any) -> None:
    """Make no mask: the tree says who sees whom."""


AttentionInterface.register(IMPLEMENTATION, tree_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
