"""What the runs of a study of learning say: one record a run, and tables over runs and variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from learning_cells import Cell, read_origin, read_times
from learning_pairs import compare_pairs
from rich.table import Table
from scipy import stats

from agentrl.advantages import by_stratum
from agentrl.rewards import exact_match
from agentrl.runs import read_trajectories
from agentrl.scores import wilson
from agentrl.training.watch import Watch
from agentrl.types import End

WINDOW, THRESHOLD = 5, 0.75

Record = dict[str, Any]
"""What `read_record` returns."""

STEP_METRICS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "reward": lambda line: line["reward/mean"],
    "searches": lambda line: line["searches/mean"],
    "entropy": lambda line: line.get("entropy"),
    "gradient norm": lambda line: line.get("grad_norm"),
    "length": lambda line: line["tokens/model"] / line["episodes"] if "tokens/model" in line else None,
    "variance between": lambda line: line.get("advantages/variance_between_strata"),
    "variance within": lambda line: line.get("advantages/variance_within_strata"),
}
"""What records keep of each step: length in the model's own tokens an episode, and the variance of advantages between and within
strata."""


def read_record(cell: Cell) -> Record:
    """Describe a finished run.

    `before` and `after` are exact match over all sets with Wilson's interval, None where it was not asked for. `minutes`
    are of work from the start, evaluations among it, as are `seconds_to_first_step` and `minutes_to_threshold`: until the
    mean reward of WINDOW steps first passes THRESHOLD, None if it never does. `failed` counts environment failures,
    `excluded` prompts that were too long, both in training and evaluations. `date`, `cpu` and `versions` are as `read_origin`
    says. `collapses` is what `training.watch` had to say. `right` has a sign for each question of the last evaluation, ordered
    by id: 1 or 0, or - without a score. `steps` has STEP_METRICS, the share of each stratum, and minutes.
    """
    folder, metrics = cell.folder, cell.folder.read_metrics()
    seconds, spent = read_times(cell)
    found = {"before": folder.read_evaluation(0), "after": folder.read_evaluation(cell.config.training.steps)}
    causes = [result["causes"] for scores in found.values() if scores for result in scores["sets"]]
    prompts = End.PROMPT_TOO_LONG.value
    steps = [
        {
            "step": line["step"],
            **{name: read(line) for name, read in STEP_METRICS.items()},
            "strata": {name: values["share"] for name, values in by_stratum(line).items()},
            "minutes": seconds[line["step"]] / 60 if line["step"] in seconds else None,
        }
        for line in metrics
    ]
    passed = passing_step([math.nan if step["reward"] is None else step["reward"] for step in steps])
    return {
        **({"mix": cell.mix} if cell.mix else {}),
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
        "collapses": _collapses(cell, metrics),
        "right": _outcomes(cell.folder.evaluated_file(cell.config.training.steps)),
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
        "collapsed": sum(bool(record.get("collapses")) for record in records),
        "dynamics": {name: _ends(records, name) for name in STEP_METRICS},
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
    """Lay out one line a variant: exact match, a mean over its seeds with its interval, and what was lost on the way."""
    table = Table(title="Means over seeds [95 %]", title_justify="left")
    for heading in ("variant", "seeds", "EM before", "EM after", "gain", "collapsed", "failed", "excluded"):
        # Where a console is narrow, words are broken rather than cut.
        table.add_column(heading, overflow="fold")
    for variant, own in by_variant(records).items():
        whole = summarize(own)
        cells = [_mean(whole[name]) for name in ("before", "after", "gain")]
        lost = [f"{whole['collapsed']} of {len(own)}", str(whole["failed"]), str(whole["excluded"])]
        table.add_row(variant, str(len(own)), *cells, *lost)
    return table


def speed_table(records: Sequence[Record]) -> Table:
    """Lay out one line a variant: how far and how fast rewards rose, means over its seeds with their intervals."""
    table = Table(title="Rewards in training [95 %]", title_justify="left")
    for heading in ("variant", f"reward, last {WINDOW}", f"min to {THRESHOLD:g}", "passed"):
        table.add_column(heading, overflow="fold")
    for variant, own in by_variant(records).items():
        whole = summarize(own)
        speed = _mean(whole["minutes_to_threshold"], 1)
        table.add_row(variant, _mean(whole["last_rewards"]), speed, f"{whole['passed']} of {len(own)}")
    return table


def dynamics_table(records: Sequence[Record]) -> Table:
    """Lay out one line a variant: the mean over seeds of each metric of STEP_METRICS in the first and the last WINDOW steps.

    The variance between strata is given as a share of that of the advantages.
    """
    table = Table(title=f"Means of the first and the last {WINDOW} steps", title_justify="left")
    shown = [name for name in STEP_METRICS if not name.startswith("variance")]
    for heading in ("variant", *shown, "variance between strata"):
        table.add_column(heading, overflow="fold")
    for variant, own in by_variant(records).items():
        ends = {name: _ends(own, name) for name in STEP_METRICS}
        cells = [_from_to(*ends[name]) for name in shown]
        shares = [
            None if between is None or within is None or between + within == 0 else between / (between + within)
            for between, within in zip(ends["variance between"], ends["variance within"], strict=True)
        ]
        table.add_row(variant, *cells, _from_to(*shares))
    return table


def strata_table(records: Sequence[Record]) -> Table:
    """Lay out one line a variant: the share of each stratum in the first and the last WINDOW steps, a mean over seeds."""
    labels = sorted({label for record in records for step in record["steps"] for label in step["strata"]})
    table = Table(title=f"Shares of the strata in the first and the last {WINDOW} steps", title_justify="left")
    for heading in ("variant", *labels):
        table.add_column(heading, overflow="fold")
    for variant, own in by_variant(records).items():
        cells = [_from_to(*(_share(steps, label) for steps in _first_and_last(own))) for label in labels]
        table.add_row(variant, *cells)
    return table


def paired_table(records: Sequence[Record], reference: str) -> Table:
    """Lay out how each variant compares with `reference`, see `compare_pairs`."""
    table = Table(title=f"Exact match after training, against {reference}", title_justify="left")
    for heading in (
        "variant",
        "seeds",
        "pairs",
        "difference [95 %]",
        "only it right",
        f"only {reference} right",
        "p",
        "p (Holm)",
    ):
        table.add_column(heading, overflow="fold")
    for variant, found in compare_pairs(records, reference).items():
        difference = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        counts = [str(found[name]) for name in ("seeds", "pairs")]
        alone = [str(found[name]) for name in ("gained", "lost")]
        table.add_row(variant, *counts, difference, *alone, *(f"{found[name]:.2g}" for name in ("p", "p_holm")))
    return table


def by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["variant"], []).append(record)
    return found


def _pooled(scores: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return exact match over all sets of an evaluation."""
    n = 0 if scores is None else sum(result["n"] for result in scores["sets"])
    if not n:
        return None
    right = round(sum(result["em"] * result["n"] for result in scores["sets"]))
    low, high = wilson(right, n)
    return {"n": n, "em": right / n, "low": low, "high": high}


