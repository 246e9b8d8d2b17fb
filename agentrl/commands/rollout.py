"""`agentrl rollout`: from a config and an adapter to a file of episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agentrl.advantages import get_stratifier
from agentrl.advantages.episodes import episode_advantages, group_strata
from agentrl.advantages.outlook import outlook
from agentrl.advantages.schedule import Options
from agentrl.commands.policy import prepare, sampling_pool
from agentrl.config import Config, ConfigError
from agentrl.progress import Progress
from agentrl.runs import write_trajectories
from agentrl.scores import wilson
from agentrl.types import Trajectory, check_failures

QUICK = 3
"""How many questions of each file a quick look takes."""


def run_rollout(
    config: Config,
    *,
    adapter: str | None,
    files: Sequence[str],
    limit: int | None,
    samples: int | None,
    temperature: float | None,
    out: Path | None,
    quick: bool = False,
    on_progress: Callable[[Progress], None],
) -> list[list[Trajectory]]:
    """Sample `samples` episodes (default: rollout.group_size) for each question and return them, one list a question.

    The questions are the first `limit` of each of `files`, or of each set of `data.eval`. `adapter` and `temperature`
    replace the config's own. The new file `out` is written as soon as the last episode is done. With `quick` this process
    samples by itself, see `started_here`, and by default one episode for each of `QUICK` questions of a file.

    Raises:
        AgentRLError, RetrieverError: for missing or unsound inputs, or too many failed episodes.
    """
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: exists already; choose another file")
    limit, samples = limit or (QUICK if quick else None), samples or (1 if quick else None)
    config, questions = prepare(config, adapter, files, limit, "sample for", rewarded=True)
    if out is not None:
        # A folder that cannot be made is found now and not when all episodes are done.
        out.parent.mkdir(parents=True, exist_ok=True)
    count = samples or config.rollout.group_size
    requests = [(question, [f"rollout/{question.id}/{i}" for i in range(count)]) for question in questions]
    with sampling_pool(config, on_progress, quick) as pool:
        total = count * len(questions)
        on_progress(Progress(0, "sampling", 0, total))
        groups = pool.sample(
            requests,
            config.agent.temperature if temperature is None else temperature,
            lambda done: on_progress(Progress(0, "sampling", done, total)),
            lambda message: on_progress(Progress(0, message, 0, 0)),
        )
    everyone = [trajectory for group in groups for trajectory in group]
    # Recorded before anything can fail on them.
    if out is not None:
        write_trajectories(out, everyone)
    check_failures(everyone, config.rollout.max_failed_share)
    return groups


def summary(config: Config, groups: Sequence[Sequence[Trajectory]]) -> Group:
    """Describe sampled groups: counts, reward, searches, ends, and the strata as the config's estimator sees them.

    Where all rewards are 0 or 1, the mean reward has a 95 % interval (Wilson's), which takes episodes as independent.
    Episodes of one question are alike, so the interval speaks of these questions and not of others.
    """
    everyone = [trajectory for group in groups for trajectory in group]
    valid = [t for t in everyone if t.valid and t.reward is not None]
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    failed = len(everyone) - len(valid)
    rows.add_row(
        "episodes", f"{len(everyone)} for {len(groups)} question(s)" + (f", {failed} failed" if failed else "")
    )
    if failed:
        causes = Counter(str(t.cause or t.end) for t in everyone if not t.valid)
        rows.add_row("failures", ", ".join(f"{cause} {count}" for cause, count in causes.most_common()))
    if valid:
        rows.add_row("reward", _reward([float(t.reward or 0) for t in valid]))
        rows.add_row("searches", f"{sum(len(t.searches) for t in valid) / len(valid):.2f} an episode")
    ends = Counter(t.end.value for t in everyone)
    rows.add_row("ends", ", ".join(f"{end} {n / len(everyone):.0%}" for end, n in ends.most_common()))
    # Advantages compare the episodes of a group.
    if not valid or all(len(group) == 1 for group in groups):
        return Group(rows)
    return Group(rows, Text(), *_strata(config, groups))


def _reward(rewards: Sequence[float]) -> str:
    mean = f"{np.mean(rewards):.3f}"
    if not set(rewards) <= {0.0, 1.0}:
        return mean
    low, high = wilson(int(sum(rewards)), len(rewards))
    return f"{mean}, 95 % interval {low:.3f} to {high:.3f}"


def _strata(config: Config, groups: Sequence[Sequence[Trajectory]]) -> Iterator[RenderableType]:
    """Yield the table of the advantages that a training step would give these groups at its start, and their outlook."""
    settings = config.advantages
    everyone = [trajectory for group in groups for trajectory in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    strata = group_strata(groups, get_stratifier(settings.stratum, config.seed), settings.max_strata, settings.scope)
    yield episode_advantages(
        everyone,
        numbers,
        strata,
        estimator=settings.estimator,
        scope=settings.scope,
        options=Options(settings.options).at(0.0),
    ).report.table()
    rewards, valid = [t.reward or 0.0 for t in everyone], [t.valid and t.reward is not None for t in everyone]
    found = outlook(rewards, numbers, strata, valid)
    if found is not None:
        yield Text()
        yield found.table()
