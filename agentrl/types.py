"""The vocabulary of agentrl: what moves between rollouts, rewards, strata, advantages and the trainer.

Everything here is a frozen dataclass of plain Python values, so it pickles through Ray, writes to JSON and imports without
torch. An episode is a list of token ids that only grows: ids that the model sampled are never decoded and encoded again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class AgentRLError(Exception):
    """Base of every error that agentrl raises on purpose; its message says what is wrong, where, and what to do."""


class GroupError(AgentRLError):
    """A trajectory group mixes questions, has the wrong size or holds an episode twice."""


class EnvironmentFailure(AgentRLError):
    """The environment of an episode, or of too many episodes, failed after its retries."""


class EngineDied(EnvironmentFailure):
    """An engine can answer nothing more. Its episodes run again on another engine, or on this one once it is restarted."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its accepted answers.

    `id` is unique over all question sets of a run: the reader prefixes it with the set's name where needed.
    """

    id: str
    text: str
    golden_answers: tuple[str, ...]
    dataset: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that was executed.

    Attributes:
        tool: the tool's name.
        arguments: what it was called with, by name.
        seconds: how long it took.
        passage_ids: of the passages that came back, best first; none of a tool that answers with text.
        scores: of these passages.
        error: what the model was told in place of a result, where the tool refused the call or its time ran out.
    """

    tool: str
    arguments: Mapping[str, Any]
    seconds: float
    passage_ids: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    error: str = ""

    @property
    def query(self) -> str:
        """What a search looked for."""
        return self.arguments.get("query", "")


SEARCH, OPEN = "search", "open"
"""The names of the packaged tools."""

ANSWER, INVALID = "answer", "invalid"
"""What an action is that calls no tool. No tool can have these names."""


@dataclass(frozen=True, slots=True)
class Action:
    """What the model asked for in one turn.

    Attributes:
        kind: the name of the tool that it calls, ANSWER or INVALID.
        argument: the one text that the tool takes, such as a query; the answer; or what was wrong. Of other calls, their
            arguments as JSON.
        arguments: what the tool is called with, by name; empty where `argument` says it all.
    """

    kind: str
    argument: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> bool:
        """Whether it calls a tool."""
        return self.kind not in (ANSWER, INVALID)


