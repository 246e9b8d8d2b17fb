"""From the questions of a step to a scored batch: rollouts, group checks, strata, advantages and the step's metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agentrl.advantages import compute, get_stratifier, label
from agentrl.config import Config
from agentrl.rollout.failures import check_failures
from agentrl.types import Question, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The trajectories of one step, group after group, with an advantage for each and the step's metrics."""

    trajectories: Sequence[Trajectory]
    advantages: Sequence[float]
    metrics: dict[str, float]


class StepSampler:
    """Samples and scores the groups of one step after another."""

    def __init__(
        self,
        config: Config,
        pool: RolloutPool,
        order: Sequence[Question],
        current_step: Callable[[], int],
        on_batch: Callable[[int, Sequence[Trajectory]], None],
        on_done: Callable[[int], None],
    ) -> None:
        """`order` is the data order of the whole run; `current_step` returns the number of the step being taken, from 1.

        `on_batch` receives the step and its trajectories, `on_done` the number of episodes that are done.
        """
        self._config = config
        self._pool = pool
        self._order = order
        self._current_step = current_step
        self._on_batch = on_batch
        self._on_done = on_done

    def __call__(self, positions: list[int]) -> ScoredBatch:
        """Roll out the questions at `positions` of the order, each repeated group-size times, and score them.

        Raises:
            EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
            GroupError: if a group is not what it should be.
        """
        size = self._config.rollout.group_size
        step = self._current_step()
        requests = []
        for start in range(0, len(positions), size):
            position = positions[start]
            if positions[start : start + size] != [position] * size:
                raise RuntimeError(f"step {step}: rows {start} to {start + size - 1} are not {size} times one question")
            # The position makes the id unique where a question comes again in a later epoch.
            requests.append((self._order[position], [f"{step}/{position}/{i}" for i in range(size)]))
        self._on_done(0)
        started = time.monotonic()
        sampled = self._pool.sample(requests, self._config.agent.temperature, self._on_done)
        seconds = time.monotonic() - started
        groups = [
            TrajectoryGroup(question, tuple(trajectories), size)
            for (question, _), trajectories in zip(requests, sampled, strict=True)
        ]
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        self._on_batch(step, trajectories)
        check_failures(trajectories, self._config.rollout.max_failed_share)

        settings = self._config.advantages
        stratum = get_stratifier(settings.stratum)
        strata = [stratum(trajectory) for trajectory in trajectories]
        rewards = [np.nan if t.reward is None else t.reward for t in trajectories]
        group_numbers = [number for number in range(len(groups)) for _ in range(size)]
        advantages = compute(
            rewards,
            groups=group_numbers,
            strata=strata,
            estimator=settings.estimator,
            **settings.options,
        )
        metrics = batch_metrics(trajectories, strata, group_numbers)
        metrics |= {f"advantages/{name}": value for name, value in advantages.report.items()}
        tokens = metrics["tokens/model"] + metrics["tokens/environment"]
        metrics |= {"seconds/rollout": seconds, "tokens_per_second/rollout": tokens / seconds}
        return ScoredBatch(trajectories, advantages.values.tolist(), metrics)


def batch_metrics(
    trajectories: Sequence[Trajectory], strata: Sequence[Hashable], group_numbers: Sequence[int]
) -> dict[str, float]:
    """Describe a batch: reward, searches, shares of ends and strata, tokens (counts), mean log-probability.

    Shares are of all episodes; reward, searches and strata are over those whose environment did not fail.
    """
    count = len(trajectories)
    valid = [(t, s) for t, s in zip(trajectories, strata, strict=True) if t.valid]
    ends = Counter(trajectory.end.value for trajectory in trajectories)
    masks = [trajectory.action_mask for trajectory in trajectories]
    own = sum(sum(mask) for mask in masks)
    metrics = {
        "episodes": float(count),
        "reward/mean": float(np.mean([t.reward for t, _ in valid])),
        "searches/mean": float(np.mean([len(t.searches) for t, _ in valid])),
        "tokens/model": float(own),
        "tokens/environment": float(sum(map(len, masks)) - own),
        "tokens/prompt": float(sum(len(t.prompt_ids) for t in trajectories)),
        "logprobs/mean": sum(sum(t.logprobs) for t in trajectories) / max(1, own),
        "seconds/search": sum(call.seconds for t in trajectories for call in t.searches)
        / max(1, sum(len(t.searches) for t in trajectories)),
    }
    metrics |= {f"ends/{end}": number / count for end, number in sorted(ends.items())}
    for key in sorted({s for _, s in valid}, key=str):
        rewards = [t.reward for t, s in valid if s == key]
        metrics[f"strata/{label(key)}/share"] = len(rewards) / len(valid)
        metrics[f"strata/{label(key)}/reward"] = float(np.mean(rewards))
    groups: dict[int, list[tuple[float | None, Hashable]]] = {}
    for trajectory, key, number in zip(trajectories, strata, group_numbers, strict=True):
        if trajectory.valid:
            groups.setdefault(number, []).append((trajectory.reward, key))
    metrics["groups/reward_varies"] = float(np.mean([len({r for r, _ in g}) > 1 for g in groups.values()]))
    metrics["groups/several_strata"] = float(np.mean([len({s for _, s in g}) > 1 for g in groups.values()]))
    return metrics
