"""What sorts the episodes of a question into strata: each episode by itself, or at random in the same sizes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from numbers import Integral

from agentrl.advantages.base import AdvantageError
from agentrl.registry import look_up
from agentrl.types import Trajectory
from retrievers.names import describe_exception

Stratifier = Callable[[Trajectory], Hashable]
"""From an episode to its key."""

GroupStratifier = Callable[[Sequence[Trajectory]], list[Hashable]]
"""From the episodes of one question to a key for each, in their order."""

RANDOM_LIKE = "random_like"
"""Stands before the name of a stratifier, with a colon between, to have its keys dealt at random."""

OTHER = "other"
"""The key of the strata that `cap_strata` has merged, where keys are not counts."""


class AtLeast(int):
    """A count that stands for itself and every larger one. It prints as `3+`; compared and reckoned with, it is the number."""

    def __repr__(self) -> str:
        return f"{int(self)}+"

    __str__ = __repr__


def searches(trajectory: Trajectory) -> int:
    """The number of searches that were executed (arXiv 2510.06214); a search that was only written does not count."""
    return len(trajectory.searches)


def effective_searches(trajectory: Trajectory) -> int:
    """The number of executed searches that brought a passage which this episode had not seen before."""
    return sum(outcome in ("hit", "gold") for outcome in outcomes(trajectory))


def calls(trajectory: Trajectory) -> int:
    """The number of calls of any tool that were executed."""
    return len(trajectory.calls)


def tools(trajectory: Trajectory) -> tuple[str, ...]:
    """The tools of the calls that were executed, in order."""
    return tuple(call.tool for call in trajectory.calls)


def tool_set(trajectory: Trajectory) -> tuple[str, ...]:
    """The tools that were called at all, in the order of the alphabet."""
    return tuple(sorted(set(tools(trajectory))))


def placement(trajectory: Trajectory) -> tuple[str, ...]:
    """The sequence of actions; a call that was written but not executed is left out."""
    return tuple(turn.action.kind for turn in trajectory.turns if turn.calls or not turn.action.calls)


def outcomes(trajectory: Trajectory) -> tuple[str, ...]:
    """What each executed search brought: `empty` (no passage), `repeated` (none that this episode had not seen), `gold`
    (a new one that `question.metadata["gold_passage_ids"]` lists), else `hit`."""
    gold = set(trajectory.question.metadata.get("gold_passage_ids") or ())
    seen: set[str] = set()
    found = []
    for search in trajectory.searches:
        new = set(search.passage_ids) - seen
        if not search.passage_ids:
            found.append("empty")
        elif not new:
            found.append("repeated")
        else:
            found.append("gold" if new & gold else "hit")
        seen |= new
    return tuple(found)


def end(trajectory: Trajectory) -> str:
    """How the episode ended."""
    return trajectory.end.value


def answered(trajectory: Trajectory) -> str:
    """`answered` or `unanswered`."""
    return "unanswered" if trajectory.answer is None else "answered"


def dataset(trajectory: Trajectory) -> str:
    """The question set. It is the same for all episodes of a question, so it splits no group."""
    return trajectory.question.dataset or "unnamed"


STRATIFIERS: dict[str, Stratifier] = {
    "searches": searches,
    "effective_searches": effective_searches,
    "calls": calls,
    "tools": tools,
    "tool_set": tool_set,
    "placement": placement,
    "outcomes": outcomes,
    "end": end,
    "answered": answered,
    "dataset": dataset,
}


def get_stratifier(name: str | Sequence[str] = "searches", seed: int = 0) -> GroupStratifier:
    """Return the stratifier of a registered name or of an import path such as `package.module:function`.

    Several names give a stratifier whose key is the tuple of theirs. `random_like:NAME` gives the keys of NAME, dealt at
    random among the episodes of each question, see `deal_keys`. All names of a list are dealt alike, so that
    `[random_like:searches, random_like:end]` has strata of the sizes that `[searches, end]` has.

    The stratifier raises AdvantageError if a function fails; the message names the episode.

    Raises:
        AdvantageError: if there is none.
    """
    if isinstance(name, str):
        return _find(name, seed)
    if not name:
        raise AdvantageError("a stratum needs at least one stratifier")
    parts = [_find(part, seed) for part in name]
    return lambda episodes: list(zip(*(part(episodes) for part in parts), strict=True))


def _find(name: str, seed: int) -> GroupStratifier:
    prefix, _, real = name.partition(":")
    is_random = prefix == RANDOM_LIKE
    if is_random and (not real or real.startswith(f"{RANDOM_LIKE}:")):
        raise AdvantageError(f"{RANDOM_LIKE} needs a stratifier to take sizes from; write it as {RANDOM_LIKE}:searches")
    of_one = look_up(real if is_random else name, STRATIFIERS, "stratifier", AdvantageError)

    def of_each(episodes: Sequence[Trajectory]) -> list[Hashable]:
        return [_key(of_one, trajectory) for trajectory in episodes]

    return (lambda episodes: deal_keys(of_each(episodes), episodes, seed)) if is_random else of_each


def _key(stratifier: Stratifier, trajectory: Trajectory) -> Hashable:
    try:
        return stratifier(trajectory)
    except Exception as error:  # The stratifier may be the user's own.
        raise AdvantageError(
            f"the stratifier fails for episode {trajectory.id} of question {trajectory.question.id}: "
            f"{describe_exception(error)}"
        ) from error


def deal_keys(keys: Sequence[Hashable], episodes: Sequence[Trajectory], seed: int) -> list[Hashable]:
    """Return the keys [K] of the K episodes of a question, dealt among them at random.

    Each key stays as frequent as it is, and which episode has it says nothing about the episode. An episode whose
    environment failed keeps its key. The permutation is drawn from the seed and the ids of the others, and from nothing
    else: a run has other ids in each step and for each question, and the same ones after a resume.
    """
    dealt = list(keys)
    # By id, so that the order in which the episodes are given makes no difference.
    places = sorted((i for i, episode in enumerate(episodes) if episode.valid), key=lambda i: episodes[i].id)
    drawn = places.copy()
    random.Random(repr((seed, [episodes[i].id for i in places]))).shuffle(drawn)
    for place, source in zip(places, drawn, strict=True):
        dealt[place] = keys[source]
    return dealt


def cap_strata(keys: Sequence[Hashable], most: int) -> list[Hashable]:
    """Return the keys with at most `most` distinct ones; the tail becomes one key.

    Where all keys are counts (integers of at least 0), a count of most - 1 or more becomes `AtLeast(most - 1)`. This does
    not depend on which counts occur, so a stratum means the same in every step. Of other keys, the most - 1 most frequent
    stay, ties broken by label, and the rest become `OTHER`; where there are no more than `most` keys, all stay.

    Raises:
        AdvantageError: if `most` is below 2.
    """
    if most < 2:
        raise AdvantageError(f"the number of strata can be capped at 2 or more, got {most!r}")
    if all(isinstance(key, Integral) and key >= 0 for key in keys):
        return [AtLeast(most - 1) if key >= most - 1 else key for key in keys]
    counts = Counter(keys)
    if len(counts) <= most:
        return list(keys)
    kept = sorted(counts, key=lambda key: (-counts[key], label(key)))[: most - 1]
    return [key if key in kept else OTHER for key in keys]


def label(key: Hashable) -> str:
    """Return a stratum's key as tables and plots show it: a tuple is its parts joined by commas, and a tuple within it
    stands in parentheses."""
    if not isinstance(key, tuple):
        return str(key)
    return ", ".join(f"({label(part)})" if isinstance(part, tuple) else str(part) for part in key) or "none"
