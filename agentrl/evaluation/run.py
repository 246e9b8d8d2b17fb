"""Evaluation of the policy that the engines hold, greedy or as the mean of several samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from agentrl.rewards import exact_match, f1
from agentrl.runs import RunError, RunFolder
from agentrl.runs.folder import Evaluated
from agentrl.scores import wilson
from agentrl.types import Question, Trajectory, check_failures

if TYPE_CHECKING:
    from agentrl.rollout.pool import RolloutPool


@dataclass(frozen=True, slots=True)
class SetResult:
    """Scores of one question set. Where several episodes answer a question, its numbers are means over them.

    Attributes:
        dataset: the name of the set.
        n: how many questions have a score; all numbers but `failed` and `causes` are over these.
        failed: how many episodes have none, since their environment failed or their prompt was too long.
        em, f1: means of exact match and token F1, from 0 to 1; an episode without an answer counts as 0.
        em_low, em_high: the bounds of exact match with 95 % confidence (Wilson's interval over questions; it is wider than need
            be where several episodes answer each, since their mean varies less than one of them).
        searches: the mean number of searches executed for a question.
        ends: the share of each way in which an episode ended, by name.
        causes: how many episodes each cause left without a score: a `FailureCause`, or `prompt_too_long`.
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
    temperature: float = 0.0,
    samples: int = 1,
    on_episodes: Callable[[Sequence[Trajectory]], None] = lambda trajectories: None,
    on_done: Callable[[int], None] = lambda done: None,
    on_stall: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Run `samples` episodes for each question and score the sets.

    The reward of an episode is its exact match, whatever training rewards.

    Args:
        pool: nobody else samples from it meanwhile.
        questions: what is asked.
        max_failed_share: the most of the episodes that may fail, from 0 to 1.
        temperature: of sampling; 0 is greedy.
        samples: how many episodes answer each question.
        on_episodes: receives the episodes once all are done, also where too many failed: what went wrong can be read in them.
        on_done: receives the number of episodes that are done.
        on_stall: receives a line about what each worker does when nothing gets done.

    Raises:
        EnvironmentFailure: if more than `max_failed_share` of the episodes failed.
    """
    requests = [(question, _episode_ids(question, samples)) for question in questions]
    groups = pool.sample(requests, temperature=temperature, on_done=on_done, on_stall=on_stall, rewarded=False)
    trajectories = [t.with_reward(exact_match(t)) if t.valid else t for group in groups for t in group]
    on_episodes(trajectories)
    check_failures(trajectories, max_failed_share)
    return evaluation_of(questions, trajectories, samples)


def _episode_ids(question: Question, samples: int) -> list[str]:
    return [f"eval/{question.id}" + (f"/{number}" if samples > 1 else "") for number in range(samples)]


def evaluation_of(questions: Sequence[Question], trajectories: Sequence[Trajectory], samples: int = 1) -> Evaluation:
    """Score the episodes of questions, `samples` of each one after the other, by set, the sets in the order of the questions."""
    names = list(dict.fromkeys(question.dataset for question in questions))
    by_set = {name: [t for t in trajectories if t.question.dataset == name] for name in names}
    return Evaluation(tuple(score(name, members, samples) for name, members in by_set.items()), tuple(trajectories))


def score(dataset: str, trajectories: Sequence[Trajectory], samples: int = 1) -> SetResult:
    """Score the episodes of one set, `samples` of each question one after the other."""
    valid = [trajectory for trajectory in trajectories if trajectory.valid]
    questions = [trajectories[first : first + samples] for first in range(0, len(trajectories), samples)]
    answered = [members for question in questions if (members := [t for t in question if t.valid])]
    n = len(answered)

    def total(value: Callable[[Trajectory], float]) -> float:
        return sum(sum(map(value, members)) / len(members) for members in answered)

    def mean(value: Callable[[Trajectory], float]) -> float:
        return total(value) / max(1, n)

    matches = total(exact_match)
    low, high = wilson(matches, n) if n else (0.0, 1.0)
    ends = sorted({trajectory.end.value for trajectory in valid})
    causes = Counter(str(t.cause or t.end) for t in trajectories if not t.valid)
    return SetResult(
        dataset=dataset,
        n=n,
        failed=len(trajectories) - len(valid),
        em=matches / max(1, n),
        em_low=low,
        em_high=high,
        f1=mean(f1),
        searches=mean(lambda t: float(len(t.searches))),
        ends={end: mean(lambda t, end=end: float(t.end.value == end)) for end in ends},
        causes=dict(sorted(causes.items())),
    )
