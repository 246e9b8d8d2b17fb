"""RolloutPool: hands groups of episodes to rollout workers and collects their trajectories, whatever happens to a worker."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from agentrl.adapters import WeightFiles
from agentrl.agent.episode import shortened
from agentrl.rollout.supervisor import Failure, Limits, Supervisor, Worker, answer
from agentrl.types import End, FailureCause, Question, Trajectory

Request = tuple[Question, Sequence[str]]
"""A question and the ids of its episodes."""

_STALL_SECONDS = 60.0


class RolloutPool:
    """A view on the workers of a run; it pickles, so that trainer and evaluation each hold one."""

    def __init__(self, actors: Sequence[Any], processes: Sequence[str], limits: Limits) -> None:
        """`processes` are what `prepare` returned for each of the actors, which are ready."""
        self._supervisor = Supervisor(actors, processes, limits)
        self._retried_groups = 0

    def __reduce__(self) -> tuple[Any, ...]:
        workers = self._supervisor.workers
        return RolloutPool, ([w.actor for w in workers], [w.process for w in workers], self._supervisor.limits)

    @property
    def counters(self) -> dict[str, float]:
        """Workers that were restarted and groups that were handed out again, since the pool was made."""
        return {
            "rollout/restarts": float(self._supervisor.restarts),
            "rollout/retried_groups": float(self._retried_groups),
        }

    def publish(self, version: int, files: WeightFiles) -> None:
        """Load an adapter or a model into every engine and wait until all have it; episodes under way go on meanwhile.

        An adapter leaves alone the turns that are being generated; a model waits for them, and lets the next turns wait.

        Raises:
            EnvironmentFailure: if workers died too often or did not finish in time.
            ValueError: if a newer version was published before.
        """
        self._supervisor.publish(version, files)

    def sleep(self) -> None:
        """Have every engine give back what it can of its GPU's memory, and wait until all have.

        Nothing may be sampled or published until `wake`. A worker that dies meanwhile comes back then.

        Raises:
            EnvironmentFailure: if workers died too often or did not finish in time.
        """
        self._supervisor.sleep()

    def wake(self) -> None:
        """Have every engine take back its memory, and wait until all have; engines that are awake stay as they are.

        Raises:
            EnvironmentFailure: if workers died too often or did not finish in time.
        """
        self._supervisor.wake()

    def stream(
        self,
        requests: Iterable[Request] = (),
        *,
        temperature: float,
        on_stall: Callable[[str], None] = lambda message: None,
        rewarded: bool = True,
    ) -> RolloutStream:
        """Start to run the episodes of the requests; the stream yields each group as soon as it is done.

        A pool runs one stream at a time. Unless they are `rewarded`, the episodes have no reward. `on_stall` is called as in
        `sample`.
        """
        stream = RolloutStream(self._supervisor, temperature, rewarded, on_stall, self._count_retry)
        stream.add(requests)
        return stream

    def sample(
        self,
        requests: Sequence[Request],
        temperature: float,
        on_done: Callable[[int], None] = lambda done: None,
        on_stall: Callable[[str], None] = lambda message: None,
        rewarded: bool = True,
    ) -> list[list[Trajectory]]:
        """Run the episodes of the requests and return them in the requests' order; see `stream` for `rewarded`.

        `on_done` is called with the number of episodes that are done. `on_stall` is called once a minute while no group
        gets done, with a line that says what each worker does.

        Raises:
            EnvironmentFailure: if workers died or hung too often.
        """
        results: dict[int, list[Trajectory]] = {}
        done = 0
        with closing(self.stream(requests, temperature=temperature, on_stall=on_stall, rewarded=rewarded)) as stream:
            for index, trajectories in stream:
                results[index] = trajectories
                done += len(trajectories)
                on_done(done)
        return [results[index] for index in range(len(requests))]

    def _count_retry(self) -> None:
        self._retried_groups += 1


@dataclass(frozen=True, slots=True)
class _Call:
    """A request that a worker was handed, the process that the worker had then, and whether it runs nothing else."""

    index: int
    worker: Worker
    process: str
    alone: bool


class RolloutStream(Iterator[tuple[int, list[Trajectory]]]):
    """Yields (index, trajectories) for each request in the order in which they get done; indexes count from 0 as added.

    Requests may be added until the stream is closed, also while it is being read: it ends when it has yielded a group for
    each. All episodes of a request run on one engine, whose prefix cache they share. The worker with the fewest episodes
    gets the next request, until every worker has twice as many episodes as places, or a whole group more than places: while
    a group waits for its longest episode, the worker runs episodes of the next, and no place stays empty.

    Where a worker dies or hangs, it is made anew and its groups run again, whole, so that no episode counts twice; the last
    time alone, so that a group fails for what it does itself. Where a worker's code raises, the group's episodes count as
    failed. `next` raises EnvironmentFailure if workers died or hung too often.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        temperature: float,
        rewarded: bool,
        on_stall: Callable[[str], None],
        on_retry: Callable[[], None],
    ) -> None:
        self._supervisor, self._temperature, self._rewarded = supervisor, temperature, rewarded
        self._on_stall, self._on_retry = on_stall, on_retry
        self._requests: list[Request] = []
        self._tries: list[int] = []
        self._queue: deque[int] = deque()
        # Requests before their last try. Who shares a worker with one that kills it must not fail with it.
        self._suspects: deque[int] = deque()
        self._calls: dict[Any, _Call] = {}
        self._held: list[_Call] = []
        self._last = self._told = time.monotonic()

    def add(self, requests: Iterable[Request]) -> None:
        """Append requests to those that wait for a worker."""
        for request in requests:
            self._queue.append(len(self._requests))
            self._requests.append(request)
            self._tries.append(0)

    @property
    def unfinished(self) -> int:
        """How many of the requests that were added have not been yielded."""
        return self._waiting_groups + len(self._calls)

    @property
    def _waiting_groups(self) -> int:
        return len(self._queue) + len(self._suspects) + len(self._held)

    def __next__(self) -> tuple[int, list[Trajectory]]:
        timeout = 0.0
        while self.unfinished:
            self._release_held()
            self._hand_out()
            # Ready is what is done on any machine, also where its result has yet to be fetched.
            references = [*self._calls, *self._supervisor.preparing()]
            ready, _ = ray.wait(references, num_returns=1, timeout=timeout, fetch_local=False)
            for reference in ready:
                if not self._supervisor.take(reference) and reference in self._calls:
                    done = self._collect(reference)
                    if done is not None:
                        return done
            if ready:
                timeout = 0.0
                continue
            # Once nothing is left to take: a worker does not hang because nobody has read what it finished.
            self._supervisor.check()
            timeout = 1.0
            if time.monotonic() - self._told > _STALL_SECONDS:
                self._told = time.monotonic()
                self._on_stall(self._waiting())
        raise StopIteration

    def close(self) -> None:
        """Give up what is not done: episodes under way are cancelled and their places are free again."""
        for reference, call in self._calls.items():
            ray.cancel(reference)
            call.worker.load -= len(self._requests[call.index][1])
        self._calls.clear()
        self._queue.clear()
        self._suspects.clear()
        self._held.clear()

    def _hand_out(self) -> None:
        """Give waiting requests to workers; suspects come last and have a worker for themselves."""
        places = self._supervisor.limits.places
        alone = [call.worker for call in self._calls.values() if call.alone]
        while self._queue:
            most = places + max(places, len(self._requests[self._queue[0]][1]))
            free = [worker for worker in self._supervisor.ready() if worker.load < most and worker not in alone]
            if not free:
                return
            self._give(self._queue.popleft(), min(free, key=lambda w: w.load))
        idle = [worker for worker in self._supervisor.ready() if not worker.load]
        while self._suspects and idle:
            self._give(self._suspects.popleft(), idle.pop(), alone=True)

    def _give(self, index: int, worker: Worker, alone: bool = False) -> None:
        question, episode_ids = self._requests[index]
        if not worker.load:
            worker.last = time.monotonic()
        worker.load += len(episode_ids)
        reference = worker.actor.rollout.remote(question, list(episode_ids), self._temperature, self._rewarded)
        self._calls[reference] = _Call(index, worker, worker.process, alone)

    def _retry(self, index: int) -> None:
        """Have a request wait for its next try."""
        # Last, so that bad luck with one worker is not followed by more of it at once.
        last = self._tries[index] == self._supervisor.limits.tries - 1
        (self._suspects if last else self._queue).append(index)

    def _collect(self, reference: Any) -> tuple[int, list[Trajectory]] | None:
        """Return the index and the trajectories of a finished call, or None if its request has to run again."""
        call = self._calls.pop(reference)
        request = self._requests[call.index]
        call.worker.load -= len(request[1])
        call.worker.last = self._last = self._told = time.monotonic()
        try:
            result = answer(reference)
        except RayTaskError as error:
            # The error's text holds the traceback of the worker's process.
            problem = f"its worker raised {type(error.cause).__name__}: {error.cause}\n{shortened(str(error))}"
            return call.index, _failed(request, FailureCause.CODE, problem)
        if not isinstance(result, Failure):
            return call.index, result
        self._supervisor.bring_back(call.worker, call.process, result.reason)
        self._tries[call.index] += 1
        if self._tries[call.index] == self._supervisor.limits.tries:
            return call.index, _failed(request, FailureCause.WORKER, f"its worker failed every time: {result.reason}")
        self._on_retry()
        if result.running:
            self._held.append(call)
        else:
            self._retry(call.index)
        return None

    def _release_held(self) -> None:
        """Queue the requests whose first process is gone for certain, so that no episode runs twice at once."""
        for call in [call for call in self._held if call.worker.process != call.process]:
            self._held.remove(call)
            self._retry(call.index)

    def _waiting(self) -> str:
        """Say what each worker does."""
        states = []
        for worker in self._supervisor.workers:
            groups = sum(call.worker is worker for call in self._calls.values())
            ready = worker.preparing is None
            states.append(
                f"worker {worker.number} "
                + (f"running {groups} group(s), {worker.load} episodes" if ready else "restarting")
            )
        return (
            f"nothing finished for {time.monotonic() - self._last:.0f} s: {'; '.join(states)}; "
            f"{self._waiting_groups} group(s) wait for a place"
        )


def _failed(request: Request, cause: FailureCause, failure: str) -> list[Trajectory]:
    question, episode_ids = request
    return [
        Trajectory(name, question, (), (), End.ENVIRONMENT_FAILURE, cause=cause, failure=failure)
        for name in episode_ids
    ]
