"""Token sequences as prefix trees: what several of them share is laid out once, and computed once.

A tree is a row of tokens in depth-first order. Of each token it knows where its subtree ends, which is all that attention
needs: token q sees token k if and only if `k <= q < ends[k]`, that is, if k is q itself or an ancestor of q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from agentrl.training.scoring.trunk import Trunk

# A pass costs about as much as so many tokens more in another one.
_PASS = 64


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
        sequences: in any order; packs hold them sorted, so that neighbours share what they can, and are cut where that costs
            the fewest tokens.
        tokens: at least 1.
        share: whether the common beginning of neighbours is laid out once. Else each sequence is a tree of its own.
    """
    order = _sorted(sequences)
    lengths, shared = _lengths([sequences[i].inputs for i in order], share)
    for start, stop in _cuts(lengths, shared, tokens):
        yield _laid_out(sequences, order[start:stop], share)


def pack_behind_trunks(sequences: Sequence[TokenSequence], tokens: int) -> Iterator[Pack]:
    """Lay out the sequences as `pack` does, but packs that begin alike behind one trunk, where that is cheaper.

    A trunk is closed when the pack after its last one is asked for, see `Trunk`. Large packs come first, so that smaller ones
    find room in the memory that these leave.
    """
    order = _sorted(sequences)
    lengths, shared = _lengths([sequences[i].inputs for i in order], True)
    for run in _cheapest_runs(lengths, shared, tokens):
        packs = [_laid_out(sequences, order[start:stop], True) for start, stop in run.cuts]
        packs.sort(key=len, reverse=True)
        if not run.trunk:
            yield from packs
            continue
        sources = torch.cat([some.sources for some in packs]).unique()
        trunk = Trunk(packs[0].ids[:, : run.trunk], sources[sources < run.trunk])
        for some in packs:
            yield replace(some, trunk=trunk)
        trunk.close()


def _sorted(sequences: Sequence[TokenSequence]) -> list[int]:
    return sorted((i for i, s in enumerate(sequences) if len(s.scored)), key=lambda i: sequences[i].inputs.tolist())


def _laid_out(sequences: Sequence[TokenSequence], members: Sequence[int], share: bool) -> Pack:
    layout = _Layout(share)
    for index in members:
        layout.add(index, sequences[index])
    return layout.pack()


def _lengths(inputs: Sequence[np.ndarray], share: bool) -> tuple[list[int], list[int]]:
    """Return how long each sequence is, and what each but the last shares with the next one, nothing without `share`."""
    shared = [_common(one, other) if share else 0 for one, other in pairwise(inputs)]
    return [len(own) for own in inputs], shared


def _cuts(lengths: Sequence[int], shared: Sequence[int], tokens: int, least_common: int = 0) -> list[tuple[int, int]]:
    """Return where each pack of sorted sequences starts and stops, so that packs and their tokens cost the least.

    Neighbours with fewer than `least_common` tokens in common are in different packs.
    """
    # Of a pack, each sequence but the first adds what it does not share with the one before.
    fresh = [0, *(own - common for own, common in zip(lengths[1:], shared, strict=True))]
    # For the first n sequences: what their packs cost, and where the last one starts.
    best = [(0, 0)]
    for stop in range(1, len(lengths) + 1):
        options, added = [], 0
        for start in range(stop - 1, -1, -1):
            size = lengths[start] + added
            if options and (size > tokens or shared[start] < least_common):
                break
            options.append((best[start][0] + size + _PASS, start))
            added += fresh[start]
        best.append(min(options))
    return _ranges([start for _, start in best])


def _ranges(starts: Sequence[int]) -> list[tuple[int, int]]:
    """Return from where to where each range goes, given where the last range of the first n things starts, for each n from 0."""
    found, stop = [], len(starts) - 1
    while stop:
        found.append((starts[stop], stop))
        stop = starts[stop]
    return found[::-1]


@dataclass(frozen=True, slots=True)
class _Run:
    """Packs in a row.

    Attributes:
        cuts: where each starts and stops.
        sizes: their tokens.
        trunk: how many of these a trunk computes for all of them, or 0.
    """

    cuts: Sequence[tuple[int, int]]
    sizes: Sequence[int]
    trunk: int

    @property
    def cost(self) -> int:
        of_trunk = self.trunk + _PASS if self.trunk else 0
        return of_trunk + sum(size - self.trunk + _PASS for size in self.sizes)


def _cheapest_runs(lengths: Sequence[int], shared: Sequence[int], tokens: int) -> list[_Run]:
    """Return the packs of sorted sequences in runs that cost the least of some plans, those with the largest packs first."""
    # Where neighbours share hardly more than everyone does, a question ends, and what follows has another trunk.
    of_all = min(shared, default=0)
    limits = (0, *(of_all + _PASS // part for part in (8, 4, 2, 1)))
    plans = dict.fromkeys(tuple(_cuts(lengths, shared, tokens, limit)) for limit in limits)
    runs = min(
        (_behind_trunks(cuts, lengths, shared) for cuts in plans), key=lambda runs: sum(run.cost for run in runs)
    )
    return sorted(runs, key=lambda run: max(run.sizes), reverse=True)


def _behind_trunks(cuts: Sequence[tuple[int, int]], lengths: Sequence[int], shared: Sequence[int]) -> list[_Run]:
    """Return packs of sorted sequences in runs that cost the least; `shared` is what each has in common with the next."""
    sizes = [sum(lengths[start:stop]) - sum(shared[start : stop - 1]) for start, stop in cuts]
    # What all of a pack have in common, and what they have with the first of the next one too.
    within = [min(shared[start : stop - 1], default=lengths[start]) for start, stop in cuts]
    onwards = [min(shared[start:stop], default=0) for start, stop in cuts]
    # For the first n packs: what trunks save in tokens, where the last run of packs starts, and its trunk.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for stop in range(1, len(cuts) + 1):
        options = [(best[stop - 1][0], stop - 1, 0)]
        # A pack has a token of its own.
        common = min(within[stop - 1], sizes[stop - 1] - 1)
        for start in range(stop - 2, -1, -1):
            common = min(common, onwards[start], sizes[start] - 1)
            if not common:
                break
            options.append((best[start][0] + (stop - start - 1) * common - _PASS, start, common))
        best.append(max(options, key=lambda option: option[0]))
    ranges = _ranges([start for _, start, _ in best])
    return [_Run(cuts[start:stop], sizes[start:stop], best[stop][2]) for start, stop in ranges]


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
