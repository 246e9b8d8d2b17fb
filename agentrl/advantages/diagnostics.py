"""What structure a batch of rollouts has, and what that does to the learning signal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from agentrl.advantages.base import Batch, Bools, Floats, moments, standardise
from agentrl.advantages.strata import label

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class StratumReport:
    """The rollouts of one stratum key, over all groups.

    Attributes:
        key: the stratum's key.
        rollouts: how many there are.
        reward: their mean reward.
        san_mean, san_variance: moments of the stratified advantages A_S; 0 and 1 where no part is degenerate (T4).
        gn_mean, gn_variance: moments of the global advantages A_G (T6): a mean other than 0 is what GRPO says about
            having ended in this stratum at all.
        advantage: the mean of the advantages that were chosen.
    """

    key: Hashable
    rollouts: int
    reward: float
    san_mean: float
    san_variance: float
    gn_mean: float
    gn_variance: float
    advantage: float


@dataclass(frozen=True, slots=True)
class Report:
    """Diagnostics of a batch and its advantages; a mean or share over nothing is 0.

    Attributes:
        rollouts: how many count.
        excluded: how many do not.
        groups: groups with a rollout that counts.
        strata: strata of those groups; equal keys of different groups count apart.
        degenerate_share: the share of rollouts in strata of one or without reward variance.
        between_strata_share: the share of a group's reward variance that lies between its strata,
            sum_k n_k (mean_k - mean)^2 / sum_i (R_i - mean)^2, averaged over groups with variance (T2).
        no_signal_share_gn: the share of groups for which GRPO is 0: groups of one or without reward variance.
        no_signal_share_san: the share of groups for which pure SAN is 0: all of their strata are degenerate.
        no_signal_share: the share of groups whose chosen advantages are all 0.
        effective_rollouts: (sum |A|)^2 / sum A^2, the number of equally weighted rollouts (or turns, where each has
            its own value) that would carry as much (Kish, Survey Sampling, 1965).
        sign_flip_share: the share of rollouts whose advantage (summed over turns) has the opposite sign of GRPO's.
        variance_between_strata, variance_within_strata: of the advantages (summed over turns) in their groups: the mean of
            (A_k - A)^2 and of (A_i - A_k)^2, with A_k the mean of a rollout's stratum and A that of its group.
        per_stratum: the rollouts by stratum key, in the order of the keys' labels.
    """

    rollouts: int
    excluded: int
    groups: int
    strata: int
    degenerate_share: float
    between_strata_share: float
    no_signal_share_gn: float
    no_signal_share_san: float
    no_signal_share: float
    effective_rollouts: float
    sign_flip_share: float
    variance_between_strata: float
    variance_within_strata: float
    per_stratum: tuple[StratumReport, ...]

    def metrics(self) -> dict[str, float]:
        """Return all numbers by name, those of a stratum as `strata/LABEL/NAME`; `by_stratum` gives the latter back."""
        flat = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "per_stratum"}
        for stratum in self.per_stratum:
            for f in fields(stratum):
                if f.name != "key":
                    flat[f"strata/{label(stratum.key)}/{f.name}"] = float(getattr(stratum, f.name))
        return flat

    def table(self) -> Table:
        """Return the report as a table: a row for each stratum, and below what holds for the whole batch."""
        return report_table(self.metrics())


def by_stratum(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the metrics that are named `strata/LABEL/NAME`, as name and value by label."""
    found: dict[str, dict[str, float]] = {}
    for path, value in metrics.items():
        if path.startswith("strata/"):
            # A label may hold slashes, a name holds none.
            stratum, _, name = path.removeprefix("strata/").rpartition("/")
            found.setdefault(stratum, {})[name] = value
    return found


