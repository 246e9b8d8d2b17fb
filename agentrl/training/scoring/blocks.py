"""Attention over a prefix tree, cut into blocks that a dense kernel computes: which tokens ask, and which they look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# A call of the kernel costs about as much as so many pairs of tokens.
_PAIRS_OF_A_CALL = 4096
# The kernel computes the pairs that a mask hides. In a long run of tokens these are nearly half, in pieces of it few.
_PIECE = 128


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Tokens `start` to `stop` of a tree, which look at their ancestors and at one another.

    Attributes:
        start, stop: Q tokens in a row ask.
        ancestors: long [P], the tokens before the block that all of its tokens see, or the start of a slice that ends
            at `start`.
        mask: float [1, 1, Q, P + Q], 0 where a token sees another, else -inf; None where each sees all up to itself and P
            is 0.
    """

    start: int
    stop: int
    ancestors: torch.Tensor | int
    mask: torch.Tensor | None


def tree_blocks(
    position_ids: torch.Tensor, ends: torch.Tensor, window: int | None = None, shared: int = 0
) -> list[Block]:
    """Cut a tree of N tokens into blocks whose calls take the least time.

    Args:
        position_ids: long [N], the depth of each token.
        ends: long [N], where its subtree ends.
        window: a token sees only the last `window` tokens up to itself; None sees all.
        shared: so many tokens, which all later ones see, ask nothing.
    """
    depths, until = position_ids.numpy(), ends.numpy()
    starts, stops = _nodes(depths, until, shared)
    calls = _calls(starts, stops, depths, until, shared)
    return [_block(start, stop, path, depths, until, window) for start, stop, path in calls]


def _nodes(depths: np.ndarray, ends: np.ndarray, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the runs of tokens without a branch start and stop, and within them pieces at certain depths.

    The first `shared` tokens are one run.
    """
    breaks = (depths[1:] != depths[:-1] + 1) | (ends[1:] != ends[:-1]) | (depths[1:] % _PIECE == 0)
    if shared:
        breaks[: shared - 1], breaks[shared - 1] = False, True
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    return starts, np.concatenate([starts[1:], [len(depths)]])


def _calls(
    starts: np.ndarray, stops: np.ndarray, depths: np.ndarray, ends: np.ndarray, shared: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield start, stop and ancestors [P] of each block: a node alone, or with its whole subtree where that is cheaper.

    The node of the first `shared` tokens is none.
    """
    count = len(starts)
    cheapest, merged = np.zeros(count, np.int64), np.zeros(count, bool)
    parents, open_nodes = np.full(count, -1), []
    for node, start in enumerate(starts):
        while open_nodes and ends[starts[open_nodes[-1]]] <= start:
            open_nodes.pop()
        parents[node] = open_nodes[-1] if open_nodes else -1
        open_nodes.append(node)
    of_children = np.zeros(count, np.int64)
    # Children stand behind their parent.
    for node in range(count - 1, -1, -1):
        start, stop, before = starts[node], stops[node], depths[starts[node]]
        size, subtree = stop - start, ends[start] - start
        apart = size * (before + size) + _PAIRS_OF_A_CALL + of_children[node]
        together = subtree * (before + subtree) + _PAIRS_OF_A_CALL
        merged[node] = together <= apart
        if shared and node == 0:
            merged[node], apart, together = False, of_children[node], of_children[node]
        cheapest[node] = min(apart, together)
        if parents[node] >= 0:
            of_children[parents[node]] += cheapest[node]
    total = len(depths)
    own = total - shared
    if own * total + _PAIRS_OF_A_CALL <= cheapest[parents < 0].sum():
        yield shared, total, np.arange(shared)
        return
    path, done = np.zeros(int(depths.max()) + 1, np.int64), 0
    for node in range(count):
        start, stop, before = int(starts[node]), int(stops[node]), int(depths[starts[node]])
        path[before : before + stop - start] = np.arange(start, stop)
        if start < max(done, shared):
            continue
        done = int(ends[start]) if merged[node] else stop
        yield start, done, path[:before].copy()


def _block(
    start: int, stop: int, ancestors: np.ndarray, depths: np.ndarray, ends: np.ndarray, window: int | None
) -> Block:
    asking = np.arange(start, stop)
    seen = np.concatenate([ancestors, asking])
    visible = (seen <= asking[:, None]) & (asking[:, None] < ends[seen])
    if window is not None:
        visible &= depths[asking][:, None] - depths[seen] < window
    before = len(ancestors)
    in_a_row = before == 0 or bool(ancestors[0] == start - before and ancestors[-1] == start - 1)
    plain = before == 0 and bool((visible == np.tri(stop - start, dtype=bool)).all())
    mask = None if plain else torch.where(torch.from_numpy(visible), 0.0, -torch.inf)[None, None]
    return Block(start, stop, start - before if in_a_row else torch.from_numpy(ancestors), mask)
