"""How `rollout.py` shows what it measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from measuring import written
from rich.table import Table


def barrier_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        "model",
        "search ms",
        "agentrl s",
        "barriers s",
        "times as fast",
        "episodes/s",
        "equal",
        title="Against turn barriers",
        title_justify="left",
        caption="times as fast: median of the rounds with their range; equal: turns with the same prompt and ids",
        caption_justify="left",
    )
    for model in ("small", "smollm2"):
        for row in report.get(model, {}).get("barriers", []):
            table.add_row(
                model,
                f"{row['latency_ms']:.0f}",
                f"{statistics.median(row['agentrl_seconds']):.2f}",
                f"{statistics.median(row['barrier_seconds']):.2f}",
                written(row["ratio"]),
                f"{row['trajectories_per_second']['median']:.2f}",
                f"{row['equal_turns']:.1%}",
            )
    return table


def engine_table(engine: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(
        "requests sent", "time / episodes' time", title="The engine alone, zero latency", title_justify="left"
    )
    table.add_row("all at once", written(engine["share"]))
    table.add_row("each after the turn before it", written(engine["share_chained"]))
    table.caption = f"prompt tokens computed, all at once / in episodes: {written(engine['computed_ratio'])}"
    return table


def trl_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("TRL's engine", "search ms", "agentrl s", "TRL s", "times as fast", title_justify="left")
    table.title = "Against TRL's tool loop"
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['latency_ms']:.0f}",
            f"{statistics.median(row['agentrl_seconds']):.2f}",
            f"{statistics.median(row['trl_seconds']):.2f}",
            written(row["ratio"]),
        )
    return table


def reuse_table(report: Mapping[str, Any]) -> Table:
    table = Table(
        "model", "turns", "prompt tokens sent", "computed", "share", title="Prefix reuse", title_justify="left"
    )
    for model in ("small", "smollm2"):
        for row in report.get(model, {}).get("reuse", []):
            table.add_row(model, f"{row['turns']}", f"{row['sent']:,}", f"{row['computed']:,}", f"{row['share']:.2f}")
    return table


def cutting_table(cutting: Mapping[str, float]) -> Table:
    table = Table("sampling", "tokens", title="Tokens for the same kept text, SmolLM2", title_justify="left")
    table.add_row("stop at the tag", f"{cutting['stopped']:,}")
    table.add_row("500 a turn, cut at the tag", f"{cutting['cut']:,}")
    table.caption = (
        f"{cutting['ratio']:.1f} times as many in {cutting['turns']} turns, {cutting['same_kept_ids']:.0%} of which "
        "began with the same ids"
    )
    return table
