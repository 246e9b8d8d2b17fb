"""Token sequences as prefix trees: what several of them share is laid out once, and computed once.

A tree is a row of tokens in depth-first order. Of each token it knows where its subtree ends, which is all that attention
needs: token q sees token k if and only if `k <= q < ends[k]`, that is, if k is q itself or an ancestor of q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from agentrl.training.scoring.trunk import Trunk

# A pass costs about as much as so many tokens more in another one.
_LEAST_TRUNK = 16


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """The tokens of one episode, and which of them are scored.

    Attributes:
        ids: int [T].
        scored: int [S], the positions of the scored tokens, ascending, from 1 to T-1; the first token has nothing before it
            that predicts it.
    """

    ids: np.ndarray
    scored: np.ndarray

    def __post_init__(self) -> None:
        if len(self.scored) and not 1 <= self.scored[0] <= self.scored[-1] < len(self.ids):
            raise ValueError(
                f"scored positions must be within 1 to {len(self.ids) - 1}, got {self.scored[0]} to {self.scored[-1]}"
            )

    @property
    def inputs(self) -> np.ndarray:
        """The tokens that a model must read to predict the scored ones."""
        return self.ids[: self.scored[-1]] if len(self.scored) else self.ids[:0]

    def without_scores(self) -> TokenSequence:
        """Return the same tokens, of which none is scored."""
        return TokenSequence(self.ids, self.scored[:0])


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Sequences that share one pass of the model, as N tokens, and the M different predictions that they ask for.

    Attributes:
        members: the indexes of the sequences.
        ids: long [1, N].
        position_ids: long [1, N], the depth of each token in its tree.
        ends: long [N], where the subtree of each token ends.
        sources: long [M], the token whose hidden state predicts.
        targets: long [M], the id that is predicted.
        places: long [S], for each scored token, member after member, its prediction.
        trunk: the first P of the tokens, which all of them see, where another pass computes these; None if none does.
    """

    members: tuple[int, ...]
    ids: torch.Tensor
    position_ids: torch.Tensor
    ends: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    trunk: Trunk | None = None

    def __len__(self) -> int:
        return self.ids.shape[1]

    @property
    def shared(self) -> int:
        """The number of tokens in the trunk."""
        return 0 if self.trunk is None else len(self.trunk)

    def renumbered(self, index: int) -> Pack:
        """Return this pack of one sequence with another index for it."""
        return replace(self, members=(index,))


def pack(sequences: Sequence[TokenSequence], tokens: int, *, share: bool = True) -> Iterator[Pack]:
    """Lay out the sequences with scored tokens in packs of at most `tokens` tokens; a longer one has a pack of its own.

    Args:
        sequences: in any order; packs hold them sorted, so that neighbours share what they can.
        tokens: at least 1.
        share: whether the common beginning of neighbours is laid out once. Else each sequence is a tree of its own.
    """
    order = sorted((i for i, s in enumerate(sequences) if len(s.scored)), key=lambda i: sequences[i].inputs.tolist())
    whole = _Layout(share)
    for index in order:
        whole.add(index, sequences[index])
    if not order:
        return
    # As many packs as that takes, and all about as large.
    target = min(tokens, math.ceil(whole.size / math.ceil(whole.size / tokens)))
    layout = _Layout(share)
    for index in order:
        if layout.size and layout.size_with(sequences[index]) > target:
            yield layout.pack()
            layout = _Layout(share)
        layout.add(index, sequences[index])
    yield layout.pack()


def with_trunks(packs: Sequence[Pack], sequences: Sequence[TokenSequence]) -> Iterator[Pack]:
    """Yield packs again, those in a row that begin alike behind one trunk, so that the fewest tokens are computed.

    A trunk is closed when the pack after its last one is asked for, see `Trunk`.

    Args:
        packs: as `pack` makes them of `sequences`.
        sequences: what the packs hold.
    """
    firsts = [sequences[some.members[0]].inputs for some in packs]
    lasts = [sequences[some.members[-1]].inputs for some in packs]
    # For the first n packs: the most tokens that trunks save, where the last run of packs starts, and its trunk.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for stop in range(1, len(packs) + 1):
        options = [(best[stop - 1][0], stop - 1, 0)]
        shortest = len(packs[stop - 1])
        for start in range(stop - 2, -1, -1):
            shortest = min(shortest, len(packs[start]))
            # Sorted as they are, what the first and the last share all have in common.
            shared = min(_common(firsts[start], lasts[stop - 1]), shortest - 1)
            if shared < _LEAST_TRUNK:
                break
            options.append((best[start][0] + (stop - start - 1) * shared, start, shared))
        best.append(max(options, key=lambda option: option[0]))
    runs, stop = [], len(packs)
    while stop:
        _, start, shared = best[stop]
        runs.append((start, stop, shared))
        stop = start
    for start, stop, shared in reversed(runs):
        if not shared:
            yield from packs[start:stop]
            continue
        trunk = Trunk(packs[start].ids[:, :shared])
        for some in packs[start:stop]:
            yield replace(some, trunk=trunk)
        trunk.close()


def unique_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Return how many tokens a pass over all the sequences computes where every common beginning is computed once."""
    layout = _Layout(share=True)
    for sequence in sorted((s for s in sequences if len(s.scored)), key=lambda s: s.inputs.tolist()):
        layout.add(0, sequence)
    return layout.size


class _Layout:
    """Lays out sequences one after another, each from where it differs from the one before."""

    def __init__(self, share: bool) -> None:
        self._share = share
        self.size = 0
        # Where each token of the last sequence stands.
        self._path = np.empty(0, np.int64)
        self._last = np.empty(0, np.int64)
        self._members: list[int] = []
        self._ids: list[np.ndarray] = []
        self._depths: list[np.ndarray] = []
        self._ends = np.empty(0, np.int64)
        self._sources: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    def size_with(self, sequence: TokenSequence) -> int:
        return self.size + len(sequence.inputs) - self._common(sequence.inputs)

    def add(self, index: int, sequence: TokenSequence) -> None:
        inputs = sequence.inputs
        common = self._common(inputs)
        fresh = np.arange(self.size, self.size + len(inputs) - common)
        # Here the subtrees of all that this sequence does not share end.
        self._ends[self._path[common:]] = self.size
        self._ends = np.concatenate([self._ends, np.zeros_like(fresh)])
        self._path = np.concatenate([self._path[:common], fresh])
        self._last = inputs
        self.size += len(fresh)
        self._members.append(index)
        self._ids.append(inputs[common:])
        self._depths.append(np.arange(common, len(inputs)))
        self._sources.append(self._path[sequence.scored - 1])
        self._targets.append(sequence.ids[sequence.scored])

    def pack(self) -> Pack:
        self._ends[self._path] = self.size
        predictions = np.stack([np.concatenate(self._sources), np.concatenate(self._targets)])
        different, places = np.unique(predictions, axis=1, return_inverse=True)
        return Pack(
            members=tuple(self._members),
            ids=torch.from_numpy(np.concatenate(self._ids)).long()[None],
            position_ids=torch.from_numpy(np.concatenate(self._depths))[None],
            ends=torch.from_numpy(self._ends),
            sources=torch.from_numpy(different[0].copy()),
            targets=torch.from_numpy(different[1].copy()).long(),
            places=torch.from_numpy(places.reshape(-1)),
        )

    def _common(self, inputs: np.ndarray) -> int:
        return _common(self._last, inputs) if self._share else 0


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size
