"""A reward of the user's own, by its import path: a function or a class, sync or async."""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from agentrl.config import RewardConfig
from agentrl.registry import call_problem, look_up
from agentrl.rewards.base import RewardError
from agentrl.types import EnvironmentFailure, Trajectory


class OwnReward:
    """Calls the user's function or object; what that raises becomes a RewardError that names the line of the user's file."""

    def __init__(self, settings: RewardConfig) -> None:
        """Import it, check that it can be called so, and make the object if it is a class.

        Raises:
            RewardError: if one of these fails.
        """
        self._path = settings.kind
        if settings.kind.startswith("__main__:"):
            raise RewardError(
                f"{settings.kind} cannot be pickled: other processes have another __main__; put the reward into a module of "
                "its own"
            )
        self._target = look_up(settings.kind, {}, "reward", RewardError)
        self._file = _file_of(self._target)
        options = settings.options
        if not inspect.isclass(self._target):
            self._check_call(self._target, None, **options)
            self._call: Callable[[Trajectory], Any] = partial(self._target, **options)
        else:
            self._check_call(self._target, **options)
            try:
                self._call = self._target(**options)
            except Exception as error:
                raise self._failed(error) from error
            if not callable(self._call):
                raise RewardError(f"{self._path}{self._defined}: the class has no __call__(trajectory)")
            self._check_call(self._call, None)

    async def __call__(self, trajectory: Trajectory) -> Any:
        """Call the reward: a coroutine in this event loop, anything else in a thread, so that no episode waits for it.

        Raises:
            EnvironmentFailure: as the reward.
            RewardError: for any other exception of the reward.
        """
        try:
            if inspect.iscoroutinefunction(self._target) or inspect.iscoroutinefunction(type(self._call).__call__):
                return await self._call(trajectory)
            returned = await in_thread(partial(self._call, trajectory))
            return await returned if inspect.isawaitable(returned) else returned
        except EnvironmentFailure:
            raise
        except asyncio.CancelledError as error:
            # Nobody has cancelled this task: the reward has waited for something else that was cancelled.
            if asyncio.current_task().cancelling():
                raise
            raise self._failed(error) from error
        except Exception as error:
            raise self._failed(error) from error

    async def close(self) -> None:
        """Await the object's own `close`, if it has one."""
        closes = getattr(self._call, "close", None)
        if inspect.iscoroutinefunction(closes):
            await closes()

    @property
    def place(self) -> str:
        """The import path and the line that defines it: `mine:brevity (/home/me/mine.py:12)`."""
        return f"{self._path}{self._defined}"

    @property
    def _defined(self) -> str:
        if self._file is None:
            return ""
        try:
            return f" ({self._file}:{inspect.getsourcelines(inspect.unwrap(self._target))[1]})"
        except (OSError, TypeError):
            return f" ({self._file})"

    def _check_call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        problem = call_problem(function, *arguments, **options)
        if problem is not None:
            wants = "options" if inspect.isclass(function) else "the trajectory and its options"
            raise RewardError(f"{self.place} cannot be called with {wants}: {problem}")

    def _failed(self, error: BaseException) -> RewardError:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == self._file]
        frame = (own or frames)[-1]
        return RewardError(f"{self._path} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})")


async def in_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread of its own and return what it returns.

    Unlike those of `asyncio.to_thread`, such a thread keeps no process from ending, even if the function never returns.

    Raises:
        Exception: as the function; RuntimeError for SystemExit and the like, which would end the event loop.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def tell(returned: Any, error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(returned)
        else:
            done.set_exception(error)

    def call() -> None:
        returned, failure = None, None
        try:
            returned = function()
        except Exception as error:  # noqa: BLE001, handed on to whoever waits
            failure = error
        except BaseException as error:  # noqa: BLE001, the same
            failure = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
        try:
            loop.call_soon_threadsafe(tell, returned, failure)
        except RuntimeError:
            # The loop was closed, and nobody waits any longer.
            return

    threading.Thread(target=call, daemon=True, name="reward").start()
    return await done


def _file_of(target: Any) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(target))
    except TypeError:
        # What is written in C has no file of its own.
        return None
