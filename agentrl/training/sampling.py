"""From the next questions to a scored batch: rollouts, group checks, strata, advantages, selection and metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrl.advantages import Advantages, by_stratum, get_stratifier, label
from agentrl.advantages.episodes import episode_advantages, episode_strata, length
from agentrl.advantages.schedule import Options, StratumRewards
from agentrl.config import Config
from agentrl.data.stream import QuestionStream
from agentrl.types import AgentRLError, Question, Trajectory, TrajectoryGroup, check_failures, count_failures

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool

# No turn of an episode of this question earns anything either.
_WITHOUT_ANSWERS = Question("", "", ())


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The trajectories of one step, group after group, and the step's metrics.

    Attributes:
        trajectories: B episodes.
        advantages: [B], or [B, T] with a value for each turn.
        metrics: by name.
        trained: [B], false where an episode has no token in the loss; None where all valid ones do.
    """

    trajectories: Sequence[Trajectory]
    advantages: Sequence[float] | Sequence[Sequence[float]]
    metrics: dict[str, float]
    trained: Sequence[bool] | None = None


class StepSampler:
    """Samples and scores the groups of one step after another."""

    def __init__(
        self,
        config: Config,
        pool: RolloutPool,
        questions: QuestionStream,
        on_batch: Callable[[int, Sequence[Trajectory]], None],
        on_done: Callable[[int], None],
        on_stall: Callable[[str], None] = lambda message: None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """`history` holds the metrics of the steps that a resumed run has done, from which sampler and options take up
        where they were.

        `on_batch` receives the step and some of its trajectories, each once, as they arrive, `on_done` the number of the
        step's episodes that are done, `on_stall` a line about who waits for whom when nothing gets done.
        """
        self._config = config
        self._pool = pool
        self._questions = questions
        self._on_batch = on_batch
        self._on_done = on_done
        self._on_stall = on_stall
        self._stratifier = get_stratifier(config.advantages.stratum)
        self._options = Options(config.advantages.options)
        self._used = 0
        for metrics in history:
            self._used = int(metrics["questions/used"])
            self._options.observe(_stratum_rewards(metrics))

    def __call__(self, step: int, episodes: int) -> ScoredBatch:
        """Roll out the next questions for a step (from 1), `episodes` episodes in whole groups, and score them.

        Raises:
            EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
            GroupError: if a group is not what it should be.
            AgentRLError: if selection without a bound has gone through as many questions as there are.
        """
        settings = self._config.advantages
        size = self._config.rollout.group_size
        options = self._options.at((step - 1) / self._config.training.steps)
        wanted = episodes // size
        if wanted * size != episodes:
            raise RuntimeError(f"step {step}: {episodes} episodes are not whole groups of {size}")
        sampled: list[TrajectoryGroup] = []
        signal: list[bool] = []
        count, left = wanted, self._bound(wanted)
        started = time.monotonic()
        while count:
            groups = self._roll_out(step, count, done=sum(signal) * size)
            sampled += groups
            # Recorded before anything can fail on them.
            self._on_batch(step, _members(groups))
            check_failures(_members(sampled), self._config.rollout.max_failed_share)
            signal += self._has_signal(groups, options) if settings.selection.enabled else [True] * count
            count = min(wanted - sum(signal), left)
            left -= count
        seconds = time.monotonic() - started
        if sum(signal) < wanted and settings.selection.max_extra is None:
            raise AgentRLError(
                f"step {step}: {len(sampled)} questions gave {sum(signal)} groups with a learning signal instead of "
                f"{wanted}; set advantages.selection.max_extra, or train a model that is sometimes right and sometimes not"
            )
        return self._score(step, sampled, signal, wanted, options, seconds)

    def _bound(self, wanted: int) -> int:
        """Return how many questions a step may sample beyond those that it needs."""
        most = self._config.advantages.selection.max_extra
        return len(self._questions) if most is None else round(most * wanted)

    def _roll_out(self, step: int, count: int, done: int) -> list[TrajectoryGroup]:
        """Sample groups for the next `count` questions, where `done` episodes of the step are done."""
        size = self._config.rollout.group_size
        # The position makes the id unique where a question comes again in a later epoch.
        requests = [
            (question, [f"{step}/{self._used + offset}/{i}" for i in range(size)])
            for offset, question in enumerate(self._questions.take(self._used, count))
        ]
        self._used += count
        self._on_done(done)
        sampled = self._pool.sample(
            requests, self._config.agent.temperature, lambda n: self._on_done(done + n), self._on_stall
        )
        return [
            TrajectoryGroup(question, tuple(trajectories), size)
            for (question, _), trajectories in zip(requests, sampled, strict=True)
        ]

    def _has_signal(self, groups: Sequence[TrajectoryGroup], options: Mapping[str, Any]) -> list[bool]:
        """Tell of each group whether its rewards make a difference to any of its advantages."""
        trajectories = _members(groups)
        strata = self._strata(trajectories)
        rewarded = np.asarray(self._advantages(trajectories, strata, options).values)
        # A term such as the balance of strata is there without any reward.
        plain = [replace(t, reward=0.0 if t.valid else None, question=_WITHOUT_ANSWERS) for t in trajectories]
        values = rewarded - np.asarray(self._advantages(plain, strata, options).values)
        return np.any(values.reshape(len(groups), -1), axis=1).tolist()

    def _strata(self, trajectories: Sequence[Trajectory]) -> list[Hashable]:
        return episode_strata(trajectories, self._stratifier, self._config.advantages.max_strata)

    def _advantages(
        self, trajectories: Sequence[Trajectory], strata: Sequence[Hashable], options: Mapping[str, Any]
    ) -> Advantages:
        size = self._config.rollout.group_size
        return episode_advantages(
            trajectories,
            [i // size for i in range(len(trajectories))],
            strata,
            estimator=self._config.advantages.estimator,
            scope=self._config.advantages.scope,
            options=options,
            group_size=size,
        )

    def _score(
        self,
        step: int,
        sampled: Sequence[TrajectoryGroup],
        signal: Sequence[bool],
        wanted: int,
        options: Mapping[str, Any],
        seconds: float,
    ) -> ScoredBatch:
        """Make a batch of `wanted` groups, those with a signal before others, of which none is trained on."""
        size = self._config.rollout.group_size
        everyone = _members(sampled)
        metrics = batch_metrics(everyone, self._strata(everyone), [i // size for i in range(len(everyone))])
        self._options.observe(_stratum_rewards(metrics))

        kept = _members([group for group, has in zip(sampled, signal, strict=True) if has])
        # TRL needs a batch of one size, so groups without a signal stand where none with one could be found.
        fillers = _members([group for group, has in zip(sampled, signal, strict=True) if not has])
        fillers = fillers[: wanted * size - len(kept)]
        advantages = self._advantages(kept, self._strata(kept), options)
        values = np.asarray(advantages.values)
        values = np.concatenate([values, np.zeros((len(fillers), *values.shape[1:]))])
        trained = [t.valid for t in kept] + [False] * len(fillers)

        metrics |= {f"advantages/{name}": value for name, value in advantages.report.metrics().items()}
        metrics |= {f"advantages/option/{name}": options[name] for name in self._options.moving}
        if self._config.advantages.selection.enabled:
            metrics |= {
                "selection/sampled_groups": float(len(sampled)),
                "selection/dropped_groups": float(len(signal) - sum(signal)),
                "selection/unfilled_groups": float(len(fillers) // size),
            }
        # The weights that a step starts from have the number of the step before.
        staleness = [step - 1 - version for t in kept if t.valid for version in t.adapter_versions]
        metrics |= {
            "staleness/mean": float(np.mean(staleness)) if staleness else 0.0,
            "staleness/max": float(max(staleness, default=0)),
            "questions/used": float(self._used),
            "tokens/trained": float(sum(len(t.prompt_ids) + len(t.completion_ids) for t in kept if t.valid)),
            "seconds/rollout": seconds,
            "tokens_per_second/rollout": (metrics["tokens/model"] + metrics["tokens/environment"]) / seconds,
        }
        return ScoredBatch([*kept, *fillers], values.tolist(), metrics, trained)


def _members(groups: Sequence[TrajectoryGroup]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def _stratum_rewards(metrics: Mapping[str, float]) -> dict[str, StratumRewards]:
    """Read the rewards by stratum out of a step's metrics."""
    return {
        stratum: StratumRewards(values["rollouts"], values["reward"], values["reward_variance"])
        for stratum, values in by_stratum(metrics).items()
    }


def batch_metrics(
    trajectories: Sequence[Trajectory], strata: Sequence[Hashable], group_numbers: Sequence[int]
) -> dict[str, float]:
    """Describe a batch: reward, searches, shares of ends and strata, environment failures of each cause and tokens (counts),
    mean log-probability of the model's tokens in all episodes and in those of reward 1.

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
    metrics |= {f"failures/{cause}": float(number) for cause, number in count_failures(trajectories).items()}
    correct = [t for t, _ in valid if t.reward == 1.0]
    if correct:
        metrics["logprobs/correct_mean"] = sum(sum(t.logprobs) for t in correct) / sum(map(length, correct))
    for key in sorted({s for _, s in valid}, key=str):
        rewards = [t.reward for t, s in valid if s == key]
        metrics[f"strata/{label(key)}/rollouts"] = float(len(rewards))
        metrics[f"strata/{label(key)}/share"] = len(rewards) / len(valid)
        metrics[f"strata/{label(key)}/reward"] = float(np.mean(rewards))
        metrics[f"strata/{label(key)}/reward_variance"] = float(np.var(rewards))
    groups: dict[int, list[tuple[float | None, Hashable]]] = {}
    for trajectory, key, number in zip(trajectories, strata, group_numbers, strict=True):
        if trajectory.valid:
            groups.setdefault(number, []).append((trajectory.reward, key))
    metrics["groups/reward_varies"] = float(np.mean([len({r for r, _ in g}) > 1 for g in groups.values()]))
    metrics["groups/several_strata"] = float(np.mean([len({s for _, s in g}) > 1 for g in groups.values()]))
    return metrics