def report_table(metrics: Mapping[str, float]) -> Table:
    """Return the table of a report from what `Report.metrics` gave, such as a line of a run's metrics file holds."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="advantages by stratum", title_justify="left", caption_justify="left", box=None)
    for heading in ("stratum", "rollouts", "reward", "SAN mean", "SAN var", "GN mean", "GN var", "advantage"):
        table.add_column(heading, justify="left" if heading == "stratum" else "right")
    for stratum, values in by_stratum(metrics).items():
        rollouts, reward, *rest = (values[f.name] for f in fields(StratumReport) if f.name != "key")
        table.add_row(escape(stratum), f"{rollouts:.0f}", f"{reward:.3f}", *(f"{value:.2f}" for value in rest))
    table.caption = (
        f"{metrics['rollouts']:.0f} rollouts ({metrics['excluded']:.0f} more excluded), {metrics['groups']:.0f} groups, "
        f"{metrics['strata']:.0f} strata\n"
        f"reward variance between strata {metrics['between_strata_share']:.0%}, "
        f"rollouts in degenerate strata {metrics['degenerate_share']:.0%}\n"
        f"groups without signal: GN {metrics['no_signal_share_gn']:.0%}, SAN {metrics['no_signal_share_san']:.0%}, "
        f"as trained {metrics['no_signal_share']:.0%}\n"
        f"effective rollouts {metrics['effective_rollouts']:.1f}, sign unlike GN's {metrics['sign_flip_share']:.0%}"
    )
    return table


def summarise(batch: Batch, advantages: Floats, excluded: int) -> Report:
    """Describe a batch and its advantages, [n] or [n, T], beside which `excluded` rollouts do not count."""
    group, stratum = batch.by_group, batch.by_stratum
    gn, san = standardise(group, batch.groups, 0.0, 0), standardise(stratum, batch.strata, 0.0, 0)
    bias = np.bincount(batch.strata, group.centred) / stratum.count
    between = np.bincount(batch.stratum_groups, stratum.count * bias**2)
    total = np.bincount(batch.groups, group.centred**2)
    varied = ~group.degenerate
    sounds = ~stratum.degenerate
    magnitude = np.abs(advantages)
    signal = magnitude.max(axis=1, initial=0.0) if advantages.ndim == 2 else magnitude
    rollout = advantages.sum(axis=1) if advantages.ndim == 2 else advantages
    square = float((magnitude**2).sum())
    of_group, of_stratum = (moments(rollout, parts, batch.tolerance) for parts in (batch.groups, batch.strata))
    return Report(
        rollouts=len(batch.rewards),
        excluded=excluded,
        groups=len(group.count),
        strata=len(stratum.count),
        degenerate_share=_share(~sounds[batch.strata]),
        between_strata_share=_mean(between[varied] / total[varied]),
        no_signal_share_gn=_share(group.degenerate),
        no_signal_share_san=_share(np.bincount(batch.stratum_groups, sounds) == 0),
        no_signal_share=_share(np.bincount(batch.groups, signal) == 0),
        effective_rollouts=float(magnitude.sum()) ** 2 / square if square else 0.0,
        sign_flip_share=_share(rollout * gn < 0),
        variance_between_strata=_mean((of_group.centred - of_stratum.centred) ** 2),
        variance_within_strata=_mean(of_stratum.centred**2),
        per_stratum=_per_stratum(batch, san, gn, rollout),
    )


def _per_stratum(batch: Batch, san: Floats, gn: Floats, advantages: Floats) -> tuple[StratumReport, ...]:
    key = batch.stratum_keys[batch.strata]
    count = np.bincount(key, minlength=len(batch.keys))

    def mean(values: Floats) -> Floats:
        return np.bincount(key, values, len(count)) / count

    columns = [mean(batch.rewards)]
    for scores in (san, gn):
        # Scores are of size 1 about 0, so the mean of squares loses no digits.
        middle = mean(scores)
        columns += [middle, np.maximum(mean(scores**2) - middle**2, 0.0)]
    columns.append(mean(advantages))
    rows = [
        StratumReport(name, int(n), *(float(column[k]) for column in columns))
        for k, (name, n) in enumerate(zip(batch.keys, count, strict=True))
    ]
    return tuple(sorted(rows, key=lambda row: _order(row.key)))


def _order(key: Hashable) -> tuple[bool, float, str]:
    """Numbers by size, then everything else by its label."""
    if isinstance(key, (int, float)):
        return False, float(key), ""
    return True, 0.0, label(key)


def _share(flags: Bools) -> float:
    return _mean(flags.astype(np.float64))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0
