"""Before a run: what each rule would do to the strata of some rollouts, and whether the best stratum of now stays the best.

**Pushes.** Of a policy that ends in stratum k of a question with probability P(k), an update along sum_i A_i grad log pi(i)
moves log P(k) by sum_i A_i (1[k(i) = k] - P(k)), if each choice has a parameter of its own. The push of a rule is that sum
with the shares n_k / K of the group in place of P, over all groups, divided by the number of rollouts. Above 0 the stratum
grows, below it shrinks. What a rule teaches inside a stratum is not in it, so pure SAN has none (T11 in docs/algorithm.md),
and a blend has 1 - alpha times GRPO's.

**Overtaking.** A stratum that earns less than another now may earn more when it is practised. What it can earn is seen in
the best of several rollouts: of a question with n_a and n_b rollouts in both strata, the expected best of
m = min(n_a, n_b, 4) of each, drawn without replacement, is compared. Means are compared over the same questions, which is
fair to a stratum that occurs in hard questions only. Intervals are the normal ones over questions, at 95 %.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, nan
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrl.advantages import compute
from agentrl.advantages.base import Floats
from agentrl.advantages.diagnostics import StratumReport
from agentrl.advantages.strata import label

if TYPE_CHECKING:
    from rich.console import RenderableType

RULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "grpo": ("grpo", {}),
    "balance 0.5": ("stratified", {"alpha": 1.0, "balance": 0.5}),
}
"""The rules whose pushes are shown, by name: estimator and options. The last is how "α 1, then 0, with balance 0.5" begins."""

MOST_DRAWS = 4
LEAST_QUESTIONS = 10
# Strata that are rarer say too little.
_RARE = 0.02
# Below it, rules hardly differ in what they do to the strata.
_LITTLE = 0.1


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference over questions with its interval, NaN where fewer than `LEAST_QUESTIONS` say something."""

    mean: float
    low: float
    high: float
    questions: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        count = len(values)
        mean = float(np.mean(values)) if count else nan
        if count < LEAST_QUESTIONS:
            return cls(mean, nan, nan, count)
        half = 1.96 * float(np.std(values, ddof=1)) / count**0.5
        return cls(mean, mean - half, mean + half, count)


@dataclass(frozen=True, slots=True)
class StratumOutlook:
    """One stratum.

    Attributes:
        key: of the stratum.
        share: of the rollouts.
        reward: their mean reward.
        now: mean reward less that of the leading stratum, over questions with rollouts in both.
        best: the expected best of as many rollouts less that of the leading stratum, over the same questions.
        pushes: by rule, what it does to the stratum's share.
    """

    key: Hashable
    share: float
    reward: float
    now: Difference
    best: Difference
    pushes: Mapping[str, float]

    @property
    def overtakes(self) -> bool:
        """Whether it earns less than the leading stratum now, and can earn more."""
        return self.now.mean < 0 < self.best.low


@dataclass(frozen=True, slots=True)
class Outlook:
    """What rollouts say beforehand; see `outlook`.

    Attributes:
        between_share: the share of reward variance between strata, of groups that have variance; a mean over groups.
        leader: the key of the stratum that earns most now: it beats the most others on the questions that they share.
        strata: in the order of their keys.
    """

    between_share: float
    leader: Hashable
    strata: tuple[StratumOutlook, ...]

    @property
    def overtaking(self) -> tuple[Hashable, ...]:
        return tuple(stratum.key for stratum in self.strata if stratum.overtakes)

    @property
    def verdict(self) -> str:
        """One sentence: which rule this speaks for."""
        leader = label(self.leader)
        if all(np.isnan(stratum.now.low) for stratum in self.strata if stratum.key != self.leader):
            return f"fewer than {LEAST_QUESTIONS} questions have rollouts in two strata: too few to speak for a rule"
        if self.overtaking:
            names = " and ".join(label(key) for key in self.overtaking)
            return (
                f"stratum {leader} earns most now, and {names} can earn more when practised: this speaks for "
                "α 1, then 0, with balance 0.5"
            )
        if self.between_share < _LITTLE:
            return f"strata hardly differ ({self.between_share:.0%} of the variance): rules should hardly differ either"
        return f"no stratum shows that it can earn more than {leader}, which earns most now: this speaks for grpo"

    def table(self) -> RenderableType:
        """Return a table with a row for each stratum, and the verdict below."""
        from rich.markup import escape
        from rich.table import Table

        shown = Table(title="outlook", title_justify="left", caption_justify="left", box=None)
        shown.add_column("stratum")
        leader = escape(label(self.leader))
        for heading in ("share", "reward", f"less {leader}'s", f"best less {leader}'s", *RULES):
            shown.add_column(heading, justify="right")
        for stratum in self.strata:
            is_leader = stratum.key == self.leader
            differences = ("", "") if is_leader else (_written(stratum.now), _written(stratum.best))
            pushes = (f"{push:+.3f}" for push in stratum.pushes.values())
            name = escape(label(stratum.key))
            shown.add_row(name, f"{stratum.share:.0%}", f"{stratum.reward:.3f}", *differences, *pushes)
        shown.caption = (
            "last columns: how rules push the share of a stratum; a blend 1 - α times as much as grpo\n"
            f"{escape(self.verdict)}"
        )
        return shown


