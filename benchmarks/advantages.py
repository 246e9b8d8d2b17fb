"""How long the stratified advantages of a million rollouts take, beside two ways of writing them oneself.

    python benchmarks/advantages.py [--rollouts N] [--runs N] [--json FILE]

The rivals do the same work on one core in the same run: pandas' `groupby(...).transform`, and a loop over the groups with
one `mean` and `std` for each stratum, as trainers write it. Their advantages must agree with ours to 1e-9. Time is the
median of the runs with their range; memory the largest growth of the process, measured in one of its own (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agentrl.advantages import compute

ALPHA, EPS, GROUP, STRATA, SEED = 0.8, 1e-6, 8, 5, 0

Arrays = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def rollouts(count: int) -> Arrays:
    """Return rewards, groups and strata [count] of binary rewards in groups of 8 with up to 5 strata."""
    rng = np.random.default_rng(SEED)
    return rng.integers(0, 2, count).astype(np.float64), np.arange(count) // GROUP, rng.integers(0, STRATA, count)


def agentrl_compute(rewards: NDArray, groups: NDArray, strata: NDArray) -> NDArray:
    return compute(rewards, groups, strata, alpha=ALPHA, eps=EPS).values


def agentrl_with_report(rewards: NDArray, groups: NDArray, strata: NDArray) -> NDArray:
    result = compute(rewards, groups, strata, alpha=ALPHA, eps=EPS)
    assert result.report.rollouts == len(rewards)
    return result.values


def pandas_groupby(rewards: NDArray, groups: NDArray, strata: NDArray) -> NDArray:
    frame = pd.DataFrame({"reward": rewards, "group": groups, "stratum": strata})

    def scores(by: list[str]) -> NDArray:
        part = frame.groupby(by)["reward"]
        deviation = frame["reward"] - part.transform("mean")
        return (deviation / (part.transform("std", ddof=0) + EPS)).to_numpy()

    return ALPHA * scores(["group", "stratum"]) + (1 - ALPHA) * scores(["group"])


def loop_over_groups(rewards: NDArray, groups: NDArray, strata: NDArray) -> NDArray:
    values = np.zeros(len(rewards))
    for start in range(0, len(rewards), GROUP):
        reward, stratum = rewards[start : start + GROUP], strata[start : start + GROUP]
        score = (1 - ALPHA) * (reward - reward.mean()) / (reward.std() + EPS)
        for key in set(stratum.tolist()):
            own = stratum == key
            score[own] += ALPHA * (reward[own] - reward[own].mean()) / (reward[own].std() + EPS)
        values[start : start + GROUP] = score
    return values


METHODS: dict[str, Callable[..., NDArray]] = {
    "agentrl": agentrl_compute,
    "agentrl with report": agentrl_with_report,
    "pandas": pandas_groupby,
    "loop": loop_over_groups,
}


def growth_mib(name: str, count: int) -> float:
    """Return how much the process of a fresh interpreter grows at most while `name` runs."""
    line = [sys.executable, __file__, "--memory-of", name, "--rollouts", str(count)]
    return float(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def print_growth(name: str, count: int) -> None:
    # A small call first, so that what is imported late is not counted.
    METHODS[name](*rollouts(GROUP * 100))
    data = rollouts(count)
    # Writing 5 there makes Linux count the peak from now on.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    METHODS[name](*data)
    print((memory_kib("VmHWM") - before) / 1024)


def memory_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.memory_of:
        print_growth(options.memory_of, options.rollouts)
        return
    console = Console()
    data = rollouts(options.rollouts)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in track(range(options.runs), "runs", console=console):
        results = {}
        # The methods take turns, so that what else the machine does falls on all of them.
        for name, method in METHODS.items():
            started = time.perf_counter()
            results[name] = method(*data)
            seconds[name].append(time.perf_counter() - started)
        for name, result in results.items():
            np.testing.assert_allclose(result, results["agentrl"], rtol=0, atol=1e-9, err_msg=name)
    report = {
        "rollouts": options.rollouts,
        "group_size": GROUP,
        "strata": STRATA,
        "seed": SEED,
        "machine": platform.platform(),
        "numpy": np.__version__,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "growth_mib": {name: growth_mib(name, options.rollouts) for name in METHODS},
    }
    report["ratios"] = {
        name: value / report["median_seconds"]["agentrl"] for name, value in report["median_seconds"].items()
    }
    table = Table(
        "method", "median s", "range s", "times agentrl's", "MiB", title=f"{options.rollouts:,} rollouts, one core"
    )
    for name, values in seconds.items():
        table.add_row(
            name,
            f"{report['median_seconds'][name]:.3f}",
            f"{min(values):.3f} to {max(values):.3f}",
            f"{report['ratios'][name]:.1f}",
            f"{report['growth_mib'][name]:.0f}",
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
