"""What sorts an episode into its stratum: a function from a Trajectory to a hashable key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from numbers import Integral

from agentrl.advantages.base import AdvantageError
from agentrl.registry import look_up
from agentrl.types import ActionKind, Trajectory

Stratifier = Callable[[Trajectory], Hashable]

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


def placement(trajectory: Trajectory) -> tuple[str, ...]:
    """The sequence of actions; a search or an open that was written but not executed is left out."""
    return tuple(
        turn.action.kind.value
        for turn in trajectory.turns
        if turn.action.kind not in (ActionKind.SEARCH, ActionKind.OPEN) or turn.search is not None or turn.observation
    )


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


STRATIFIERS: dict[str, Stratifier] = {
    "searches": searches,
    "effective_searches": effective_searches,
    "placement": placement,
    "outcomes": outcomes,
    "end": end,
    "answered": answered,
}


def get_stratifier(name: str | Sequence[str] = "searches") -> Stratifier:
    """Return the stratifier of a registered name or of an import path such as `package.module:function`.

    Several names give a stratifier whose key is the tuple of theirs.

    Raises:
        AdvantageError: if there is none.
    """
    if isinstance(name, str):
        return look_up(name, STRATIFIERS, "stratifier", AdvantageError)
    if not name:
        raise AdvantageError("a stratum needs at least one stratifier")
    parts = [look_up(part, STRATIFIERS, "stratifier", AdvantageError) for part in name]
    return lambda trajectory: tuple(part(trajectory) for part in parts)


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
