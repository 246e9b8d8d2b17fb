"""What the runs of a study of learning say: one record a run, tables over runs and variants, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from learning_cells import Cell, read_origin, read_times
from rich.table import Table
from scipy import stats

from agentrl.advantages import by_stratum
from agentrl.scores import wilson
from agentrl.types import End

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW, THRESHOLD = 5, 0.75

Record = dict[str, Any]
"""What `read_record` returns."""


def read_record(cell: Cell) -> Record:
    """Describe a finished run.

    `before` and `after` are exact match over all sets with Wilson's interval, None where it was not asked for. `minutes`
    are of work from the start, evaluations among it, as are `seconds_to_first_step` and `minutes_to_threshold`: until the
    mean reward of WINDOW steps first passes THRESHOLD, None if it never does. `failed` counts environment failures,
    `excluded` prompts that were too long, both in training and evaluations. `date`, `cpu` and `versions` are as `read_origin`
    says. `steps` has reward, searches, the share of each stratum, and minutes.
    """
    folder, metrics = cell.folder, cell.folder.read_metrics()
    seconds, spent = read_times(cell)
    found = {"before": folder.read_evaluation(0), "after": folder.read_evaluation(cell.config.training.steps)}
    causes = [result["causes"] for scores in found.values() if scores for result in scores["sets"]]
    prompts = End.PROMPT_TOO_LONG.value
    steps = [
        {
            "step": line["step"],
            "reward": line["reward/mean"],
            "searches": line["searches/mean"],
            "strata": {name: values["share"] for name, values in by_stratum(line).items()},
            "minutes": seconds[line["step"]] / 60 if line["step"] in seconds else None,
        }
        for line in metrics
    ]
    passed = passing_step([math.nan if step["reward"] is None else step["reward"] for step in steps])
    return {
        "variant": cell.variant,
        "seed": cell.seed,
        **{when: _pooled(scores) for when, scores in found.items()},
        "minutes": spent / 60,
        "seconds_to_first_step": seconds.get(1),
        "minutes_to_threshold": None if passed is None else steps[passed - 1]["minutes"],
        "failed": int(sum(_failures(line) for line in metrics))
        + sum(number for cause in causes for name, number in cause.items() if name != prompts),
        "excluded": round(sum(line["episodes"] * line.get(f"ends/{prompts}", 0.0) for line in metrics))
        + sum(cause.get(prompts, 0) for cause in causes),
        **read_origin(cell),
        "steps": steps,
    }


def passing_step(rewards: Sequence[float]) -> int | None:
    """Return the first step (from 1) at which the mean of the last WINDOW rewards exceeds THRESHOLD, None if there is none."""
    for end in range(WINDOW, len(rewards) + 1):
        if np.mean(rewards[end - WINDOW : end]) > THRESHOLD:
            return end
    return None


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """Return mean, and `low` and `high` of its 95 % interval over seeds (Student's t); these are None for one seed alone.

    Returns None unless every seed has a value.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = float(np.mean(known))
    if len(known) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Return the means over the seeds of one variant, see `over_seeds`; `passed` counts the runs that pass THRESHOLD."""
    return {
        "seeds": [record["seed"] for record in records],
        "before": over_seeds([_em(record, "before") for record in records]),
        "after": over_seeds([_em(record, "after") for record in records]),
        "gain": over_seeds([_gain(record) for record in records]),
        "minutes": over_seeds([record["minutes"] for record in records]),
        "seconds_to_first_step": over_seeds([record["seconds_to_first_step"] for record in records]),
        "minutes_to_threshold": over_seeds([record["minutes_to_threshold"] for record in records]),
        "last_rewards": over_seeds([_last_reward(record) for record in records]),
        "passed": sum(record["minutes_to_threshold"] is not None for record in records),
        "failed": sum(record["failed"] for record in records),
        "excluded": sum(record["excluded"] for record in records),
    }


def run_table(records: Sequence[Record]) -> Table:
    """Lay out exact match, one line a run, and below each variant the means over its seeds.

    It fits into 80 columns, as `cost_table` does; only a variant's name is broken where it is long.
    """
    headings = ("EM before [95 %]", "EM after [95 %]", "apart")
    rows = {
        variant: [[_interval(record["before"]), _interval(record["after"]), _apart(record)] for record in own]
        + [[*(_mean(summarize(own)[when]) for when in ("before", "after")), ""]]
        for variant, own in by_variant(records).items()
    }
    return _by_run("Runs", headings, rows, records, "left")


def cost_table(records: Sequence[Record]) -> Table:
    """Lay out times, failures and exclusions as `run_table` does exact match; the last two are summed below."""
    headings = ("minutes", "s to\nstep 1", f"min to\n{THRESHOLD:g}", "failed", "excluded")
    digits = {"minutes": 1, "seconds_to_first_step": 0, "minutes_to_threshold": 1}
    rows = {}
    for variant, own in by_variant(records).items():
        whole = summarize(own)
        means = {name: whole[name] and whole[name]["mean"] for name in digits}
        counts = {name: whole[name] for name in ("failed", "excluded")}
        rows[variant] = [
            [*(_shown(line[name], digits[name]) for name in digits), str(line["failed"]), str(line["excluded"])]
            for line in (*own, means | counts)
        ]
    return _by_run("Time and losses", headings, rows, records, "right")


def _by_run(
    title: str,
    headings: Sequence[str],
    rows: Mapping[str, Sequence[Sequence[str]]],
    records: Sequence[Record],
    justify: Literal["left", "right"],
) -> Table:
    """Lay out the rows of each variant, one for each of its runs and one of means."""
    table = Table(title=title, title_justify="left")
    variants = by_variant(records)
    if several := len(variants) > 1:
        table.add_column("variant", overflow="fold")
    table.add_column("seed", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify=justify, no_wrap=True)
    for variant, own in variants.items():
        seeds = [*(str(record["seed"]) for record in own), "mean"]
        for seed, row in zip(seeds, rows[variant], strict=True):
            table.add_row(*([variant] if several else []), seed, *row, end_section=seed == "mean")
    return table


def variant_table(records: Sequence[Record]) -> Table:
    """Lay out one line a variant: means over its seeds with their intervals."""
    table = Table(title="Means over seeds [95 %]", title_justify="left")
    headings = ("variant", "seeds", "EM before", "EM after", "gain", f"reward, last {WINDOW}", f"min to {THRESHOLD:g}")
    for heading in (*headings, "passed"):
        # Where a console is narrow, words are broken rather than cut.
        table.add_column(heading, overflow="fold")
    for variant, own in by_variant(records).items():
        whole = summarize(own)
        cells = [_mean(whole[name]) for name in ("before", "after", "gain", "last_rewards")]
        passed = f"{whole['passed']} of {len(own)}"
        table.add_row(variant, str(len(own)), *cells, _mean(whole["minutes_to_threshold"], 1), passed)
    return table


def by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["variant"], []).append(record)
    return found


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw reward and searches by step, a mean and a 95 % band over seeds for each variant; of a single one its strata too.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    variants = by_variant(records)
    alone = len(variants) == 1
    figure = Figure(figsize=(13 if alone else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if alone else 2)
    for axis, name in zip(axes[:2], ("reward", "searches"), strict=True):
        for variant, own in variants.items():
            _band(axis, [_curve(record, name) for record in own], variant)
        axis.set(xlabel="step", ylabel=name)
    axes[0].set_ylim(0, 1)
    if alone:
        (own,) = variants.values()
        _draw_strata(axes[2], own)
    else:
        axes[0].legend()
    figure.savefig(path, dpi=120)


def _band(axis: Axes, curves: Sequence[Sequence[float]], label: str) -> None:
    length = min(map(len, curves))
    values, steps = np.array([curve[:length] for curve in curves]), np.arange(1, length + 1)
    (line,) = axis.plot(steps, values.mean(0), label=label)
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(0, ddof=1) / math.sqrt(len(values))
        axis.fill_between(steps, values.mean(0) - half, values.mean(0) + half, color=line.get_color(), alpha=0.2)
        axis.plot(steps, values.T, color=line.get_color(), alpha=0.35, linewidth=0.7)


def _draw_strata(axis: Axes, records: Sequence[Record]) -> None:
    length = min(len(record["steps"]) for record in records)
    names = sorted({name for record in records for step in record["steps"] for name in step["strata"]})
    shares = [
        [np.mean([record["steps"][i]["strata"].get(name, 0.0) for record in records]) for i in range(length)]
        for name in names
    ]
    axis.stackplot(np.arange(1, length + 1), shares, labels=names, alpha=0.8)
    axis.set(xlabel="step", ylabel="share of the stratum", ylim=(0, 1))
    axis.legend(loc="lower right")


def _pooled(scores: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return exact match over all sets of an evaluation."""
    n = 0 if scores is None else sum(result["n"] for result in scores["sets"])
    if not n:
        return None
    right = round(sum(result["em"] * result["n"] for result in scores["sets"]))
    low, high = wilson(right, n)
    return {"n": n, "em": right / n, "low": low, "high": high}


def _failures(metrics: Mapping[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("failures/"))


def _curve(record: Record, name: str) -> list[float]:
    # A step without a valid episode has none.
    return [math.nan if step[name] is None else step[name] for step in record["steps"]]


def _last_reward(record: Record) -> float | None:
    mean = float(np.mean(_curve(record, "reward")[-WINDOW:]))
    return None if math.isnan(mean) else mean


def _em(record: Record, when: str) -> float | None:
    return record[when] and record[when]["em"]


def _gain(record: Record) -> float | None:
    before, after = _em(record, "before"), _em(record, "after")
    return None if before is None or after is None else after - before


def _apart(record: Record) -> str:
    before, after = record["before"], record["after"]
    if before is None or after is None:
        return "-"
    return "yes" if before["high"] < after["low"] or after["high"] < before["low"] else "no"


def _interval(score: Mapping[str, float] | None) -> str:
    return "-" if score is None else f"{score['em']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _mean(whole: Mapping[str, float | None] | None, digits: int = 3) -> str:
    if whole is None:
        return "-"
    mean = f"{whole['mean']:.{digits}f}"
    return mean if whole["low"] is None else f"{mean} [{whole['low']:.{digits}f}, {whole['high']:.{digits}f}]"


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
