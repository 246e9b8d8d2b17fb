"""Greedy evaluation of the policy that the engines hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from agentrl.runs import RunError, RunFolder
from agentrl.runs.folder import Evaluated
from agentrl.scores import exact_match, f1, wilson
from agentrl.types import Question, Trajectory, check_failures

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool


@dataclass(frozen=True, slots=True)
class SetResult:
    """Scores of one question set.

    Attributes:
        dataset: the name of the set.
        n: how many questions have a score; all numbers but `failed` and `causes` are over these.
        failed: how many have none, since their environment failed or their prompt was too long.
        em, f1: means of exact match and token F1, from 0 to 1; a question without an answer counts as 0.
        em_low, em_high: the bounds of exact match with 95 % confidence (Wilson's interval).
        searches: the mean number of searches executed for a question.
        ends: the share of each way in which an episode ended, by name.
        causes: how many questions each cause left without a score: a `FailureCause`, or `prompt_too_long`.
    """

    dataset: str
    n: int
    failed: int
    em: float
    em_low: float
    em_high: float
    f1: float
    searches: float
    ends: dict[str, float]
    causes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by set, in the order of the sets, and the episodes behind them."""

    sets: tuple[SetResult, ...]
    trajectories: tuple[Trajectory, ...]

    @property
    def em(self) -> float:
        """The mean over sets of exact match, from 0 to 1; sets without a score do not count."""
        return _mean([result.em for result in self.sets if result.n])

    @property
    def f1(self) -> float:
        """The mean over sets of token F1, from 0 to 1; sets without a score do not count."""
        return _mean([result.f1 for result in self.sets if result.n])

    @classmethod
    def from_dict(cls, scores: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; the episodes are in a file of their own."""
        return cls(tuple(SetResult(**result) for result in scores["sets"]), ())

    def to_dict(self) -> dict[str, Any]:
        return {"sets": [asdict(result) for result in self.sets]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def read_evaluation(folder: RunFolder, after: Evaluated) -> Evaluation | None:
    """Return an evaluation of a run, without its episodes, or None if there was none. Raises RunError if it is damaged."""
    recorded = folder.read_evaluation(after)
    try:
        return None if recorded is None else Evaluation.from_dict(recorded)
    except TypeError as error:
        raise RunError(f"{folder.evaluations}: damaged scores of evaluation {after}: {error}") from error


def evaluate(
    pool: RolloutPool,
    questions: Sequence[Question],
    *,
    max_failed_share: float,
    on_episodes: Callable[[Sequence[Trajectory]], None] = lambda trajectories: None,
    on_done: Callable[[int], None] = lambda done: None,
    on_stall: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Run one greedy episode for each question and score the sets; `RolloutPool.sample` explains `on_done` and `on_stall`.

    The reward of an episode is its exact match, whatever training rewards.

    `on_episodes` receives the episodes once all are done, also where too many failed: what went wrong can be read in them.

    Raises:
        EnvironmentFailure: if more than `max_failed_share` of the episodes failed.
    """
    requests = [(question, [f"eval/{question.id}"]) for question in questions]
    groups = pool.sample(requests, temperature=0.0, on_done=on_done, on_stall=on_stall, rewarded=False)
    trajectories = [t.with_reward(_match(t)) if t.valid else t for (t,) in groups]
    on_episodes(trajectories)
    check_failures(trajectories, max_failed_share)
    return evaluation_of(questions, trajectories)


def evaluation_of(questions: Sequence[Question], trajectories: Sequence[Trajectory]) -> Evaluation:
    """Score the episodes of questions by set, the sets in the order of the questions."""
    names = list(dict.fromkeys(question.dataset for question in questions))
    by_set = {name: [t for t in trajectories if t.question.dataset == name] for name in names}
    return Evaluation(tuple(score(name, members) for name, members in by_set.items()), tuple(trajectories))


def _match(trajectory: Trajectory) -> float:
    return 0.0 if trajectory.answer is None else exact_match(trajectory.answer, trajectory.question.golden_answers)


def score(dataset: str, trajectories: Sequence[Trajectory]) -> SetResult:
    """Score the episodes of one set."""
    valid = [t for t in trajectories if t.valid]
    n = len(valid)
    matches = [_match(t) for t in valid]
    overlaps = [f1(t.answer, t.question.golden_answers) if t.answer is not None else 0.0 for t in valid]
    low, high = wilson(int(sum(matches)), n) if n else (0.0, 1.0)
    ends = Counter(t.end.value for t in valid)
    causes = Counter(str(t.cause or t.end) for t in trajectories if not t.valid)
    return SetResult(
        dataset=dataset,
        n=n,
        failed=len(trajectories) - n,
        em=sum(matches) / max(1, n),
        em_low=low,
        em_high=high,
        f1=sum(overlaps) / max(1, n),
        searches=sum(len(t.searches) for t in valid) / max(1, n),
        ends={end: count / n for end, count in sorted(ends.items())},
        causes=dict(sorted(causes.items())),
    )
