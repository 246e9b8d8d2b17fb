"""Curves over the steps of the runs of a study of learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from learning_tables import Record, by_variant, curve
from scipy import stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES = ("reward", "searches", "entropy", "gradient norm")
_COLUMNS = len(_CURVES)


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw _CURVES by step, a mean and a 95 % band over seeds for each variant, and below them the strata of each variant.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    variants = by_variant(records)
    rows = 1 + math.ceil(len(variants) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.5 * rows), layout="constrained")
    above, *below = figure.subplots(rows, _COLUMNS)
    for axis, name in zip(above, _CURVES, strict=True):
        for variant, own in variants.items():
            _band(axis, [curve(record, name) for record in own], variant)
        axis.set(xlabel="step", ylabel=name)
    above[0].set_ylim(0, 1)
    above[0].legend(fontsize="small")
    places = [axis for row in below for axis in row]
    for axis, (variant, own) in zip(places, variants.items(), strict=False):
        _draw_strata(axis, own)
        axis.set_title(variant)
    for axis in places[len(variants) :]:
        axis.axis("off")
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
