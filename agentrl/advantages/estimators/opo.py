"""Advantages against the length-weighted mean."""

from __future__ import annotations

import numpy as np

from agentrl.advantages.base import Batch, Floats, centre, required


def opo(batch: Batch) -> Floats:
    """On-policy RL with optimal reward baseline (arXiv 2505.23585).

        A(i) = R_i - sum_j l_j R_j / sum_j l_j, over the rollouts j of i's group, of l_j tokens

    Returns [n]; 0 in groups without reward variance. The weights minimise the gradient's variance where a rollout's
    squared score is proportional to its length.

    Raises:
        AdvantageError: if the batch has no lengths.
    """
    lengths = required(batch.lengths, "opo", "lengths")
    # Measured from the plain mean, a large common offset of the rewards costs no digits.
    centred = centre(batch.by_group, batch.groups)
    shift = np.bincount(batch.groups, lengths * centred) / np.bincount(batch.groups, lengths)
    return centred - shift[batch.groups]
