"""From the next questions to a scored batch: rollouts, group checks, strata, advantages, selection and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrl.advantages import Advantages, get_stratifier
from agentrl.advantages.episodes import episode_advantages, group_strata
from agentrl.advantages.schedule import Options
from agentrl.config import Config
from agentrl.data.stream import QuestionStream
from agentrl.training.metrics import NOTES, batch_metrics, estimator_notes, stratum_rewards
from agentrl.training.selection import Selection, SignalShare
from agentrl.types import (
    AgentRLError,
    FailureCause,
    Question,
    Trajectory,
    TrajectoryGroup,
    check_failures,
)

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool

# A question without accepted answers: no turn of its episodes earns a reward for what was found.
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
        """Take up where the steps of `history` ended, which are the metrics of those that a resumed run has done.

        `on_batch` receives the step and some of its trajectories, each once and in the order of their questions. `on_done`
        receives the number of the step's episodes that are done. `on_stall` receives a line about what each worker does
        when nothing gets done.
        """
        self._config = config
        self._pool = pool
        self._questions = questions
        self._on_batch = on_batch
        self._on_done = on_done
        self._on_stall = on_stall
        self._stratifier = get_stratifier(config.advantages.stratum, config.seed)
        self._options = Options(config.advantages.options)
        self._signal_share = SignalShare()
        self._past: list[dict[str, float]] = []
        self._used = 0
        for metrics in history:
            self._observe(metrics)

    def __call__(self, step: int, episodes: int) -> ScoredBatch:
        """Roll out the next questions for a step (from 1), `episodes` episodes in whole groups, and score them.

        Raises:
            EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
            GroupError: if a group is not what it should be.
            AgentRLError: if selection without a bound has gone through as many questions as there are.
        """
        size = self._config.rollout.group_size
        wanted = episodes // size
        if wanted * size != episodes:
            raise RuntimeError(f"step {step}: {episodes} episodes are not whole groups of {size}")
        options = self._options.at((step - 1) / self._config.training.steps)
        selection = self._begin_selection(wanted)
        started = time.monotonic()
        groups = self._roll_out(step, wanted, selection, options)
        seconds = time.monotonic() - started
        check_failures(_members(groups), self._config.rollout.max_failed_share)
        signal = selection.done
        if sum(signal) < wanted and self._config.advantages.selection.max_extra is None:
            raise AgentRLError(
                f"step {step}: {len(groups)} questions gave {sum(signal)} groups with a learning signal instead of "
                f"{wanted}; set advantages.selection.max_extra, or train a model that is sometimes right and sometimes not"
            )
        self._used += len(groups)
        batch = self._score(step, groups, signal, wanted, options)
        tokens = batch.metrics["tokens/model"] + batch.metrics["tokens/environment"]
        batch.metrics.update({"seconds/rollout": seconds, "tokens_per_second/rollout": tokens / seconds})
        if self._config.advantages.selection.enabled:
            batch.metrics["selection/surplus_groups"] = float(selection.asked - len(groups))
        self._observe(batch.metrics)
        return batch

    def _observe(self, metrics: Mapping[str, float]) -> None:
        self._used = int(metrics["questions/used"])
        self._options.observe(stratum_rewards(metrics))
        self._signal_share.observe(metrics)
        self._past.append(estimator_notes(metrics))

    def _begin_selection(self, wanted: int) -> Selection:
        settings = self._config.advantages.selection
        if not settings.enabled:
            return Selection(wanted, wanted)
        extra = len(self._questions) if settings.max_extra is None else round(settings.max_extra * wanted)
        return Selection(wanted, wanted + extra, self._signal_share.value)

    def _roll_out(
        self, step: int, wanted: int, selection: Selection, options: Mapping[str, Any]
    ) -> list[TrajectoryGroup]:
        """Sample one question after the other until the step has its groups, and return these in the questions' order."""
        size = self._config.rollout.group_size
        judge = self._has_signal if self._config.advantages.selection.enabled else lambda group, options: True
        questions: list[Question] = []
        groups: dict[int, TrajectoryGroup] = {}
        recorded = 0
        self._on_done(0)
        with closing(self._pool.stream(temperature=self._config.agent.temperature, on_stall=self._on_stall)) as stream:
            try:
                while selection.done is None:
                    if count := selection.missing:
                        if len(groups) >= wanted:
                            # Where the environment fails, more questions would fail as well.
                            check_failures(_members(groups.values()), self._config.rollout.max_failed_share)
                        asked = self._questions.take(self._used + selection.asked, count)
                        stream.add(self._request(step, question, i) for i, question in enumerate(asked, len(questions)))
                        questions += asked
                        selection.ask(count)
                    index, trajectories = next(stream)
                    fresh = tuple(self._without_stale(step, trajectory) for trajectory in trajectories)
                    groups[index] = TrajectoryGroup(questions[index], fresh, size)
                    selection.add(index, judge(groups[index], options))
                    self._on_done(selection.found * size)
                    end = len(selection.done or questions)
                    while recorded in groups and recorded < end:
                        self._on_batch(step, groups[recorded].trajectories)
                        recorded += 1
            except Exception:
                # What went wrong can be read in the episodes that are done.
                self._on_batch(step, _members(groups[i] for i in sorted(groups) if i >= recorded))
                raise
        return [groups[index] for index in range(len(selection.done))]

    def _request(self, step: int, question: Question, offset: int) -> tuple[Question, list[str]]:
        # The position makes the id unique where a question comes again in a later epoch.
        position = self._used + offset
        return question, [f"{step}/{position}/{i}" for i in range(self._config.rollout.group_size)]

    def _without_stale(self, step: int, trajectory: Trajectory) -> Trajectory:
        """Turn an episode that older weights than `rollout.max_staleness` allows have sampled into a failed one."""
        # The weights that a step starts from have the number of the step before.
        behind = step - 1 - min(trajectory.adapter_versions, default=step - 1)
        most = self._config.rollout.max_staleness
        if not trajectory.valid or behind <= most:
            return trajectory
        failure = f"its engine used weights of {behind} steps before, and rollout.max_staleness is {most}"
        return replace(trajectory, answer=None).failed(FailureCause.STALE, failure)

    def _trains(self, trajectory: Trajectory) -> bool:
        """Tell whether an episode has a part in the loss."""
        return trajectory.valid and not (self._config.training.mask_overlong and trajectory.overlong)

    def _has_signal(self, group: TrajectoryGroup, options: Mapping[str, Any]) -> bool:
        """Tell whether a group's rewards make a difference to the advantages of any of its episodes that are trained."""
        trajectories, strata = group.trajectories, self._strata([group])
        trained = [self._trains(trajectory) for trajectory in trajectories]
        if not any(trained):
            return False
        rewarded = np.asarray(self._advantages(trajectories, strata, options).values)
        # A term such as the balance of strata is there without any reward.
        plain = [
            replace(t, reward=0.0 if t.valid else None, turn_rewards=None, question=_WITHOUT_ANSWERS)
            for t in trajectories
        ]
        return bool(np.any((rewarded != np.asarray(self._advantages(plain, strata, options).values))[trained]))

    def _strata(self, groups: Sequence[TrajectoryGroup]) -> list[Hashable]:
        """Return the stratum of each episode, capped among those that it is compared with."""
        settings = self._config.advantages
        trajectories = [group.trajectories for group in groups]
        return group_strata(trajectories, self._stratifier, settings.max_strata, settings.scope)

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
            past=self._past,
        )

    def _score(
        self,
        step: int,
        groups: Sequence[TrajectoryGroup],
        signal: Sequence[bool],
        wanted: int,
        options: Mapping[str, Any],
    ) -> ScoredBatch:
        """Make a batch of `wanted` groups. Where too few have a signal, others fill the batch, and are not trained on."""
        size = self._config.rollout.group_size
        everyone = _members(groups)
        numbers = [i // size for i in range(len(everyone))]
        metrics = batch_metrics(everyone, self._strata(groups), numbers, self._config.reward)

        trained = [group for group, has in zip(groups, signal, strict=True) if has]
        # TRL needs batches of one size.
        fillers = [group for group, has in zip(groups, signal, strict=True) if not has][: wanted - len(trained)]
        kept, filling = _members(trained), _members(fillers)
        advantages = self._advantages(kept, self._strata(trained), options)
        values = np.asarray(advantages.values)
        values = np.concatenate([values, np.zeros((len(filling), *values.shape[1:]))])
        trains = [self._trains(trajectory) for trajectory in kept]

        metrics |= {f"advantages/{name}": value for name, value in advantages.report.metrics().items()}
        metrics |= {f"{NOTES}{name}": float(value) for name, value in advantages.notes.items()}
        metrics |= {f"advantages/option/{name}": options[name] for name in self._options.moving}
        if self._config.advantages.selection.enabled:
            metrics |= {
                "selection/sampled_groups": float(len(groups)),
                "selection/dropped_groups": float(len(signal) - sum(signal)),
                "selection/unfilled_groups": float(len(fillers)),
            }
        if self._config.training.mask_overlong:
            masked = sum(t.valid and not is_trained for t, is_trained in zip(kept, trains, strict=True))
            metrics["overlong/masked_share"] = masked / max(1, len(kept))
        staleness = [step - 1 - version for t in kept if t.valid for version in t.adapter_versions]
        metrics |= {
            "staleness/mean": float(np.mean(staleness)) if staleness else 0.0,
            "staleness/max": float(max(staleness, default=0)),
            "questions/used": float(self._used),
            "tokens/trained": float(
                sum(len(t.prompt_ids) + t.model_tokens + t.environment_tokens for t in compress(kept, trains))
            ),
        }
        return ScoredBatch([*kept, *filling], values.tolist(), metrics, trains + [False] * len(filling))


def _members(groups: Iterable[TrajectoryGroup]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]
