"""What the benchmarks share: whose turn it is, processes of their own, medians and spreads, and how these are written."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import numpy as np

SHARES = (50, 95, 99)

_Result = TypeVar("_Result")


def in_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run a function in a process of its own, which ends with it, and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """Return the names beginning with another one in each round, so that each is first as often."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 by nearest rank: the smallest value that at least so many percent do not exceed."""
    found = np.percentile(np.asarray(values), SHARES, method="inverted_cdf")
    return {f"p{share}": float(value) for share, value in zip(SHARES, found, strict=True)}


def written(values: Mapping[str, float], digits: int = 2) -> str:
    """Return what `spread` found as "median (least–most)"."""
    median, least, most = (f"{values[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least}–{most})"
