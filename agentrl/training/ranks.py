"""Several trainer processes that compute the gradients of one update together.

Each process holds the whole model and computes the gradients of its own episodes; these are added up before the optimizer
takes its step, which is then the same everywhere. Nothing waits for a certain number of passes, so that shares may differ
and be empty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Numbers that are added up at once; a larger tensor is alone.
_BUCKET = 1 << 26


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size` ones; the first, of rank 0, samples, records and saves."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_this_process(cls) -> Ranks:
        """Return what torch's process group says, or the only rank where there is no group."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which hold tensors of the same shapes."""
        if self.size == 1:
            return
        for some in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in some])
            dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on the first.

        Raises:
            FirstRankFailed: on the others, if `make` raised; on the first, what it raised.
        """
        if self.size == 1:
            return make()
        # These processes are of one job, as Ray's actors are.
        made: list[Any] = [None, False]
        if self.rank == 0:
            try:
                made = [make(), True]
            finally:
                dist.broadcast_object_list(made)
        else:
            dist.broadcast_object_list(made)
        if not made[1]:
            raise FirstRankFailed("the first trainer process has no batch to train on")
        return made[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield tensors, a few of them at a time: each bucket is copied, and all gradients of a model would take it twice."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(other.numel() for other in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


ALONE = Ranks()


class FirstRankFailed(Exception):
    """The rank that samples has ended; it says why."""


def hide_ranks() -> None:
    """Have transformers and accelerate take this process for the only one: what ranks share is up to `Ranks`."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def share_out(tokens: Sequence[int], group_size: int, ranks: int) -> list[list[int]]:
    """Deal whole groups of episodes to ranks, the largest first and each to the rank with the fewest tokens.

    Args:
        tokens: of each episode, group after group; 0 for one that does not run.
        group_size: the episodes of a group.
        ranks: how many there are.

    Returns:
        For each rank the indexes of its episodes, which may be none.
    """
    groups = [range(start, start + group_size) for start in range(0, len(tokens), group_size)]
    sizes = [sum(tokens[i] for i in group) for group in groups]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(groups)), key=lambda n: (-sizes[n], n)):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        shares[least] += groups[number]
    return shares
