"""What is compared: estimators and rules for alpha, as tables of advantages that `agentrl.advantages.compute` filled.

Rewards take two levels in each of three structures, so a rollout is of one of six categories (structure, level), and a
group of K rollouts is one of C = C(K + 5, 5) compositions: how many it has of each category. One call of `compute` with
every composition as a group therefore holds all that an estimator can ever say.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_scenarios import STRUCTURES, Floats

from agentrl.advantages import compute
from agentrl.advantages.schedule import ProgressRule, Schedule

CATEGORIES = 2 * STRUCTURES
STEP, LINEAR, COSINE = Schedule(1, 0, "step", 0.5), Schedule(1, 0, "linear", 1.0), Schedule(1, 0, "cosine", 1.0)
SAN, GRPO = {"alpha": 1.0}, {"alpha": 0.0}
BETA = 0.5


@dataclass(frozen=True, eq=False)
class Rule:
    """How advantages are computed in the course of a run.

        A = w * (practice + balance * b) + (1 - w) * GRPO

    Attributes:
        name: as printed.
        practice: the estimator's options.
        estimator: what they are options of.
        fade: gives w by the share of steps done; None keeps w = 1.
        balance: weighs b, the rarity bonus; see `agentrl.advantages.balance.rarity_bonus`.
        scope: "batch" compares over all prompts of a step. Prompts are alike here, which flatters it.
        floor: the share of rollouts whose structure is drawn evenly, times w; the structures' scores are then weighted by
            p / sampled probability.
        clip: the largest norm of a step's gradient.
    """

    name: str
    practice: Mapping[str, Any] = field(default_factory=dict)
    estimator: str = "stratified"
    fade: Schedule | ProgressRule | None = None
    balance: float = 0.0
    scope: str = "prompt"
    floor: float = 0.0
    clip: float = np.inf


ESTIMATOR_RULES = (
    Rule("grpo", estimator="grpo"),
    *(Rule(f"stratified {alpha}", {"alpha": alpha}) for alpha in (0.5, 0.8, 1.0, "auto")),
    *(Rule(name, estimator=name) for name in ("dr_grpo", "rloo", "opo", "gigpo")),
    Rule("reinforce_pp", estimator="reinforce_pp", scope="batch"),
)
RECOMMENDED = Rule("step + balance", SAN, fade=STEP, balance=BETA)
CORE_RULES = (
    *ESTIMATOR_RULES,
    Rule("step", SAN, fade=STEP),
    Rule("linear", SAN, fade=LINEAR),
    Rule("cosine", SAN, fade=COSINE),
    Rule("progress", SAN, fade=ProgressRule()),
    Rule("step, floor 0.15", SAN, fade=STEP, floor=0.15),
    RECOMMENDED,
    Rule("cosine + balance", SAN, fade=COSINE, balance=BETA),
    Rule("progress + balance", SAN, fade=ProgressRule(), balance=BETA),
    Rule("grpo + balance", GRPO, fade=STEP, balance=BETA),
    Rule("grpo + balance 3", GRPO, fade=STEP, balance=3.0),
)
CLIP = 0.1
VARIANT_RULES = (
    Rule("step, global", {**SAN, "degenerate": "global"}, fade=STEP),
    Rule("step, batch", SAN, fade=STEP, scope="batch"),
    Rule("step, floor 1", SAN, fade=STEP, floor=1.0),
    Rule("grpo, floor 0.15", estimator="grpo", floor=0.15),
    *(Rule(f"step {at} + balance", SAN, fade=Schedule(1, 0, "step", at), balance=BETA) for at in (0.3, 0.7)),
    *(Rule(f"step + balance {beta}", SAN, fade=STEP, balance=beta) for beta in (BETA / 2, BETA * 2)),
    Rule("0.8 step + balance", {"alpha": 0.8}, fade=STEP, balance=BETA),
    Rule("grpo, clip", estimator="grpo", clip=CLIP),
    Rule("step + balance, clip", SAN, fade=STEP, balance=BETA, clip=CLIP),
    *(Rule(f"grpo + balance {beta:g}, clip", GRPO, fade=STEP, balance=beta, clip=CLIP) for beta in (BETA, 1.0, 3.0)),
)


@lru_cache
def compositions(k: int) -> NDArray[np.intp]:
    """Return how many of K rollouts are of each category, for all compositions [C, 6]."""
    bars = np.array(list(itertools.combinations(range(k + CATEGORIES - 1), CATEGORIES - 1)))
    ends = np.full((len(bars), 1), -1), np.full((len(bars), 1), k + CATEGORIES - 1)
    return np.diff(np.hstack([ends[0], bars, ends[1]]), axis=1) - 1


@lru_cache
def ranks(k: int) -> NDArray[np.int32]:
    """Return the position in `compositions(k)` by code, see `code`."""
    counts = compositions(k)
    found = np.zeros((k + 1) ** (CATEGORIES - 1), dtype=np.int32)
    found[code(counts.T, k)] = np.arange(len(counts))
    return found


def code(counts: NDArray[Any], k: int) -> NDArray[np.int32]:
    """Return one number [...] for each composition [6, ...]; the last count follows from the others."""
    number = counts[0].astype(np.int32)
    for count in counts[1:-1]:
        number *= k + 1
        number += count
    return number


def advantages(rule: Rule, levels: Floats, k: int) -> tuple[Floats, Floats]:
    """Return what the rule's practice gives each category in each composition, with w = 1; levels are [3, 2].

    Returns:
        [6, C], at a rollout's last turn, where its structure is complete and its skill shows; and
        [2, 6, C], by how much the advantage at turns 0 and 1, where they come before the last, differs from that.
    """
    flat, searches = tuple(levels.ravel().tolist()), np.arange(CATEGORIES) // 2
    values = _table(rule.estimator, tuple(rule.practice.items()), flat, k)
    turns = values.shape[2]
    last = values[np.arange(CATEGORIES), :, np.minimum(searches, turns - 1)]
    early = np.zeros((STRUCTURES - 1, *last.shape))
    for turn in range(turns - 1):
        early[turn] = np.where((searches > turn)[:, None], values[:, :, turn] - last, 0.0)
    if rule.balance:
        # b is the difference that a balance of 1 makes to pure SAN.
        last = last + rule.balance * np.subtract(
            *(_table("stratified", (("alpha", 1.0), ("balance", b)), flat, k)[:, :, 0] for b in (1.0, 0.0))
        )
    return last, early


@lru_cache(maxsize=64)
def _table(estimator: str, options: tuple[tuple[str, Any], ...], levels: tuple[float, ...], k: int) -> Floats:
    """Return [6, C, T] from one call of `compute`; T is 1 for estimators with one value for each rollout."""
    counts = compositions(k)
    category = np.repeat(np.tile(np.arange(CATEGORIES), len(counts)), counts.ravel())
    group = np.repeat(np.arange(len(counts)), k)
    found = of_rollouts(estimator, dict(options), np.array(levels), category, group)
    table = np.zeros((CATEGORIES, len(counts), found.shape[1]))
    table[category, group] = found
    return table


def of_rollouts(
    estimator: str, options: Mapping[str, Any], levels: Floats, category: NDArray[Any], group: NDArray[Any]
) -> Floats:
    """Return the advantages [N, T] that `compute` gives rollouts of the categories [N]; levels are [6].

    A rollout with k searches has k + 1 turns of equal length and stands at turn t after t searches.
    """
    searches, extra = category // 2, {}
    if estimator == "opo":
        extra["lengths"] = 1.0 + searches
    if estimator == "gigpo":
        extra["anchors"] = [tuple(range(n + 1)) for n in searches]
    values = compute(levels[category], group, searches, estimator, **extra, **options).values
    return values.reshape(len(category), -1)