def outlook(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    strata: Sequence[Hashable],
    valid: Sequence[bool] | None = None,
) -> Outlook | None:
    """Compare strata and rules on rollouts of one policy; None where fewer than two strata have two rollouts in a hundred.

    Args:
        rewards: numbers [N].
        groups: [N] hashable keys, the question of each rollout.
        strata: [N] hashable keys, the stratum of each.
        valid: booleans [N], false for rollouts that do not count.

    Raises:
        AdvantageError: as `compute`.
    """
    report = compute(rewards, groups, strata, "grpo", valid=valid).report
    frequent = [row for row in report.per_stratum if row.rollouts >= _RARE * report.rollouts]
    if len(frequent) < 2:
        return None
    counted = np.ones(len(groups), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    values = np.asarray(rewards, dtype=np.float64)
    cells: _Cells = {}
    for i in np.flatnonzero(counted):
        cells.setdefault(groups[i], {}).setdefault(strata[i], []).append(int(i))
    leader = _leader(frequent, values, cells)
    pushes = {
        rule: _pushes(compute(values, groups, strata, name, valid=counted, **options).values, cells)
        for rule, (name, options) in RULES.items()
    }
    rows = [
        StratumOutlook(
            row.key,
            row.rollouts / report.rollouts,
            row.reward,
            _compare(row.key, leader, values, cells, most=1),
            _compare(row.key, leader, values, cells, most=MOST_DRAWS),
            {rule: found[row.key] for rule, found in pushes.items()},
        )
        for row in frequent
    ]
    return Outlook(report.between_strata_share, leader, tuple(rows))


def best_of(rewards: Sequence[float], draws: int) -> float:
    """Return the expected greatest of `draws` rewards drawn without replacement; of 0 and 1 it is pass@k.

    The i-th smallest of n is the greatest of C(i-1, draws-1) of the C(n, draws) choices (for pass@k: arXiv 2107.03374).
    """
    ordered = sorted(rewards)
    weighted = sum(reward * comb(place, draws - 1) for place, reward in enumerate(ordered))
    return weighted / comb(len(ordered), draws)


_Cells = dict[Hashable, dict[Hashable, list[int]]]
"""The rollouts of each stratum of each group."""


def _leader(rows: Sequence[StratumReport], rewards: Floats, cells: _Cells) -> Hashable:
    def victories(row: StratumReport) -> tuple[int, float]:
        beaten = (_compare(row.key, other.key, rewards, cells, most=1).mean > 0 for other in rows)
        return sum(beaten), row.gn_mean

    return max(rows, key=victories).key


def _compare(key: Hashable, leader: Hashable, rewards: Floats, cells: _Cells, most: int) -> Difference:
    found = []
    for strata in cells.values():
        if key in strata and leader in strata:
            draws = min(len(strata[key]), len(strata[leader]), most)
            one, other = (best_of(rewards[strata[name]].tolist(), draws) for name in (key, leader))
            found.append(one - other)
    return Difference.of(found)


def _pushes(advantages: Floats, cells: _Cells) -> dict[Hashable, float]:
    found: dict[Hashable, float] = {}
    count = sum(len(members) for strata in cells.values() for members in strata.values())
    for strata in cells.values():
        total = sum(advantages[members].sum() for members in strata.values())
        size = sum(map(len, strata.values()))
        for key, members in strata.items():
            push = advantages[members].sum() - len(members) / size * total
            found[key] = found.get(key, 0.0) + float(push) / count
    return found


def _written(difference: Difference) -> str:
    if np.isnan(difference.low):
        return "-"
    return f"{difference.mean:+.2f} ± {difference.high - difference.mean:.2f}"
