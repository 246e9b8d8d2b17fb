"""What a rollout can be expected to earn, learnt from past batches: by its question, and by its stratum.

    V(i) = x_i + t_0 + t_1 x_i + t_k(i)

x_i is the mean reward of the other rollouts of i's group and k(i) the stratum of rollout i. The coefficients t minimise

    sum_j (d_j - t_0 - t_1 x_j - t_k(j))^2 + ridge * |t|^2, d_j = R_j - x_j

over the rollouts j of past batches (Hoerl and Kennard, "Ridge regression", Technometrics 12 (1970), 55-67). Without a past all
of them are 0 and V is x, the baseline of RLOO. Strata are told apart by their labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from agentrl.advantages.base import Batch, Bools, Floats
from agentrl.advantages.diagnostics import by_stratum
from agentrl.advantages.strata import label

_SUMS = ("rollouts", "others", "others_squared", "excess", "others_excess")


@dataclass(frozen=True, slots=True)
class Value:
    """The coefficients t_0, t_1 and, by the label of a stratum, t_k; a stratum that the past does not have gets 0."""

    intercept: float
    slope: float
    strata: Mapping[str, float]

    def beyond_others(self, batch: Batch, others: Floats) -> Floats:
        """Return V(i) - x_i [n] for the x_i of `others` [n]."""
        by_key = np.array([self.strata.get(label(key), 0.0) for key in batch.keys])
        return self.intercept + self.slope * others + by_key[batch.stratum_keys[batch.strata]]


def note_sums(batch: Batch, others: Floats, excess: Floats, counts: Bools) -> dict[str, float]:
    """Return what a fit needs to know of the rollouts that count: of each stratum their number, the sums of x, x^2, d and x d.

    `others` [n] are the x and `excess` [n] the d of a batch. The names are `strata/LABEL/SUM`.
    """
    keys = batch.stratum_keys[batch.strata][counts]
    x, d = others[counts], excess[counts]
    columns = [np.bincount(keys, values, len(batch.keys)) for values in (np.ones_like(x), x, x**2, d, x * d)]
    notes: dict[str, float] = {}
    for place in np.unique(keys):
        for name, column in zip(_SUMS, columns, strict=True):
            path = f"strata/{label(batch.keys[place])}/{name}"
            notes[path] = notes.get(path, 0.0) + float(column[place])
    return notes


def fit_value(past: Iterable[Mapping[str, float]], ridge: float, per_stratum: bool) -> Value:
    """Return the V that fits the batches whose `note_sums` are given; without `per_stratum` all t_k are 0."""
    sums: dict[str, Floats] = {}
    for notes in past:
        for name, values in by_stratum(notes).items():
            sums[name] = sums.get(name, np.zeros(len(_SUMS))) + np.array([values[part] for part in _SUMS])
    names = sorted(sums)
    size = 2 + (len(names) if per_stratum else 0)
    gram, target = ridge * np.eye(size), np.zeros(size)
    for place, name in enumerate(names, 2):
        count, x, x_squared, d, x_d = sums[name]
        # The features of a rollout are 1, x, and 1 for its stratum.
        ones = [0, place] if per_stratum else [0]
        gram[np.ix_(ones, ones)] += count
        gram[ones, 1] += x
        gram[1, ones] += x
        gram[1, 1] += x_squared
        target[ones] += d
        target[1] += x_d
    intercept, slope, *strata = np.linalg.solve(gram, target).tolist()
    return Value(intercept, slope, dict(zip(names if per_stratum else (), strata, strict=True)))
