"""Training of softmax policies with tabulated advantages, for many rules and seeds at once, and exact gradient moments.

Shapes: R rules, S seeds, B prompts of K rollouts in a step; 3 structures of 2 levels each are the 6 categories of a rollout.
All rules of a call draw from the same uniform numbers, so they differ by less than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lgamma

import numpy as np
from numpy.typing import NDArray
from study_rules import CATEGORIES, GRPO, Rule, advantages, code, compositions, ranks
from study_scenarios import STRUCTURES, Floats, Scenario, column, expected_reward, policy

from agentrl.advantages.schedule import ProgressRule, Schedule, StratumRewards

RATE, PROMPTS, STEPS = 0.3, 4, 2000
SPARSE = 10  # J is recorded every so many steps
EPS = 1e-6  # what `compute` adds to standard deviations by default

Counts = NDArray[np.uint8]


@dataclass(frozen=True)
class Outcome:
    """What training led to: logits [3, R, S], J of the final policies [R, S], and J averaged over the run [R, S]."""

    theta: Floats
    phi: Floats
    final: Floats
    during: Floats


def train(scenario: Scenario, rules: Sequence[Rule], k: int, seeds: int, steps: int = STEPS, seed: int = 0) -> Outcome:
    """Train `seeds` policies with each rule: stochastic gradient ascent, PROMPTS groups of k rollouts in a step."""
    rng, tables, weights = np.random.default_rng(seed), Tables(rules, scenario.levels, k), Weights(rules, seeds)
    floor, clip = (np.array([[getattr(rule, name)] for rule in rules]) for name in ("floor", "clip"))
    logits = column(scenario.theta), column(scenario.phi)
    theta, phi = (np.broadcast_to(x[:, None], (STRUCTURES, len(rules), seeds)) for x in logits)
    recorded = []
    for step in range(steps):
        if step % SPARSE == 0:
            recorded.append(expected_reward(scenario, theta, phi))
        w = weights.at(step / steps)
        p, q = policy(theta, phi)
        drawn_from = p + floor * w * (1 / STRUCTURES - p)
        counts, skilled = sample(scenario, drawn_from, q, k, rng)
        of_theta, of_phi = tables.gradient(w, p, q, counts, skilled, p / drawn_from)
        norm = np.sqrt((of_theta**2 + of_phi**2).sum(axis=0))
        rate = RATE * np.minimum(1.0, clip / np.maximum(norm, 1e-12))
        theta, phi = theta + rate * of_theta, phi + rate * of_phi
        weights.observe(counts, scenario.levels)
    return Outcome(theta, phi, expected_reward(scenario, theta, phi), np.mean(recorded, axis=0))


def sample(
    scenario: Scenario, p: Floats, q: Floats, k: int, rng: np.random.Generator, prompts: int = PROMPTS
) -> tuple[Counts, Counts]:
    """Draw `prompts` groups of k rollouts from policies p, q [3, R, S].

    Returns: [3, 2, B, R, S], how many rollouts have a structure and level, and how many of them took the skilled action.
    """
    good, bad = column(scenario.good)[:, None], column(scenario.bad)[:, None]
    # Sorted by structure, then level, then skill.
    chance = np.stack([(1 - q) * (1 - bad), q * (1 - good), (1 - q) * bad, q * good], axis=1) * p[:, None]
    chance = chance.reshape(-1, *p.shape[1:]).astype(np.float32)
    draws = rng.random((k, prompts, 1, p.shape[2]), dtype=np.float32)
    # above[j]: how many rollouts are of the j-th sort or a later one.
    above = np.zeros((len(chance) + 1, prompts, *p.shape[1:]), dtype=np.uint8)
    above[0], upper = k, np.zeros_like(chance[0])
    for j in range(1, len(chance)):
        upper += chance[j - 1]
        np.add.reduce((draws > upper).view(np.uint8), axis=0, dtype=np.uint8, out=above[j])
    shape = STRUCTURES, 2, *above.shape[1:]
    return (above[:-2:2] - above[2::2]).reshape(shape), (above[1::2] - above[2::2]).reshape(shape)


class Tables:
    """The advantages of several rules by composition, and the gradients that they estimate."""

    def __init__(self, rules: Sequence[Rule], levels: Floats, k: int) -> None:
        self._rules, self._levels, self._k, self._ranks = rules, levels, k, ranks(k)
        practice, early = zip(*(advantages(rule, levels, k) for rule in rules), strict=True)
        self._early = {i: differs.astype(np.float32) for i, differs in enumerate(early) if differs.any()}
        choice, _ = advantages(Rule("choice", GRPO), levels, k)
        # [6, (R + 1) * C]: each rule's practice, then GRPO.
        self._values = np.concatenate([*practice, choice], axis=1).astype(np.float32)
        self._width = choice.shape[1]

    def gradient(
        self, w: Floats, p: Floats, q: Floats, counts: Counts, skilled: Counts, weight: Floats | float = 1.0
    ) -> tuple[Floats, Floats]:
        """Return the estimated gradients by theta and phi [3, R, S], means over all rollouts of a step.

        w [R, S] weighs practice against GRPO; p, q [3, R, S]; counts, skilled [3, 2, B, R, S]; weight as in `gradient`.
        """
        rank = self._ranks.take(code(counts.reshape(CATEGORIES, *counts.shape[2:]), self._k))
        values = self._look_up(rank, w)
        for i, rule in enumerate(self._rules):
            if rule.scope == "batch":
                over_prompts = pooled(counts[..., i, :].sum(axis=2), self._levels, rule.estimator == "stratified")
                values[..., i, :] += w[i] * (over_prompts[:, :, None] - values[..., i, :])
        of_theta, of_phi = gradient(p, q, counts, skilled, values, weight)
        for i, early in self._early.items():
            of_theta[:, i] += early_gradient(p[:, i], counts[..., i, :], early[..., rank[:, i]])
        rollouts = self._k * counts.shape[2]
        return of_theta / rollouts, of_phi / rollouts

    def _look_up(self, rank: NDArray[np.int32], w: Floats) -> Floats:
        """Return w * practice + (1 - w) * GRPO, [3, 2, B, R, S], for compositions [B, R, S]."""
        last = len(self._rules)
        rule = np.where(w > 0, np.arange(last)[:, None], last).astype(np.int32)
        found = self._values.take(rank + rule * self._width, axis=1, mode="clip")
        mixed = np.flatnonzero(((w > 0) & (w < 1)).any(axis=1))
        if len(mixed):
            choice = self._values.take(rank[:, mixed] + last * self._width, axis=1, mode="clip")
            # Where w is 0 both are GRPO.
            found[:, :, mixed] = choice + w[mixed].astype(np.float32) * (found[:, :, mixed] - choice)
        return found.reshape(STRUCTURES, 2, *rank.shape)


def gradient(
    p: Floats, q: Floats, counts: Floats, skilled: Floats, values: Floats, weight: Floats | float = 1.0
) -> tuple[Floats, Floats]:
    """Return sum_i A_i weight_i grad log p(i) by theta and sum_i A_i grad log q(i) by phi, each [3, ...].

    p, q, weight [3, ...]; counts, skilled, values [3, 2, B, ...]. Skill is on policy whichever structures were sampled, so
    its scores have no weight.
    """
    total = (values * counts).sum(axis=(1, 2))
    weighted = weight * total
    return weighted - p * weighted.sum(axis=0), (values * skilled).sum(axis=(1, 2)) - q * total


def early_gradient(p: Floats, counts: Floats, early: Floats) -> Floats:
    """Return what theta's gradient gains where turns before the last have other advantages, [3, ...].

    The policy decides at turn t between going on and stopping. With m_t the distribution of structures that is left once
    turn t is reached, grad log P(go on at t) = m_{t+1} - m_t; with equal advantages the turns' scores sum to that of the
    structure. early [2, 6, B, ...] is the advantage at turn t less that at the last turn.
    """
    gained = (early * counts.reshape(CATEGORIES, *counts.shape[2:])).sum(axis=(1, 2))
    reached = [np.concatenate([np.zeros_like(p[:t]), p[t:]]) for t in range(STRUCTURES)]
    left = [m / m.sum(axis=0) for m in reached]
    return sum(gained[t] * (left[t + 1] - left[t]) for t in range(STRUCTURES - 1))


def pooled(counts: NDArray[np.integer], levels: Floats, by_stratum: bool) -> Floats:
    """Return rewards [3, 2, ...] standardised over all rollouts counted [3, 2, ...], or over those of their structure."""
    axis = 1 if by_stratum else (0, 1)
    n = np.maximum(counts.sum(axis=axis, keepdims=True), 1)
    rewards = levels.reshape(STRUCTURES, 2, *(1,) * (counts.ndim - 2))
    centred = rewards - (counts * rewards).sum(axis=axis, keepdims=True) / n
    std = np.sqrt((counts * centred**2).sum(axis=axis, keepdims=True) / n)
    return np.where(std > 1e-9, centred / (std + EPS), 0.0)


class Weights:
    """The rules' w in the course of training."""

    def __init__(self, rules: Sequence[Rule], seeds: int) -> None:
        self._fades, self._seeds, self._steps = [rule.fade for rule in rules], seeds, 0
        # Rewards are summed here over a window, which is much faster than observing steps one at a time.
        self._moving = {
            i: [replace(fade, window=1) for _ in range(seeds)]
            for i, fade in enumerate(self._fades)
            if isinstance(fade, ProgressRule)
        }
        self._counts = {i: np.zeros((STRUCTURES, 2, seeds), dtype=np.intp) for i in self._moving}

    def at(self, progress: float) -> Floats:
        """Return w [R, S] at a share of the steps."""
        w = np.ones((len(self._fades), self._seeds))
        for i, fade in enumerate(self._fades):
            if i in self._moving:
                w[i] = [one.value(progress) for one in self._moving[i]]
            elif isinstance(fade, Schedule):
                w[i] = fade.value(progress)
        return w

    def observe(self, counts: Counts, levels: Floats) -> None:
        """Take note of a step's rollouts [3, 2, B, R, S]."""
        self._steps += 1
        for i, rules in self._moving.items():
            self._counts[i] += counts[..., i, :].sum(axis=2, dtype=np.intp)
            if self._steps % self._fades[i].window == 0:
                for rule, count in zip(rules, np.moveaxis(self._counts[i], -1, 0), strict=True):
                    rule.observe(_rewards(count, levels))
                self._counts[i][:] = 0