TOO_LONG = "the turn was too long"
"""The argument of an invalid action whose turn was cut off at its limit of tokens."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation of the model and the observation that answered it.

    `token_ids` and `logprobs` have the same length: the sampled ids and the sampler's log-probability of each (natural
    logarithm, at the sampling temperature). `calls` are those that were executed. `observation_ids` is empty where the turn
    ended the episode.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    action: Action
    adapter_version: int
    calls: tuple[ToolCall, ...] = ()
    observation_ids: tuple[int, ...] = ()
    observation: str = ""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"a turn has {len(self.token_ids)} token ids but {len(self.logprobs)} log-probabilities")


class End(StrEnum):
    """How an episode ended.

    - ANSWERED: the model gave an answer.
    - TURN_LIMIT: the model asked for a tool after the last call that it may make.
    - TRUNCATED: the context had no room for the next observation.
    - INVALID: the model made more mistakes than are corrected.
    - TIMED_OUT: the time of the episode ran out, and the model's own generations took more than half of it.
    - PROMPT_TOO_LONG: the prompt left no room for a turn, so the question was never asked.
    - ENVIRONMENT_FAILURE: retriever, engine, worker or code failed; `Trajectory.cause` says which.

    The first five are the policy's own doing: such an episode is valid, has a reward and takes part in advantages.
    """

    ANSWERED = "answered"
    TURN_LIMIT = "turn_limit"
    TRUNCATED = "truncated"
    INVALID = "invalid"
    TIMED_OUT = "timed_out"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENVIRONMENT_FAILURE = "environment_failure"


class FailureCause(StrEnum):
    """What failed in an episode that ended as `End.ENVIRONMENT_FAILURE`.

    - RETRIEVER: a retriever gave no answer after its retries.
    - ENGINE: an engine gave no answer.
    - CODE: a tool, retriever, protocol, reward or engine raised an exception that it does not document.
    - WORKER: the rollout worker died or hung each time that the episode was run.
    - TIMEOUT: the time of the episode ran out, and waiting for tools or for the first generation took it.
    - STALE: the engine had older weights than `rollout.max_staleness` allows.
    - REWARD: what a reward asks, such as a judge, gave no verdict after its retries.
    """

    RETRIEVER = "retriever"
    ENGINE = "engine"
    CODE = "code"
    WORKER = "worker"
    TIMEOUT = "timeout"
    STALE = "stale"
    REWARD = "reward"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode: a prompt, the turns that followed, how it ended and what it earned.

    The per-token views below all have the length of `completion_ids`, which is the model's and the environment's tokens
    in order, without the prompt. `cause` is set for environment failures and for nothing else. `failure` says in words why
    an episode is not valid; a traceback may follow its first line.

    `reward` is the weighted sum of the rewards of the config. `reward_parts` has what each came to, by its name and before
    its weight; `turn_rewards` what each turn earned, where a reward gives that.

    Raises:
        ValueError: if an environment failure has no cause, or another end has one.
    """

    id: str
    question: Question
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    end: End
    answer: str | None = None
    reward: float | None = None
    cause: FailureCause | None = None
    failure: str = ""
    seconds: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    turn_rewards: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Failures are counted by cause, so one without a cause would vanish from the counts.
        if (self.end is End.ENVIRONMENT_FAILURE) != (self.cause is not None):
            raise ValueError(f"episode {self.id}: end {self.end} and cause {self.cause} do not go together")

    @property
    def completion_ids(self) -> list[int]:
        return [token for turn in self.turns for token in (*turn.token_ids, *turn.observation_ids)]

    @property
    def action_mask(self) -> list[bool]:
        """True at the model's own tokens; loss, KL, entropy, ratios and length normalisers all use this mask."""
        return [
            is_model
            for turn in self.turns
            for is_model in (*[True] * len(turn.token_ids), *[False] * len(turn.observation_ids))
        ]

    @property
    def logprobs(self) -> list[float]:
        """The sampler's log-probability at the model's tokens, 0.0 at the environment's."""
        return [value for turn in self.turns for value in (*turn.logprobs, *[0.0] * len(turn.observation_ids))]

    @property
    def turn_index(self) -> list[int]:
        """The index of the turn that each token belongs to."""
        return [
            index
            for index, turn in enumerate(self.turns)
            for _ in range(len(turn.token_ids) + len(turn.observation_ids))
        ]

    @property
    def model_tokens(self) -> int:
        """The number of tokens that the model sampled."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def environment_tokens(self) -> int:
        """The number of tokens in the observations."""
        return sum(len(turn.observation_ids) for turn in self.turns)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that were executed, in order; a tag that was only written does not count."""
        return tuple(call for turn in self.turns for call in turn.calls)

    @property
    def searches(self) -> tuple[ToolCall, ...]:
        """The calls of the tool `search`."""
        return tuple(call for call in self.calls if call.tool == SEARCH)

    @property
    def adapter_versions(self) -> tuple[int, ...]:
        return tuple(turn.adapter_version for turn in self.turns)

    @property
    def valid(self) -> bool:
        """False if the environment failed or the prompt was too long: such an episode says nothing about the policy, has no
        reward and takes no part in advantages."""
        return self.end not in (End.ENVIRONMENT_FAILURE, End.PROMPT_TOO_LONG)

    @property
    def overlong(self) -> bool:
        """True if turns, tokens or time ran out: the episode ended at a limit, and not where the policy would have ended it."""
        if self.end is End.INVALID:
            return any(turn.action == Action(INVALID, TOO_LONG) for turn in self.turns[-1:])
        return self.end in (End.TURN_LIMIT, End.TRUNCATED, End.TIMED_OUT)

    def with_reward(
        self,
        reward: float,
        parts: Mapping[str, float] | None = None,
        turn_rewards: tuple[float, ...] | None = None,
    ) -> Trajectory:
        return dataclasses.replace(self, reward=reward, reward_parts=parts or {}, turn_rewards=turn_rewards)

    def failed(self, cause: FailureCause, failure: str) -> Trajectory:
        """Return the episode as one whose environment failed, which has no reward; what was sampled stays."""
        return dataclasses.replace(
            self,
            end=End.ENVIRONMENT_FAILURE,
            cause=cause,
            failure=failure,
            reward=None,
            reward_parts={},
            turn_rewards=None,
        )


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """All episodes of one question that are compared with one another.

    Raises:
        GroupError: if the group is empty, an episode belongs to another question, or one episode is in it twice, or its
            size differs from `size`.
    """

    question: Question
    trajectories: tuple[Trajectory, ...]
    size: int

    def __post_init__(self) -> None:
        name = f"group of question {self.question.id!r}"
        if self.size < 2 or len(self.trajectories) != self.size:
            raise GroupError(f"{name}: expected {self.size} episodes (at least 2), got {len(self.trajectories)}")
        for trajectory in self.trajectories:
            if trajectory.question != self.question:
                raise GroupError(
                    f"{name}: episode {trajectory.id} answers another question, {trajectory.question.id!r}"
                )
        ids = [trajectory.id for trajectory in self.trajectories]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise GroupError(f"{name}: holds episode {repeated[0]} more than once")


def count_failures(trajectories: Iterable[Trajectory]) -> dict[FailureCause, int]:
    """Return the number of environment failures of each cause, 0 where there is none."""
    counts = Counter(trajectory.cause for trajectory in trajectories)
    return {cause: counts[cause] for cause in FailureCause}


def check_failures(trajectories: Sequence[Trajectory], most: float) -> None:
    """Check that the environment is sound enough to go on.

    A prompt that is too long says nothing about the environment, so it is no failure here. It matters where nothing else
    is left.

    Raises:
        EnvironmentFailure: if the environments of more than the share `most` of the episodes failed, or no episode is valid.
    """
    failed = [trajectory for trajectory in trajectories if trajectory.cause is not None]
    if len(failed) > most * len(trajectories):
        causes = ", ".join(f"{cause} {count}" for cause, count in count_failures(failed).items() if count)
        raise EnvironmentFailure(
            f"{len(failed)} of {len(trajectories)} episodes failed ({causes}), more than rollout.max_failed_share {most:g} "
            f"allows; the first one, of question {failed[0].question.id}: {failed[0].failure}"
        )
    if trajectories and not any(trajectory.valid for trajectory in trajectories):
        first = trajectories[0]
        raise EnvironmentFailure(
            f"none of {len(trajectories)} episodes can be used; the first one, of question {first.question.id}: "
            f"{first.failure}"
        )
