"""What the rollout pool uses of Ray, in one process and in virtual time: actors run as coroutines, and waiting costs nothing.

`VirtualRay` takes the place of the module `ray` and of `time` where the pool looks for them. A test that would wait for
something that can never happen fails at once.
"""

import asyncio
import selectors
import traceback
from collections import Counter
from contextvars import ContextVar
from itertools import count

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError, TaskCancelledError

# The process that a coroutine runs in.
PROCESS = ContextVar("PROCESS", default=None)


class ProcessExit(BaseException):
    """Raised by an actor's code to end its process."""


class _Selector(selectors.SelectSelector):
    """Lets a loop's clock jump to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everything waits for something that will never happen"
        self.now += timeout
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._clock = _Selector()
        super().__init__(self._clock)
        self.set_task_factory(self._make)

    def time(self):
        return self._clock.now

    @staticmethod
    def _make(loop, coroutine, **options):
        task = asyncio.Task(coroutine, loop=loop, **options)
        process = PROCESS.get()
        if process is not None:
            process.tasks.add(task)
            task.add_done_callback(process.tasks.discard)
        return task


class _Process:
    """The tasks that end together."""

    def __init__(self, loop):
        self._loop = loop
        self.tasks = set()

    def end(self):
        for task in self.tasks - {asyncio.current_task(self._loop)}:
            task.cancel()


class VirtualRay:
    """`gets` counts how often each result was fetched."""

    def __init__(self):
        self.loop = _Loop()
        self.gets = Counter()

    def close(self):
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def monotonic(self):
        return self.loop.time()

    def put(self, value):
        reference = self.loop.create_future()
        reference.set_result(value)
        return reference

    def wait(self, references, num_returns=1, timeout=None, fetch_local=True):
        assert num_returns == 1
        done = self.loop.run_until_complete(self._first(references, timeout))
        return done[:1], [r for r in references if r not in done[:1]]

    async def _first(self, references, timeout):
        if not references:
            await asyncio.sleep(timeout)
            return []
        await asyncio.wait(references, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return [reference for reference in references if reference.done()]

    def get(self, reference, timeout=None):
        if not reference.done():
            self.wait([reference], timeout=timeout)
        if not reference.done():
            raise GetTimeoutError("not done")
        self.gets[reference] += 1
        return reference.result()

    def kill(self, actor, no_restart=True):
        assert not no_restart, "the pool has Ray make actors anew"
        # It takes a moment, and hits the process that is known at this time.
        process = actor.process
        self.loop.call_later(0.1, lambda: actor.process is not process or actor.die())

    def cancel(self, reference):
        actor, number = reference.call
        actor.cancel(number)


class Actor:
    """An actor whose methods are coroutines; `make` makes it anew whenever its process has ended."""

    def __init__(self, ray, make):
        self._ray, self._make = ray, make
        self._calls = {}
        self._numbers = count()
        self.lives = 0
        self._start()

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self, name)

    def _start(self):
        self.lives += 1
        self.process = _Process(self._ray.loop)
        self.instance = self._make(self)

    def submit(self, name, arguments, retries):
        reference = self._ray.loop.create_future()
        # An error that nobody asks for is no news.
        reference.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._submit(reference, name, arguments, retries)
        return reference

    def _submit(self, reference, name, arguments, retries):
        number = next(self._numbers)
        reference.call = self, number
        inside = PROCESS.set(self.process)
        task = self._ray.loop.create_task(self._run(number, name, arguments))
        PROCESS.reset(inside)
        self._calls[number] = reference, task, name, arguments, retries

    async def _run(self, number, name, arguments):
        # A reference to a stored object arrives as the object.
        values = [a.result() if isinstance(a, asyncio.Future) else a for a in arguments]
        try:
            value = await getattr(self.instance, name)(*values)
        except ProcessExit:
            self.die()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001, it is raised where the result is fetched
            wrapped = RayTaskError(
                name, traceback.format_exc(), error, proctitle="", pid=1, ip=""
            ).as_instanceof_cause()
            self._end(number, lambda reference: reference.set_exception(wrapped))
        else:
            self._end(number, lambda reference: reference.set_result(value))

    def _end(self, number, settle):
        reference = self._calls.pop(number)[0]
        if not reference.done():
            settle(reference)

    def die(self, make_error=ActorDiedError):
        """End the process: what it ran is lost, and a new one takes its place."""
        calls, self._calls = self._calls, {}
        self.process.end()
        self._start()
        for reference, _, name, arguments, retries in calls.values():
            if reference.done():
                continue
            if retries:
                self._submit(reference, name, arguments, retries - 1)
            else:
                reference.set_exception(make_error())

    def lose(self):
        """Lose the connection for a moment: callers get an error, and the process goes on."""
        for reference, *_ in self._calls.values():
            if not reference.done():
                reference.set_exception(unavailable())

    def cancel(self, number):
        if number in self._calls:
            reference, task, *_ = self._calls.pop(number)
            task.cancel()
            if not reference.done():
                reference.set_exception(TaskCancelledError())


def unavailable():
    return ActorUnavailableError("connection lost", b"0" * 16)


class _Method:
    def __init__(self, actor, name, retries=0):
        self._actor, self._name, self._retries = actor, name, retries

    def options(self, max_task_retries):
        return _Method(self._actor, self._name, max_task_retries)

    def remote(self, *arguments):
        return self._actor.submit(self._name, arguments, self._retries)
