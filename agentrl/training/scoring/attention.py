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
from agentrl.training.scoring.trunk import Trunk

IMPLEMENTATION = "agentrl_prefix_tree"

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(slots=True, eq=False)
class Tree:
    """Who sees whom in a pass, in the form that attention takes, made once for each width of a window.

    Attributes:
        position_ids, ends: see `Pack`.
        asked: long [A], the tokens of the pass whose last hidden states somebody reads, ascending.
        trunk: what all tokens of the pass see beside the pass, as its first tokens; None if there is nothing.
        becomes: the trunk that this pass computes, if it does that.
    """

    position_ids: torch.Tensor
    ends: torch.Tensor
    asked: torch.Tensor
    trunk: Trunk | None = None
    becomes: Trunk | None = None
    _made: dict[int | None, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pack: Pack) -> Tree:
        asked = pack.sources.unique() - pack.shared
        return cls(pack.position_ids[0], pack.ends, asked[asked >= 0], pack.trunk)

    @classmethod
    def of_trunk(cls, trunk: Trunk) -> Tree:
        size = len(trunk)
        return cls(torch.arange(size), torch.full((size,), size), trunk.asked, becomes=trunk)

    def blocks(self, window: int | None) -> list[Block]:
        if window not in self._made:
            shared = 0 if self.trunk is None else len(self.trunk)
            self._made[window] = tree_blocks(self.position_ids, self.ends, window, shared)
        return self._made[window]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Return FlexAttention's block mask."""
        if window not in self._made:
            from torch.nn.attention.flex_attention import create_block_mask

            ends, depths, size = self.ends.to(device), self.position_ids.to(device), len(self.ends)
            shared = 0 if self.trunk is None else len(self.trunk)

            def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                query = query + shared
                seen = (key <= query) & (query < ends[key])
                return seen if window is None else seen & (depths[query] - depths[key] < window)

            self._made[window] = create_block_mask(sees, None, None, size - shared, size, device=device)
        return self._made[window]


class _BlockAttention(torch.autograd.Function):
    """Attention [1, H, Q, D] of the last Q of N tokens over keys and values [1, K, N, D] that H/K heads share, by blocks."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scale: float
    ) -> torch.Tensor:
        # In this layout the models read the heads of a token side by side.
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        normalisers, first = [], key.shape[2] - query.shape[2]
        for block in blocks:
            asking = slice(block.start - first, block.stop - first)
            found, normaliser = _forward(
                query[:, :, asking],
                _seen(key, block),
                _seen(value, block),
                is_causal=block.mask is None,
                attn_mask=block.mask,
                scale=scale,
            )
            out[:, :, asking] = found
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *normalisers = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        first = key.shape[2] - query.shape[2]
        for block, normaliser in zip(ctx.blocks, normalisers, strict=True):
            asking = slice(block.start - first, block.stop - first)
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
    """Attend over a tree; the arguments are those of transformers' functions, and so is the result [1, N, H, D].

    N are the tokens of the pass, all of the tree's but those of its trunk.

    Raises:
        RuntimeError: if the model does not hand on `tree` to its layers.
    """
    if tree is None:
        raise RuntimeError(f"{type(module).__name__} was not given the tree that its tokens form")
    if tree.becomes is not None:
        tree.becomes.keep(module.layer_idx, key, value)
    if tree.trunk is not None:
        key, value = tree.trunk.before(module.layer_idx, key, value)
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

    # With windows, trunks and passes without gradients there are more graphs than the usual 8, and what is not compiled
    # would make the whole matrix of scores. `fullgraph` makes that an error.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _no_mask(*arguments: Any, **named: Any) -> None:
    """Make no mask: the tree says who sees whom."""


AttentionInterface.register(IMPLEMENTATION, tree_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
