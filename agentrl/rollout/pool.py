"""RolloutPool: hands groups to rollout workers and collects their trajectories."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from agentrl.types import EnvironmentFailure, Question, Trajectory


class RolloutPool:
    """A view on the workers of a run; it pickles, so that trainer and evaluation each hold one."""

    def __init__(self, workers: Sequence[Any], deadline_seconds: float) -> None:
        """`deadline_seconds` bounds the wait for any one group after the one before it was done."""
        self._workers = list(workers)
        self._deadline = deadline_seconds

    def publish(self, version: int, files: Mapping[str, bytes]) -> None:
        """Load an adapter into every engine and wait until all have it.

        Raises:
            EnvironmentFailure: if a worker died or did not finish in time.
        """
        # One copy in the object store serves all workers.
        shared = ray.put(dict(files))
        self._collect([worker.load_adapter.remote(version, shared) for worker in self._workers], lambda _: None)

    def sample(
        self,
        requests: Sequence[tuple[Question, Sequence[str]]],
        temperature: float,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> list[list[Trajectory]]:
        """Run the episodes named by each request, (question, episode ids), and return them in the requests' order.

        All episodes of a request run on one engine, whose prefix cache they share. `on_done` is called with the number
        of episodes that are done.

        Raises:
            EnvironmentFailure: if a worker died or nothing was finished for `deadline_seconds`.
        """
        load = [0] * len(self._workers)
        pending = []
        for question, episode_ids in requests:
            least = load.index(min(load))
            load[least] += len(episode_ids)
            pending.append(self._workers[least].rollout.remote(question, list(episode_ids), temperature))
        done = 0

        def count(group: list[Trajectory]) -> None:
            nonlocal done
            done += len(group)
            on_done(done)

        return self._collect(pending, count)

    def _collect(self, references: list[Any], on_result: Callable[[Any], None]) -> list[Any]:
        """Wait for all references and return their values in order."""
        values: dict[Any, Any] = {}
        waiting = list(references)
        last = time.monotonic()
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            for reference in ready:
                try:
                    values[reference] = ray.get(reference)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from error
                except RayActorError as error:
                    raise EnvironmentFailure(f"a rollout worker died: {error}") from error
                on_result(values[reference])
                last = time.monotonic()
            if time.monotonic() - last > self._deadline:
                raise EnvironmentFailure(
                    f"{len(waiting)} rollout call(s) gave no result for {self._deadline:g} s; an engine may hang"
                )
        return [values[reference] for reference in references]
