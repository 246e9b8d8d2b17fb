"""Joining degenerate strata with their nearest neighbours."""

from __future__ import annotations

from numbers import Real

import numpy as np

from agentrl.advantages.base import AdvantageError, Batch, Bools, Ints


def merge_degenerate(batch: Batch, is_degenerate: Bools) -> Ints:
    """Return the strata [n] once every stratum that is degenerate, by is_degenerate [S], has joined another of its group.

    It joins the stratum that is not degenerate and whose key differs least from its own; of two keys that differ as
    little, the smaller one. Where all strata of a group are degenerate, they join into one.

    Raises:
        AdvantageError: if a key is not a finite real number.
    """
    odd = [key for key in batch.keys if not (isinstance(key, Real) and np.isfinite(float(key)))]
    if odd:
        raise AdvantageError(f"degenerate=merge needs strata whose keys are finite numbers, got {odd[0]!r}")
    keys = np.array([float(key) for key in batch.keys])[batch.stratum_keys]
    order = np.lexsort((keys, batch.stratum_groups))
    keys, groups, sound = keys[order], batch.stratum_groups[order], ~is_degenerate[order]
    last = len(order) - 1
    place = np.arange(len(order))
    below = np.maximum.accumulate(np.where(sound, place, 0))
    above = np.minimum.accumulate(np.where(sound, place, last)[::-1])[::-1]
    to_below, to_above = (
        np.where(sound[near] & (groups[near] == groups), np.abs(keys[near] - keys), np.inf) for near in (below, above)
    )
    nearest = np.where(to_below <= to_above, below, above)
    alone = np.isinf(np.minimum(to_below, to_above))
    target = np.empty_like(order)
    target[order] = np.where(alone, np.searchsorted(groups, groups), nearest)
    _, renumbered = np.unique(target, return_inverse=True)
    return renumbered[batch.strata]
