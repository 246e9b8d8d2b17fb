"""Supervisor: keeps the rollout workers of a run alive and gives each the newest weights."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError

from agentrl.adapters import WeightFiles
from agentrl.types import EngineDied, EnvironmentFailure

_PREPARE_RETRIES = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the pool waits and how often it tries again.

    Attributes:
        places: the episodes that an engine runs at once.
        episode_seconds: bounds one episode.
        start_seconds: bounds the start of an engine and the loading of weights.
        reward_seconds: bounds the rewards of one episode, which follow it.
        grace_seconds: what a worker may take beyond its episodes' and rewards' own time before it counts as hung.
        tries: how often a group is handed out before its episodes count as failed.
        max_failures, window_seconds: more deaths and hangs of workers than this within the window end the run.
    """

    places: int
    episode_seconds: float
    start_seconds: float
    reward_seconds: float = 0.0
    grace_seconds: float = 60.0
    tries: int = 3
    max_failures: int = 5
    window_seconds: float = 600.0


@dataclass(slots=True, eq=False)
class Worker:
    """A rollout worker as the pool sees it.

    Attributes:
        process: names the process that was last known to be ready, as `RolloutWorker.prepare` returns it.
        ended: the process that the pool has given up; it must not answer again.
        load: episodes that the worker was handed and has not given back.
        last: when the worker last gave back a group, or was handed one after it had none.
        preparing: the call that brings the worker back, None while it is ready.
        since: when that call was made.
    """

    actor: Any
    number: int
    process: str
    ended: str = ""
    load: int = 0
    last: float = 0.0
    preparing: Any = None
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker cannot go on, for a message, and whether its process may still work on what it was handed."""

    reason: str
    running: bool = False


@dataclass(slots=True)
class _Counters:
    restarts: int = 0
    deaths: deque[float] = field(default_factory=deque)


class Supervisor:
    """Watches workers that are ready. Two threads may use it at once: one that samples and one that publishes."""

    def __init__(self, actors: Sequence[Any], processes: Sequence[str], limits: Limits) -> None:
        """`processes` are what `prepare` returned for each of the actors."""
        self.workers = [Worker(a, n, name) for n, (a, name) in enumerate(zip(actors, processes, strict=True))]
        self.limits = limits
        self._weights: tuple[int | None, Any] = (None, None)
        self._asleep = False
        self._counters = _Counters()
        self._lock = threading.RLock()

    @property
    def restarts(self) -> int:
        """How many workers died or hung so far."""
        return self._counters.restarts

    def ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.preparing is None]

    def preparing(self) -> list[Any]:
        """Return the calls that bring workers back."""
        return [worker.preparing for worker in self.workers if worker.preparing is not None]

    def publish(self, version: int, files: WeightFiles) -> None:
        """See `RolloutPool.publish`."""
        # One copy in the object store of each machine serves all its workers, and goes when a newer one is there.
        stored = ray.put(dict(files))
        with self._lock:
            newest = self._weights[0]
            if newest is not None and version < newest:
                raise ValueError(f"version {version} is older than version {newest}, which was published before")
            self._weights = (version, stored)
        self._prepare_all(f"load the weights of version {version}")

    def sleep(self) -> None:
        """See `RolloutPool.sleep`."""
        # A worker on its way back would wake up behind this call.
        while self.preparing():
            ready, _ = ray.wait(self.preparing(), num_returns=1, timeout=1.0)
            for reference in ready:
                self.take(reference)
            self.check()
        self._asleep = True
        self._prepare_all("fall asleep")

    def wake(self) -> None:
        """See `RolloutPool.wake`."""
        self._asleep = False
        self._prepare_all("wake")

    def _prepare_all(self, what: str) -> None:
        """Bring every worker to where it should be, and wait until all are there.

        Raises:
            EnvironmentFailure: if workers died too often, or did not do `what` in time.
        """
        with self._lock:
            waiting = {self._prepare(worker): (worker, worker.process) for worker in self.workers}
        end = time.monotonic() + self.limits.start_seconds
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
            for reference in ready:
                worker, process = waiting.pop(reference)
                answer = _prepared(reference)
                if isinstance(answer, Failure):
                    self.bring_back(worker, process, answer.reason)
                    # This call waits until the worker is back.
                    waiting[self._prepare(worker)] = worker, worker.process
                else:
                    self._notice(worker, answer)
            if waiting and time.monotonic() > end:
                late = ", ".join(str(worker.number) for worker, _ in waiting.values())
                raise EnvironmentFailure(f"worker(s) {late} did not {what} within {self.limits.start_seconds:g} s")

    def bring_back(self, worker: Worker, process: str, reason: str) -> None:
        """Have a worker made anew, once for all the calls that ended with its process `process`.

        The process ends itself if it can still be called. To kill the actor could hit the next process, where the first
        has ended before.

        Raises:
            EnvironmentFailure: if workers died or hung too often.
        """
        with self._lock:
            if worker.preparing is not None or worker.process != process:
                return
            self._count_death(worker, reason)
            worker.ended = process
            worker.preparing, worker.since = self._prepare(worker), time.monotonic()

    def take(self, reference: Any) -> bool:
        """Take note of a finished call; return whether it was one that brings a worker back."""
        with self._lock:
            worker = next((w for w in self.workers if w.preparing is reference), None)
            if worker is None:
                return False
            worker.preparing = None
            answer = _prepared(reference)
            if isinstance(answer, Failure):
                self.bring_back(worker, worker.process, answer.reason)
            else:
                worker.process, worker.last = answer, time.monotonic()
            return True

    def check(self) -> None:
        """End and bring back the workers that hang.

        Raises:
            EnvironmentFailure: if workers died or hung too often.
        """
        now, limits = time.monotonic(), self.limits
        with self._lock:
            for worker in self.workers:
                # The worker runs its episodes in rounds: each place runs one after another. Rewards need no place.
                rounds = math.ceil(worker.load / limits.places)
                patience = rounds * limits.episode_seconds + limits.reward_seconds + limits.grace_seconds
                if worker.preparing is not None and now - worker.since > limits.start_seconds:
                    worker.preparing = None
                    self._kill(worker, f"it did not start within {limits.start_seconds:g} s")
                elif worker.preparing is None and worker.load and now - worker.last > patience:
                    # The worker's calls end with its process and are handed out again.
                    self._kill(worker, f"it finished nothing for {patience:g} s")

    def _kill(self, worker: Worker, reason: str) -> None:
        """Bring back a worker that may not answer calls."""
        ray.kill(worker.actor, no_restart=False)
        self.bring_back(worker, worker.process, reason)

    def _prepare(self, worker: Worker) -> Any:
        # Ray refuses calls while it makes an actor anew; to try again is no new death of the worker.
        prepare = worker.actor.prepare.options(max_task_retries=_PREPARE_RETRIES)
        return prepare.remote(*self._weights, worker.ended, self._asleep)

    def _notice(self, worker: Worker, process: str) -> None:
        """Take note of the process that answered, which is a new one where the worker died while nobody called it."""
        with self._lock:
            if worker.preparing is None and worker.process != process:
                self._count_death(worker, "its process died")
                worker.process = process

    def _count_death(self, worker: Worker, problem: str) -> None:
        now, counters, limits = time.monotonic(), self._counters, self.limits
        counters.restarts += 1
        counters.deaths.append(now)
        while now - counters.deaths[0] > limits.window_seconds:
            counters.deaths.popleft()
        if len(counters.deaths) > limits.max_failures:
            raise EnvironmentFailure(
                f"rollout workers died or hung {len(counters.deaths)} times within {limits.window_seconds:g} s, more than "
                f"rollout.max_failures {limits.max_failures} allows; the last one was worker {worker.number}: {problem}"
            )


def answer(reference: Any) -> Any:
    """Return the result of a finished call, or the Failure of the worker that ran it.

    Raises:
        RayTaskError: if the worker's code raised anything but EngineDied; it is an instance of that error's class, too.
    """
    try:
        return ray.get(reference)
    # Before the others: an error of the worker's code may be one of theirs as well.
    except RayTaskError as error:
        if isinstance(error, EngineDied):
            return Failure(str(error.cause))
        raise
    # The connection broke, or the process died a moment ago: nobody knows yet.
    except ActorUnavailableError:
        return Failure("it could not be reached", running=True)
    # A result is lost with the machine that holds it.
    except (RayActorError, ObjectLostError) as error:
        return Failure(f"its process died ({type(error).__name__})")


def _prepared(reference: Any) -> str | Failure:
    """Return the process that a finished call of `prepare` names, or why there is none; raise what its code raised."""
    try:
        return answer(reference)
    except RayTaskError as error:
        raise error.cause from error
