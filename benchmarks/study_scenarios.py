"""Scenarios of a search agent in which the gradient and the best policy are known exactly.

A policy chooses one of three structures (0, 1 or 2 searches) with probability p = softmax(theta), and in structure k takes
the skilled action with probability q_k = sigmoid(phi_k). The reward is high_k with probability good_k after the skilled
action and bad_k after the other, else low_k:

    J = sum_k p_k m_k,  m_k = q_k g_k + (1 - q_k) b_k,  g_k = low_k + (high_k - low_k) good_k, b_k with bad_k
    dJ/dtheta_k = p_k (m_k - J),  dJ/dphi_k = p_k q_k (1 - q_k) (g_k - b_k)

The scenarios are this project's own; they model no particular data set or language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Values = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One value for each structure, [3]; or [3][S], a value for each structure and each of S seeds."""

STRUCTURES = 3


@dataclass(frozen=True)
class Scenario:
    """A task and the policy that training starts from; `Values` are by structure.

    Attributes:
        name: as printed.
        good: probability of the high reward after the skilled action.
        bad: the same after the other action.
        theta: initial logits of the structures.
        phi: initial logits of the skilled actions.
        low: the low reward.
        high: the high reward.
    """

    name: str
    good: Values
    bad: Values
    theta: Values = (0.0, 0.0, 0.0)
    phi: Values = (0.0, 0.0, 0.0)
    low: tuple[float, ...] = (0.0, 0.0, 0.0)
    high: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def levels(self) -> Floats:
        """[3, 2], the low and high reward of each structure."""
        return np.array([self.low, self.high]).T

    @property
    def means(self) -> tuple[Floats, Floats]:
        """Expected rewards after the skilled and after the other action, each [3, 1] or [3, S]."""
        low, step = self.levels[:, :1], np.diff(self.levels)
        return low + step * column(self.good), low + step * column(self.bad)

    @property
    def best(self) -> Floats:
        """The best possible J, [1] or [S]."""
        return np.maximum(*self.means).max(axis=0)

    @property
    def best_structure(self) -> NDArray[np.intp]:
        """The structure of the best possible J, [1] or [S]."""
        return np.maximum(*self.means).argmax(axis=0)


PRACTISED = {"good": (0.35, 0.5, 0.9), "bad": (0.3, 0.05, 0.0)}

SCENARIOS = (
    Scenario("searching hurts", (0.9, 0.7, 0.5), (0.5, 0.4, 0.3)),
    Scenario("multi-hop", (0.2, 0.4, 0.8), (0.1, 0.15, 0.2)),
    # The first search pays less than none; two pay most, but not before their skill is learned.
    Scenario("deceptive", (0.5, 0.3, 0.8), (0.35, 0.15, 0.2), theta=(1.0, 0.0, 0.0), phi=(0.0, 0.0, -1.0)),
    # Standard deviations 0.5, 1.5 and 2.5 within structures; means 0.45, 0.35 and 0.75 at the start.
    Scenario("heavy noise", (0.5, 0.5, 0.6), (0.4, 0.4, 0.5), low=(0.0, -1.0, -2.0), high=(1.0, 2.0, 3.0)),
    Scenario("rare", (0.2, 0.4, 0.8), (0.1, 0.15, 0.2), theta=(2.0, 1.0, -2.0)),
    Scenario("slow skill", **PRACTISED, phi=(0.0, -1.0, -3.0)),
    Scenario("very slow", **PRACTISED, phi=(0.0, -2.0, -4.0)),
    Scenario("slow and rare", **PRACTISED, theta=(1.5, 0.0, -1.0), phi=(0.0, -1.0, -3.0)),
)


def random_scenarios(count: int, repeats: int, seed: int) -> Scenario:
    """Return `count` random scenarios as one whose values are [3][count * repeats], repeats of one side by side.

    good ~ U(0.2, 0.95), bad ~ good * U(0, 0.6), theta ~ N(0, 1), phi ~ U(-3, 0); rewards 0 and 1.
    """
    rng = np.random.default_rng(seed)
    good = rng.uniform(0.2, 0.95, (STRUCTURES, count))
    bad = good * rng.uniform(0.0, 0.6, good.shape)
    drawn = good, bad, rng.normal(size=good.shape), rng.uniform(-3.0, 0.0, good.shape)
    values = (tuple(map(tuple, np.repeat(values, repeats, axis=1).tolist())) for values in drawn)
    return Scenario(f"{count} random", *values)


def column(values: Values) -> Floats:
    """Return values as [3, 1] or [3, S]."""
    return np.asarray(values, dtype=np.float64).reshape(STRUCTURES, -1)


def policy(theta: Floats, phi: Floats) -> tuple[Floats, Floats]:
    """Return the probabilities p of the structures and q of their skilled actions, [3, ...] as the logits."""
    weights = np.exp(theta - theta.max(axis=0))
    return weights / weights.sum(axis=0), 1.0 / (1.0 + np.exp(-phi))


def expected_reward(scenario: Scenario, theta: Floats, phi: Floats) -> Floats:
    """Return J [...] of policies with logits [3, ..., S]."""
    p, q = policy(theta, phi)
    return (p * _means(scenario, q)).sum(axis=0)


def exact_gradient(scenario: Scenario, theta: Floats, phi: Floats) -> tuple[Floats, Floats]:
    """Return dJ/dtheta and dJ/dphi, [3, ...] as the logits."""
    p, q = policy(theta, phi)
    means = _means(scenario, q)
    good, bad = (_like(m, q) for m in scenario.means)
    return p * (means - (p * means).sum(axis=0)), p * q * (1.0 - q) * (good - bad)


def ascend(scenario: Scenario, steps: int, rate: float) -> tuple[Floats, Floats]:
    """Return theta and phi [3, 1] after gradient ascent with the exact gradient from the initial policy."""
    theta, phi = column(scenario.theta), column(scenario.phi)
    for _ in range(steps):
        of_theta, of_phi = exact_gradient(scenario, theta, phi)
        theta, phi = theta + rate * of_theta, phi + rate * of_phi
    return theta, phi


def _means(scenario: Scenario, q: Floats) -> Floats:
    good, bad = (_like(m, q) for m in scenario.means)
    return q * good + (1.0 - q) * bad


def _like(values: Floats, of: Floats) -> Floats:
    """Return values [3, 1] or [3, S] with axes of one in the middle, to broadcast against [3, ..., S]."""
    return values.reshape(STRUCTURES, *(1,) * (of.ndim - 2), -1)