def _rewards(counts: NDArray[np.integer], levels: Floats) -> dict[str, StratumRewards]:
    """Describe the rewards of rollouts [3, 2] by structure."""
    found = {}
    for k, (n, rewards) in enumerate(zip(counts, levels, strict=True)):
        if n.sum():
            mean = n @ rewards / n.sum()
            found[str(k)] = StratumRewards(float(n.sum()), float(mean), float(n @ (rewards - mean) ** 2 / n.sum()))
    return found


def exact_moments(scenario: Scenario, rule: Rule, k: int, theta: Floats, phi: Floats) -> tuple[Floats, float]:
    """Return the mean [6] of the gradient estimate from one group, and its variance summed over the six logits.

    Both are sums over all compositions, for theta, phi [3, 1]. Given a composition the skilled actions are binomial, so
    their part is in closed form:

        E[g] = sum_C P(C) E[g | C],  Var[g] = sum_C P(C) (|E[g | C]|^2 + tr Var[g | C]) - |E[g]|^2
    """
    p, q = policy(theta, phi)
    good, bad = column(scenario.good), column(scenario.bad)
    skilled, other = p * q * np.hstack([1 - good, good]), p * (1 - q) * np.hstack([1 - bad, bad])
    counts, chance = compositions(k), skilled + other
    log_factorial = np.array([lgamma(n + 1) for n in range(k + 1)])
    weight = np.exp(log_factorial[k] - log_factorial[counts].sum(axis=1) + counts @ np.log(chance).ravel())
    n, posterior = counts.T.reshape(STRUCTURES, 2, 1, -1), (skilled / chance)[:, :, None, None]
    last, early = advantages(rule, scenario.levels, k)
    last = last.reshape(n.shape)
    of_theta, of_phi = gradient(p, q, n, n * posterior, last)
    given = np.concatenate([of_theta + early_gradient(p, n, early[:, :, None]), of_phi]) / k
    spread = (last**2 * n * posterior * (1 - posterior)).sum(axis=(0, 1, 2)) / k**2
    mean = given @ weight
    return mean, float(((given**2).sum(axis=0) + spread) @ weight - mean @ mean)
