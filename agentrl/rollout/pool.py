"""RolloutPool: hands groups to rollout workers, collects their trajectories, and outlives workers that die or hang."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from agentrl.types import End, EngineDied, EnvironmentFailure, FailureCause, Question, Trajectory

Request = tuple[Question, Sequence[str]]
"""A question and the ids of its episodes."""

_STALL_SECONDS = 60.0
_PREPARE_RETRIES = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the pool waits and how often it tries again.

    Attributes:
        places: the episodes that an engine runs at once; as many are handed to a worker before it has finished some.
        deadline_seconds: a worker with work that finishes nothing for so long is taken for hung and killed. It is for up
            to twice as many episodes as there are places, and longer for more.
        start_seconds: bounds the start of an engine and the loading of an adapter.
        tries: how often a group is handed out before its episodes count as failed.
        max_failures, window_seconds: more deaths and hangs of workers than this within the window end the run.
    """

    places: int
    deadline_seconds: float
    start_seconds: float
    tries: int = 3
    max_failures: int = 5
    window_seconds: float = 600.0


@dataclass(slots=True)
class _Worker:
    """A worker as the pool sees it.

    Attributes:
        pid: the process of its present life, or of the one before while it is brought back.
        load: the episodes that it was handed and has not finished.
        life: how often it was made anew; what an earlier life did not finish says nothing about this one.
        last: when it last finished a call, or was handed the first after none.
        preparing, since: the call that brings it back, None while it is ready, and when that was made.
    """

    actor: Any
    number: int
    pid: int
    load: int = 0
    life: int = 0
    last: float = 0.0
    preparing: Any = None
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class _Call:
    index: int
    worker: _Worker
    life: int


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a worker cannot go on; `gone` if its process is, so that Ray makes it anew by itself."""

    reason: str
    gone: bool


@dataclass(slots=True)
class _Counters:
    """What went wrong so far: workers that died or hung, and groups that were handed out again."""

    restarts: int = 0
    retried_groups: int = 0
    deaths: deque[float] = field(default_factory=deque)


class RolloutPool:
    """A view on the workers of a run; it pickles, so that trainer and evaluation each hold one."""

    def __init__(self, actors: Sequence[Any], pids: Sequence[int], limits: Limits) -> None:
        """`pids` are what `prepare` returned for each of the actors, which are ready."""
        self._workers = [_Worker(a, n, pid) for n, (a, pid) in enumerate(zip(actors, pids, strict=True))]
        self._limits = limits
        self._adapter: tuple[int | None, Any] = (None, None)
        self._counters = _Counters()
        # One thread may publish while another samples.
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        actors, pids = [worker.actor for worker in self._workers], [worker.pid for worker in self._workers]
        return RolloutPool, (actors, pids, self._limits)

    @property
    def counters(self) -> dict[str, float]:
        """Workers that were restarted and groups that were handed out again, since the pool was made."""
        return {
            "rollout/restarts": float(self._counters.restarts),
            "rollout/retried_groups": float(self._counters.retried_groups),
        }

    def publish(self, version: int, files: Mapping[str, bytes]) -> None:
        """Load an adapter into every engine and wait until all have it; episodes under way go on meanwhile.

        Raises:
            EnvironmentFailure: if workers died too often or did not finish in time.
        """
        # One copy in the object store serves all workers.
        self._adapter = (version, ray.put(dict(files)))
        waiting = {self._prepare(worker): (worker, worker.life) for worker in self._workers}
        end = time.monotonic() + self._limits.start_seconds
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
            for reference in ready:
                worker, life = waiting.pop(reference)
                failure = _failure(reference)
                if failure is not None:
                    self._bring_back(worker, life, failure)
                    # It waits there until the worker is back.
                    waiting[self._prepare(worker)] = worker, worker.life
                elif worker.preparing is None:
                    worker.pid = ray.get(reference)
            if waiting and time.monotonic() > end:
                late = ", ".join(str(worker.number) for worker, _ in waiting.values())
                raise EnvironmentFailure(
                    f"worker(s) {late} did not load adapter version {version} within {self._limits.start_seconds:g} s"
                )

    def sample(
        self,
        requests: Sequence[Request],
        temperature: float,
        on_done: Callable[[int], None] = lambda done: None,
        on_stall: Callable[[str], None] = lambda message: None,
    ) -> list[list[Trajectory]]:
        """Run the episodes named by each request and return them in the requests' order.

        All episodes of a request run on one engine, whose prefix cache they share; the engine with the fewest episodes
        gets the next request, and none gets more than it has places for. Where a worker dies or hangs, it is made anew
        and its groups run again, whole, so that no episode counts twice. `on_done` is called with the number of episodes
        that are done, `on_stall` with a line that says who waits for whom while nothing gets done.

        Raises:
            EnvironmentFailure: if workers died or hung too often.
        """
        queue = deque(range(len(requests)))
        tries = [0] * len(requests)
        results: dict[int, list[Trajectory]] = {}
        calls: dict[Any, _Call] = {}
        done, last, told = 0, time.monotonic(), time.monotonic()
        while len(results) < len(requests):
            self._hand_out(queue, requests, temperature, calls)
            preparing = {worker.preparing: worker for worker in self._workers if worker.preparing is not None}
            ready, _ = ray.wait([*calls, *preparing], num_returns=1, timeout=1.0)
            for reference in ready:
                failure = _failure(reference)
                if reference in preparing:
                    self._prepared(preparing[reference], reference, failure)
                    continue
                call = calls.pop(reference)
                call.worker.load -= len(requests[call.index][1])
                call.worker.last = last = told = time.monotonic()
                if failure is None:
                    results[call.index] = ray.get(reference)
                else:
                    self._bring_back(call.worker, call.life, failure)
                    tries[call.index] += 1
                    if tries[call.index] < self._limits.tries:
                        self._counters.retried_groups += 1
                        # Last, so that bad luck with one worker is not followed by more of it at once.
                        queue.append(call.index)
                    else:
                        results[call.index] = _failed(requests[call.index], failure.reason)
                if call.index in results:
                    done += len(requests[call.index][1])
                    on_done(done)
            self._kill_hung()
            if time.monotonic() - told > _STALL_SECONDS:
                told = time.monotonic()
                on_stall(self._waiting(calls, len(queue), told - last))
        return [results[index] for index in range(len(requests))]

    def _hand_out(
        self, queue: deque[int], requests: Sequence[Request], temperature: float, calls: dict[Any, _Call]
    ) -> None:
        while queue:
            free = [w for w in self._workers if w.preparing is None and w.load < self._limits.places]
            if not free:
                return
            worker = min(free, key=lambda w: w.load)
            index = queue.popleft()
            question, episode_ids = requests[index]
            if not worker.load:
                worker.last = time.monotonic()
            worker.load += len(episode_ids)
            calls[worker.actor.rollout.remote(question, list(episode_ids), temperature)] = _Call(
                index, worker, worker.life
            )

    def _bring_back(self, worker: _Worker, life: int, failure: _Failure) -> None:
        """Have a worker made anew, once for all the calls that ended with this life of it."""
        with self._lock:
            if worker.life != life:
                return
            self._count_death(worker, failure.reason)
            worker.life += 1
            if not failure.gone:
                ray.kill(worker.actor, no_restart=False)
            worker.preparing, worker.since = self._prepare(worker), time.monotonic()

    def _prepare(self, worker: _Worker) -> Any:
        # Ray refuses calls while it makes an actor anew; trying again is no new death of the worker.
        return worker.actor.prepare.options(max_task_retries=_PREPARE_RETRIES).remote(*self._adapter)

    def _prepared(self, worker: _Worker, reference: Any, failure: _Failure | None) -> None:
        if worker.preparing is not reference:
            return
        worker.preparing = None
        if failure is not None:
            self._bring_back(worker, worker.life, failure)
        elif ray.get(reference) == worker.pid:
            # The process that was to be killed was still there to answer.
            worker.preparing = self._prepare(worker)
        else:
            worker.pid, worker.last = ray.get(reference), time.monotonic()

    def _kill_hung(self) -> None:
        now, limits = time.monotonic(), self._limits
        for worker in self._workers:
            if worker.preparing is not None and now - worker.since > limits.start_seconds:
                hung = _Failure(f"it did not start within {limits.start_seconds:g} s", gone=False)
                self._bring_back(worker, worker.life, hung)
            # A call has a whole group, whose episodes may have to wait for one another's places.
            patience = limits.deadline_seconds * max(1, math.ceil(worker.load / (2 * limits.places)))
            if worker.preparing is None and worker.load and now - worker.last > patience:
                # Its calls end with the actor's death and are handed out again.
                hung = _Failure(f"it finished nothing for {patience:g} s", gone=False)
                self._bring_back(worker, worker.life, hung)

    def _count_death(self, worker: _Worker, problem: str) -> None:
        now, counters = time.monotonic(), self._counters
        counters.restarts += 1
        counters.deaths.append(now)
        while counters.deaths and now - counters.deaths[0] > self._limits.window_seconds:
            counters.deaths.popleft()
        if len(counters.deaths) > self._limits.max_failures:
            raise EnvironmentFailure(
                f"rollout workers died or hung {len(counters.deaths)} times within {self._limits.window_seconds:g} s, more than "
                f"rollout.max_failures {self._limits.max_failures} allows; the last one was worker {worker.number}: {problem}"
            )

    def _waiting(self, calls: Mapping[Any, _Call], queued: int, seconds: float) -> str:
        """Say who waits for whom."""
        states = []
        for worker in self._workers:
            groups = sum(call.worker is worker for call in calls.values())
            state = (
                "restarting" if worker.preparing is not None else f"running {groups} group(s), {worker.load} episodes"
            )
            states.append(f"worker {worker.number} {state}")
        return f"nothing finished for {seconds:.0f} s: {'; '.join(states)}; {queued} group(s) wait for a place"


def _failure(reference: Any) -> _Failure | None:
    """Return why the worker of a finished call cannot go on, None if it can; raise what else the call ended with."""
    try:
        ray.get(reference)
    except RayActorError as error:
        return _Failure(f"its process died ({error.__class__.__name__})", gone=True)
    except RayTaskError as error:
        cause = error.as_instanceof_cause()
        if isinstance(cause, EngineDied):
            return _Failure(str(cause), gone=False)
        raise cause from error
    return None


def _failed(request: Request, problem: str) -> list[Trajectory]:
    question, episode_ids = request
    return [
        Trajectory(
            name,
            question,
            (),
            (),
            End.ENVIRONMENT_FAILURE,
            cause=FailureCause.WORKER,
            failure=f"its worker failed every time: {problem}",
        )
        for name in episode_ids
    ]
