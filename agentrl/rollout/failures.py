"""How many episodes may fail before what is left says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from agentrl.types import EnvironmentFailure, Trajectory


def check_failures(trajectories: Sequence[Trajectory], most: float) -> None:
    """Raise EnvironmentFailure if more than the share `most` of the episodes failed."""
    failed = [trajectory for trajectory in trajectories if not trajectory.valid]
    if len(failed) > most * len(trajectories):
        raise EnvironmentFailure(
            f"{len(failed)} of {len(trajectories)} episodes failed, more than rollout.max_failed_share {most:g} allows; "
            f"the first one, of question {failed[0].question.id}: {failed[0].failure}"
        )