def _collapses(cell: Cell, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    watch = Watch(cell.config.training.watch)
    return [reason for line in metrics for reason in watch.see(line)]


def _outcomes(path: Path) -> str | None:
    """Return the outcomes of an evaluation, see `read_record`; None without its episodes."""
    if not path.exists():
        return None
    episodes = sorted(read_trajectories(path), key=lambda episode: episode.question.id)
    return "".join(f"{exact_match(episode):.0f}" if episode.valid else "-" for episode in episodes)


def _ends(records: Sequence[Record], name: str) -> list[float | None]:
    """Return the means of a metric over the first and the last WINDOW steps of all records, None where no step has it."""
    found = []
    for steps in _first_and_last(records):
        known = [step[name] for step in steps if step.get(name) is not None]
        found.append(float(np.mean(known)) if known else None)
    return found


def _first_and_last(records: Sequence[Record]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the first and the last WINDOW steps of all records."""
    return (
        [step for record in records for step in record["steps"][:WINDOW]],
        [step for record in records for step in record["steps"][-WINDOW:]],
    )


def _share(steps: Sequence[Mapping[str, Any]], label: str) -> float:
    return float(np.mean([step["strata"].get(label, 0.0) for step in steps]))


def _from_to(first: float | None, last: float | None) -> str:
    return f"{_shown(first, 3)} to {_shown(last, 3)}"


def _failures(metrics: Mapping[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("failures/"))


def curve(record: Record, name: str) -> list[float]:
    """Return a metric of STEP_METRICS by step, NaN where a step has none."""
    return [math.nan if step.get(name) is None else step[name] for step in record["steps"]]


def _last_reward(record: Record) -> float | None:
    mean = float(np.mean(curve(record, "reward")[-WINDOW:]))
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
