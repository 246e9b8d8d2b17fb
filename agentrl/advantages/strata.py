"""What sorts an episode into its stratum: a function from a Trajectory to a hashable key."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from agentrl.advantages.registry import look_up
from agentrl.types import Trajectory

Stratifier = Callable[[Trajectory], Hashable]


def searches(trajectory: Trajectory) -> int:
    """The number of searches that were executed (arXiv 2510.06214); a search that was only written does not count."""
    return len(trajectory.searches)


STRATIFIERS: dict[str, Stratifier] = {"searches": searches}


def get_stratifier(name: str = "searches") -> Stratifier:
    """Return the stratifier of a registered name or of an import path such as `package.module:function`.

    Raises:
        AdvantageError: if there is none.
    """
    return look_up(name, STRATIFIERS, "stratifier")


def label(key: Hashable) -> str:
    """Return a stratum's key as people read it in tables and plots: the parts of a tuple are joined by commas."""
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
