"""Batches made ahead of the trainer, as far as the bound on staleness allows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Makes the batches of steps one after another in a thread of its own.

    The trainer takes the batch of step s (from 1) with weights of version s - 1. A batch is begun once the version
    s - 1 - max_staleness is published, so that no turn of it is older than `max_staleness` versions when it is trained on;
    with 0 it is begun when the trainer asks for it, with the newest weights.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, max_staleness: int) -> None:
        """`make(step)` makes the batch of a step; it is called for `first` to `last`, never twice at once."""
        self._make = make
        self._steps = range(first, last + 1)
        self._max_staleness = max_staleness
        self._changed = threading.Condition()
        # Until the trainer publishes its weights, engines hold whatever they were started with.
        self._published = -math.inf
        self._made: dict[int, T] = {}
        self._making = self._paused = False
        self._error: BaseException | None = None
        # A daemon, because nothing should wait for batches that nobody will take.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def published(self, version: int) -> None:
        """Take note that the engines have the weights of `version`, those after that many steps."""
        with self._changed:
            self._published = version
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait until the batch that is being made is done, and begin none until the end of the block.

        Raises:
            BaseException: what making a batch raised, or `fail` was given.
        """
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._making or self._error is not None)
            if self._error is not None:
                raise self._error
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Have whoever takes a batch that is not made yet get `error` instead; no other batch is begun."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self, step: int) -> T:
        """Wait for the batch of a step and return it, or raise what making it raised."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._made or self._error is not None)
            if step not in self._made:
                raise self._error
            return self._made.pop(step)

    def _may_begin(self, step: int) -> bool:
        return not self._paused and self._error is None and self._published >= step - 1 - self._max_staleness

    def _run(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._may_begin(step))  # noqa: B023
                    self._making = True
                batch = self._make(step)
                with self._changed:
                    self._made[step] = batch
                    self._making = False
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001, it is raised where the batch is taken
            self.fail(error)
